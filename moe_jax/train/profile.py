"""Where the time and the memory of a run go: a trace of some steps, bytes on a device, what the compiled step needs.

`profile.steps = "10:13"` traces steps 10 to 13 into the run folder's `profile/`, for XProf and TensorBoard. Every operation of a step is
under the name of its phase (`PHASES`), forward and backward.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from moe_jax import processes
from moe_jax.config import Config, ConfigError
from moe_jax.train.state import TrainState

PHASES = ("attention", "route", "dispatch", "exchange", "experts", "combine")  # `jax.named_scope`s of the layers
FOLDER = "profile"


def window(config: Config) -> tuple[int, int] | None:
    """(first, last) step to trace, both of them in it; None for none.

    Raises:
      ConfigError: `profile.steps` is no "FIRST:LAST" or "STEP", or not within the run.
    """
    text, steps = config.profile.steps, config.train.steps
    if not text:
        return None
    if not re.fullmatch(r"\d+(:\d+)?", text, re.ASCII):
        raise ConfigError(f"profile.steps = {text!r} is no FIRST:LAST; give two steps of the run, such as 10:13, or one.")
    first, last = (int(step) for step in (text.split(":") * 2)[:2])
    if not 1 <= first <= last <= steps:
        raise ConfigError(
            f"profile.steps = {text!r} is not within the run: give FIRST:LAST with 1 <= FIRST <= LAST <= train.steps = {steps}."
        )
    return first, last


class TracedStep:
    """The train step, some of whose calls are traced; a context manager, which ends a trace that an error cuts short.

    Where nothing is traced it is the step itself. Else it is compiled ahead, once, so that the compiler's account of its memory can be
    printed.
    """

    def __init__(self, step: Callable[..., Any], config: Config, start: int):
        """
        Args:
          step: (state, batch, key) -> (state, metrics), jitted.
          config: of the run.
          start: steps taken before the first call.
        """
        self._step, self._count, self._tracing = step, start, False
        self._folder = Path(config.workdir) / FOLDER
        self._window = window(config)
        if self._window and start >= self._window[1]:
            processes.say(f"nothing is traced: step {start} is done, and profile.steps = {config.profile.steps!r}")
            self._window = None
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, state: TrainState, batch: dict, key: jax.Array) -> Any:
        """One step; waits for its end where it is the last one traced."""
        self._count += 1
        if self._window is None:
            return self._step(state, batch, key)
        first, last = self._window
        if self._compiled is None:
            self._compiled = self._step.lower(state, batch, key).compile()
            processes.say(program_memory(self._compiled))
        if first <= self._count <= last and not self._tracing:
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=self._count):
            result = self._compiled(state, batch, key)
        if self._tracing and self._count == last:
            jax.block_until_ready(result)
            self._stop()
        return result

    def _stop(self):
        jax.profiler.stop_trace()
        self._tracing = False
        processes.say(f"traced to step {self._count}: tensorboard --logdir={self._folder}")

    def __enter__(self) -> "TracedStep":
        return self

    def __exit__(self, *_) -> None:
        if self._tracing:
            self._stop()


def state_memory(state: TrainState) -> str:
    """One line: bytes of parameters and of the optimizer's state, all in all and on the fullest device."""
    parts = {"parameters": state.params, "optimizer": state.opt_state, "router state": state.router_state}
    sizes = {name: (_bytes(tree), _bytes_on_device(tree)) for name, tree in parts.items() if jax.tree.leaves(tree)}
    text = ", ".join(f"{name} {readable(total)} ({readable(own)} on a device)" for name, (total, own) in sizes.items())
    return f"memory  {text}"


def program_memory(compiled: Any) -> str:
    """One line on what a compiled step needs on a device, as the compiler accounts for it.

    Args:
      compiled: of `jax.jit(f).lower(...).compile()`.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        return "program this backend gives no account of a program's memory"
    arguments, outputs, reused = stats.argument_size_in_bytes, stats.output_size_in_bytes, stats.alias_size_in_bytes
    temporary = stats.temp_size_in_bytes
    return (
        f"program {readable(arguments + outputs - reused + temporary)} on a device: {readable(arguments)} of arguments,"
        f" {readable(outputs)} of results ({readable(reused)} in the arguments' place), {readable(temporary)} in between"
    )


def _bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _bytes_on_device(tree):
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def readable(size: float) -> str:
    """Bytes in the largest unit of which there is one."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(max(size, 1), 1024)), len(units) - 1)
    return f"{size / 1024**power:.1f} {units[power]}" if power else f"{size} B"
