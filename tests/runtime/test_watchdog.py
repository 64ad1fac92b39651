"""A process that cannot end by itself is ended, with a sentence; one that works, or waits on purpose, is left alone."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.project_files import ROOT

HANG = """
import ctypes, os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
from diffusion_lit.runtime import watchdog
watchdog.PERIOD = 0.1
watchdog.GRACE = 0.5
watchdog.SAME = 0.3

class Callback: pass

class Draws(Callback):
    def on_validation_end(self):
        libc, mutex = ctypes.CDLL(None), (ctypes.c_char * 64)()
        libc.pthread_mutex_lock(mutex)
        print("ready", flush=True)
        libc.pthread_mutex_lock(mutex)  # as a collective that no other rank joins: no signal handler ever runs again

"""


@pytest.fixture
def python():
    """Starts a program that has said "ready"; what is left of it in the end is killed."""
    started = []

    def start(code):
        env = {**os.environ, "PYTHONPATH": ROOT}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", HANG + code], env=env, **pipes))
        assert started[-1].stdout.readline().strip() == "ready", started[-1].stderr.read()
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_a_process_that_hangs_says_where_and_ends(python):
    process = python("watchdog.watch(0.5, rank=3)\nDraws().on_validation_end()")
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert "rank 3 has stood in one place for" in said and "Draws.on_validation_end" in said
    assert "--ckpt_path last" in said and "--watchdog.minutes" in said


@pytest.mark.medium
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_what_no_handler_can(python, number):
    process = python(
        "import signal\nsignal.signal(signal.SIGTERM, print)\nwatchdog.watch()\nDraws().on_validation_end()"
    )
    time.sleep(0.5)  # it said "ready" just before it hangs
    process.send_signal(number)
    process.send_signal(number)  # at once: a launcher that passes on what the terminal sent
    time.sleep(1.5)
    assert process.poll() is None
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:  # a busy machine may see several of them as one
        process.send_signal(number)
        time.sleep(1)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number
    assert "second " + {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number] in said


def test_a_rank_ends_with_the_process_that_started_it(python):
    code = """
child = os.fork()
if child:
    time.sleep(1)
    print("ready", child, flush=True) if False else os._exit(0)
print(f"ready", flush=True)
watchdog.watch(rank=1)
Draws().on_validation_end()
"""
    process = python(code)
    said = process.communicate(timeout=30)[1]  # until the child is gone, too, which holds the pipe
    assert "rank 1 is ended: the process that started it is gone" in said


@pytest.mark.medium
def test_work_and_waiting_on_purpose_are_no_hang(python):
    code = """
watchdog.watch(0.5)
print("ready", flush=True)
with watchdog.waiting("another run"):
    time.sleep(2)
for _ in range(20):  # always at the same instruction
    time.sleep(0.1)
    watchdog.beat()
from tqdm import tqdm
with tqdm(total=20, disable=True) as bar: pass
watchdog.rest()
time.sleep(1)
"""
    process = python(code)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_failure_that_cannot_end_is_ended(python):
    code = "watchdog.watch(rank=0)\nwatchdog.end_within(0.5, 'the disk is full')\nDraws().on_validation_end()"
    process = python(code)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 1 and "the disk is full" in said


@pytest.mark.medium
def test_signals_of_a_child_are_not_the_parents(python):
    """A loader's process inherits handlers; what it is sent must not count as a second signal to the run."""
    code = """
import signal
signal.signal(signal.SIGTERM, lambda *args: None)
watchdog.watch()
print("ready", flush=True)
for _ in range(2):
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.6)
time.sleep(1)
"""
    process = python(code)
    process.communicate(timeout=30)
    assert process.returncode == 0
