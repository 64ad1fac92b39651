"""Processes of the speedrun as calls in this process, which spare the start of another."""

import sys

import torch


def run_in_process(monkeypatch, module):
    """Has a module's `multiprocessing` call its targets.

    Args:
        monkeypatch: pytest's.
        module: What starts the processes.

    Returns:
        A list, to which the arguments of each are added.
    """
    ran = []

    class Process:
        exitcode = 0

        def __init__(self, target, args):
            self.target, self.args = target, args

        def start(self):
            ran.append(self.args)
            stdout, threads, path = sys.stdout, torch.get_num_threads(), list(sys.path)
            try:
                self.target(*self.args)
            except SystemExit as ended:
                self.exitcode = ended.code
            finally:
                sys.stdout, sys.path[:] = stdout, path
                torch.set_num_threads(threads)

        def join(self):
            pass

    class Context:
        pass

    Context.Process = Process
    monkeypatch.setattr(module.multiprocessing, "get_context", lambda kind: Context)
    return ran
