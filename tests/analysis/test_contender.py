"""A contender: the function runs over there, call by call, and what goes wrong there is told here."""

import os

import pytest

from moe_jax.analysis.contender import Contender


def make_counter(path, last):
    calls = []

    def count():
        if len(calls) == last:
            raise ValueError(f"only {last} calls")
        calls.append(os.getpid())
        path.write_text(" ".join(map(str, calls)))

    return count


def leave():
    os._exit(3)


def test_each_call_runs_once_in_the_same_other_process(tmp_path):
    with Contender(make_counter, tmp_path / "calls", 2) as step:
        assert not (tmp_path / "calls").exists()
        step()
        step()
        first, second = (tmp_path / "calls").read_text().split()
        assert first == second != str(os.getpid())
        with pytest.raises(RuntimeError, match=r"(?s)Traceback.*ValueError: only 2 calls"):
            step()
    assert not step.process.is_alive()


def test_what_fails_while_it_is_made_is_told():
    with pytest.raises(RuntimeError, match=r"(?s)contender's process failed.*make_counter"):
        Contender(make_counter)


def test_a_process_that_dies_is_told():
    with pytest.raises(RuntimeError, match="exit status 3"):
        Contender(leave)
