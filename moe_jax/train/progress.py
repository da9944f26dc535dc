"""How far a run is: a bar on a terminal, plain lines anywhere else."""

import sys
from typing import TextIO

import jax
from tqdm import tqdm


class Progress:
    """Loss, tokens per second and time to go, a context manager. In a run of several processes only the first one prints."""

    def __init__(self, steps: int, tokens_per_step: int, start: int = 0, stream: TextIO | None = None):
        """
        Args:
          steps: optimizer steps of the whole run.
          tokens_per_step: tokens one step trains on, for the time to go.
          start: steps already taken, in a resumed run.
          stream: where to print; standard error by default.
        """
        self._steps = steps
        self._tokens_per_step = tokens_per_step
        self._stream = sys.stderr if stream is None else stream
        self._silent = jax.process_index() != 0
        self._bar = None
        if self._stream.isatty() and not self._silent:
            bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=steps, initial=start, file=self._stream, bar_format=bar_format, dynamic_ncols=True)

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows that `step` steps are done, e.g. `step 100/1000 loss 2.345 12,345 tokens/s eta 1:23`."""
        to_go = (self._steps - step) * self._tokens_per_step / tokens_per_second if tokens_per_second > 0 else None
        text = f"loss {loss:.3f} {tokens_per_second:,.0f} tokens/s eta {duration(to_go)}"
        if self._bar is None:
            self.message(f"step {step}/{self._steps} {text}")
        else:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.n = step
            self._bar.refresh()

    def message(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._silent:
            return
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def close(self) -> None:
        """Leaves the bar as it is and goes to a new line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def duration(seconds: float | None) -> str:
    """1:23 for 83 seconds, 1:00:05 for 3605, ? for None."""
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
