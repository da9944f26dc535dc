"""The progress bar on a terminal and the lines elsewhere."""

import io

import pytest

from moe_jax.train.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_off_a_terminal():
    stream = io.StringIO()
    with Progress(1000, tokens_per_step=1139, start=0, stream=stream) as progress:
        progress.update(100, 2.34549, 12345.4)
        progress.message("evaluated")
    assert stream.getvalue() == "step 100/1000 loss 2.345 12,345 tokens/s eta 1:23\nevaluated\n"


def test_a_bar_on_a_terminal():
    stream = Terminal()
    with Progress(200, tokens_per_step=100, start=50, stream=stream) as progress:
        progress.update(100, 1.5, 1000.0)
        progress.message("evaluated")
    text = stream.getvalue()
    assert " 25%|" in text  # where it starts
    assert " 50%|" in text
    assert "100/200, loss 1.500 1,000 tokens/s eta 0:10" in text
    assert "evaluated\n" in text
    assert "step 100/200" not in text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (83, "1:23"), (59.6, "1:00"), (3605, "1:00:05"), (None, "?")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_an_unknown_speed_gives_an_unknown_time():
    stream = io.StringIO()
    Progress(10, 1, stream=stream).update(1, float("nan"), 0.0)
    assert stream.getvalue() == "step 1/10 loss nan 0 tokens/s eta ?\n"
