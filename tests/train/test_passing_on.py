"""Signals to a program that runs others: each goes on to the one under way, which may end in its own time."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny_run

from moe_jax.train.passing_on import PASSED_ON, PassingOn
from moe_jax.train.preemption import PreemptedError

# Takes a moment to end after it was told, and a Ctrl-C of its own would be a second one.
CHILD = """
import os, signal, sys, time
told = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: told.append(number))
print("begun", os.getpgrp() == os.getpid(), flush=True)
while not told:
    time.sleep(0.01)
time.sleep(0.3)
print("told", told, flush=True)
sys.exit(128 + told[0])
"""
# A program that runs CHILD, as launch.ablate runs launch.train.
PARENT = f"""
import sys
from moe_jax.train.passing_on import PassingOn
from moe_jax.train.preemption import PreemptedError
try:
    with PassingOn() as programs:
        programs.run("1/2 moe", [sys.executable, "-c", {CHILD!r}], lambda: "saved.")
        print("went on")
except PreemptedError as stopped:
    print(stopped, flush=True)
    sys.exit(stopped.exit_status)
"""


@pytest.mark.parametrize(
    ("number", "group"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGHUP, True)]
)
def test_a_signal_goes_on_once_and_the_program_ends_in_its_own_time(number, group):
    """To the program alone, and to its process group as a terminal does."""
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, cwd=tiny_run.ROOT, stdout=subprocess.PIPE, text=True, process_group=0) as parent:
        assert parent.stdout.readline() == "begun True\n"
        (os.killpg if group else os.kill)(parent.pid, number)
        out, _ = parent.communicate(timeout=60)
    passed = PASSED_ON[number]
    assert out.splitlines() == [
        f"told [{int(passed)}]",
        f"{number.name}: passed on to 1/2 moe, which ended with status {128 + passed} and said last: saved. Run the same command"
        " again to go on.",
    ]
    assert parent.returncode == 128 + number


def test_a_program_that_nothing_stops_has_its_status_and_the_next_one_runs():
    before = [signal.getsignal(number) for number in PASSED_ON]
    with PassingOn() as programs:
        assert programs.run("a", [sys.executable, "-c", "import sys; sys.exit(3)"], str) == 3
        assert programs.run("b", [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], str) == 137
    assert [signal.getsignal(number) for number in PASSED_ON] == before


def test_a_notice_between_two_programs_stops_before_the_next():
    with (
        PassingOn(),
        pytest.raises(PreemptedError, match=r"SIGTERM: stopped between two runs\. Run the same command") as stopped,
    ):
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.exit_status == 143


def test_a_notice_while_a_program_is_being_started_is_not_lost(monkeypatch):
    def tell_before(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)  # the handler runs
        return popen(*arguments, **options)

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", tell_before)
    with PassingOn() as programs, pytest.raises(PreemptedError, match="ended with status 143"):
        programs.run("a", ["sleep", "60"], str)


def test_what_is_ignored_stays_ignored():
    assert threading.current_thread() is threading.main_thread()
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with PassingOn():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, earlier)
