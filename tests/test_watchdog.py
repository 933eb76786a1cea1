"""A process that hangs is ended with words; one that is slow, rests, or was stopped itself is left alone."""

import os
import signal
import subprocess
import sys
import time

import pytest

from onejump.watchdog import HUNG, SLOWER, Patience, Watchdog

PROGRAM = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from onejump.watchdog import Patience, Watchdog

def stuck():
    threading.Event().wait()

with Watchdog(Path(sys.argv[1]), Patience(first=1, later=0.4), rank=2, world=4) as dog:
    dog.beat(7)
    dog.beat(8)
    exec(sys.argv[2])
print("ended")
"""


def ending(tmp_path, code, stderr=subprocess.PIPE):
    argv = [sys.executable, "-c", PROGRAM, str(tmp_path / "stage"), code]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr, text=True)


def test_a_hung_step_ends_the_process_with_one_line_and_the_stacks(tmp_path):
    process = ending(tmp_path, "stuck()")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (HUNG, "")
    [line] = err.split("\n")[1:-1]
    assert f"process 2 of 4 (pid {process.pid} on " in line and "the step after 8 has taken" in line
    file = tmp_path / "stage" / "hung-2.txt"
    assert str(file) in line and "in stuck" in file.read_text()


def test_a_hung_step_is_ended_also_where_its_stacks_cannot_be_written(tmp_path):
    (tmp_path / "stage").write_text("")
    process = ending(tmp_path, "stuck()")
    err = process.communicate(timeout=60)[1]
    assert process.returncode == HUNG and "hung-2.txt: " in err and "in stuck" in err


@pytest.mark.skipif(sys.platform == "win32", reason="asks the C library to sleep")
def test_a_step_that_never_lets_go_of_the_interpreter_is_ended_too(tmp_path):
    process = ending(tmp_path, "time.sleep(0.1); ctypes.PyDLL(None).sleep(20)")
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "Timeout" in err and "in <module>" in err


@pytest.mark.skipif(sys.platform == "win32", reason="stops a process")
def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path):
    ours, its = os.openpty()
    process = ending(tmp_path, "print('in', flush=True); time.sleep(0.2)", stderr=its)
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.8)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "ended\n" and process.returncode == 0
    os.close(ours), os.close(its)


def test_a_run_that_goes_on_or_rests_is_left_alone(tmp_path):
    with Watchdog(tmp_path, Patience(first=0.2, later=0.2)) as dog:
        with dog.resting():
            time.sleep(0.5)
        for step in range(10):
            dog.beat(step)
            time.sleep(0.05)
    assert not dog.thread.is_alive() and list(tmp_path.iterdir()) == []


def test_slow_steps_make_it_patient():
    patience = Patience(first=3600, later=600)
    assert [patience.limit(longest) for longest in (None, 0.1, 30, 100)] == [3600, 600, 600, SLOWER * 100]
    assert Patience(first=10, later=20).limit(None) == 20


def test_the_first_step_does_not_make_it_patient(tmp_path):
    with Watchdog(tmp_path, Patience(first=10, later=1)) as dog:
        time.sleep(0.2)
        dog.beat(1)
        dog.beat(2)
        assert dog.longest < 0.2


def test_without_a_limit_nothing_watches(tmp_path):
    with Watchdog(tmp_path, Patience(later=0)) as dog:
        dog.beat(1)
        assert not dog.thread.is_alive()
