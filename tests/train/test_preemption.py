"""Signals: what a notice waits for, what it does not wait for, and the run that was stopped, to the bit."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from moe_jax.train.preemption import EXIT_STATUS, SAME_NOTICE, Notice, PreemptedError

FOLDER = "runs/mine"
HANDLED = (signal.SIGTERM, signal.SIGINT)

# The main thread is in C, where Python runs no handlers; HELD is hold() or nothing.
BUSY = """
import hashlib, sys
from moe_jax.train.preemption import Notice

with Notice() as notice:
    if sys.argv[1] == "held":
        notice.hold()
    print("listening", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def handlers():
    return [signal.getsignal(number) for number in HANDLED]


@pytest.mark.parametrize(("latest", "where"), [(None, "none"), (4, "that of step 4")])
def test_a_step_whose_checkpoint_was_not_made_is_not_said_to_have_one(latest, where):
    with (
        Notice() as notice,
        pytest.raises(PreemptedError, match=f"after step 7, without a checkpoint of it; {where} is in {FOLDER};"),
    ):
        notice.stop(7, FOLDER, latest)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_notice_waits_for_the_step_and_its_checkpoint(number, status):
    before = handlers()
    with Notice() as notice:
        notice.hold()
        assert not notice.asked(6)
        os.kill(os.getpid(), number)
        assert notice.asked(7)
        with pytest.raises(PreemptedError) as stopped:
            notice.stop(7, FOLDER, 7)
    assert stopped.value.exit_status == status
    assert str(stopped.value) == (
        f"{number.name}: stopped after step 7, whose checkpoint is in runs/mine; run the same command again to go on from there."
    )
    assert handlers() == before
    assert EXIT_STATUS == 143


def test_a_notice_after_the_last_question_is_not_lost():
    with Notice() as notice:
        notice.hold()
        assert not notice.asked(7)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(PreemptedError, match="after step 7"):
            notice.release(7, FOLDER, 7)


def test_a_second_control_c_interrupts_and_so_does_one_that_nothing_waits_for():
    with Notice() as notice:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not notice.asked(1)
        notice.hold()
        signal.raise_signal(signal.SIGINT)
        assert notice.asked(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_signals_are_left_alone_in_another_thread_and_where_they_are_ignored():
    before = handlers()
    seen = []

    def listen():
        with Notice() as notice:
            notice.hold()
            seen.append((handlers(), notice.asked(1)))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Notice() as notice:
            notice.hold()
            signal.raise_signal(signal.SIGINT)
            assert not notice.asked(1)
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_the_fd_that_wakes_an_event_loop_is_put_back():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    earlier = signal.set_wakeup_fd(writing)
    try:
        with Notice():
            pass
        assert signal.set_wakeup_fd(earlier) == writing
    finally:
        signal.set_wakeup_fd(earlier)
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize(("held", "told", "why"), [("", 1, "no step was under way"), ("held", 2, "a second one")])
def test_a_process_that_is_busy_ends_at_once(held, told, why):
    """In a compilation, say; with a step under way at the second signal."""
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-c", BUSY, held]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "listening\n"
        time.sleep(0.2)
        for _ in range(told):
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)  # the same notice
            time.sleep(SAME_NOTICE + 0.5)
        assert process.wait(60) == EXIT_STATUS
        assert process.stderr.read() == f"SIGTERM: {why}, so the run ends at once; run the same command again to go on.\n"
