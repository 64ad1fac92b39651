"""The command in a process of its own, forked from one that has imported it: what starts anew imports for 7 seconds."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

from helpers.project_files import ROOT

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["diffusion_lit.commands.fit", "diffusion_lit.commands.sample"])


def _main(args, folder, environment, log):
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(file), "w", buffering=1, errors="backslashreplace") for _ in range(2))
    from diffusion_lit.commands.main import main

    main(args)


def run_apart(args, folder=None, timeout=240, **environment):
    """Runs the command in a fresh process, which may fork ranks: autograd has started no threads in it.

    Args:
        args: The command line.
        folder: The working folder; that of the tests by default.
        timeout: Seconds after which it is killed, with all that it started.
        environment: Variables beside those of the tests.

    Returns:
        Its exit status, output (both streams) and arguments, as a `subprocess.CompletedProcess`.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = ROOT  # where the server finds what it imports
    folder = Path.cwd() if folder is None else Path(folder)
    log = folder / f".output_{os.getpid()}"
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = SERVER.Process(target=_main, args=([str(arg) for arg in args], str(folder), env, str(log)))
    try:
        process.start()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    process.join(timeout)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    output = log.read_text(errors="replace") if log.exists() else ""
    log.unlink(missing_ok=True)
    return subprocess.CompletedProcess(args, process.exitcode, output, "")
