"""What the programs share: refusals in one sentence, the project's own log lines, and a mesh written on the command line."""

import ctypes
import logging
import sys
from collections.abc import Callable

import absl.logging
from absl import app, flags

from moe_jax.config import ConfigError, MeshConfig
from moe_jax.data.documents import DataError
from moe_jax.train.checkpoint import CheckpointError
from moe_jax.train.loop import TrainingError

REFUSALS = (ConfigError, DataError, CheckpointError, TrainingError)


def run(main: Callable[..., None], argument: str | None = None) -> None:
    """Parses the flags and runs `main`, with the one positional argument if `argument` names one.

    What the package refuses is one sentence on stderr and exit status 2; `--v=1` shows the traceback and other libraries' logs too.
    """

    def guarded(argv):
        expected = 1 if argument is None else 2
        if len(argv) > expected:
            raise app.UsageError(f"unexpected argument {argv[expected]!r}; options are written --name=value.")
        if len(argv) < expected:
            raise app.UsageError(f"{argument} is missing.")
        _set_up_logging()
        _keep_freed_memory()
        try:
            main(*argv[1:])
        except REFUSALS as refusal:
            if absl.logging.get_verbosity() > 0:
                raise
            print(f"error: {refusal}", file=sys.stderr)
            sys.exit(2)

    app.run(guarded)


def _keep_freed_memory():
    """Lets glibc keep what it frees instead of giving it back to the kernel; elsewhere nothing happens.

    On the CPU every train step allocates its temporaries anew. Returned to the kernel, they cost the quickstart 200,000 page faults
    and about a third of its time per step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        arena_max, mmap_threshold, top_pad, trim_threshold = -8, -3, -2, -1  # malloc.h
        for option, value in ((arena_max, 1), (mmap_threshold, 2**30), (top_pad, 2**28), (trim_threshold, 2**31 - 1)):
            mallopt(option, value)


def _set_up_logging():
    if not flags.FLAGS["verbosity"].present:
        absl.logging.set_verbosity(absl.logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger = logging.getLogger("moe_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def parse_mesh(text: str) -> MeshConfig | None:
    """`data=2,expert=4,emulate=8` as a MeshConfig, axes not named being 1 (data: what is left); None for "".

    Raises:
      ConfigError: an unknown axis or a size that is no integer.
    """
    sizes = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in MeshConfig.__dataclass_fields__ or not value.lstrip("-").isdigit():
            raise ConfigError(
                f"mesh = {text!r}: {item!r} is not axis=size; axes are {', '.join(MeshConfig.__dataclass_fields__)}."
            )
        sizes[name] = int(value)
    return MeshConfig(**sizes) if sizes else None
