"""The flags that say which processes make up a run: --processes, or --coordinator, --num_processes and --process_id."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from absl import flags

from moe_jax import processes


@dataclass(frozen=True)
class ProcessFlags:
    """What `define` defined."""

    kind: flags.FlagHolder
    coordinator: flags.FlagHolder
    num_processes: flags.FlagHolder
    process_id: flags.FlagHolder
    peer_timeout: flags.FlagHolder


def define() -> ProcessFlags:
    """Defines the flags of a program that several processes can run together (docs/launching.md)."""
    return ProcessFlags(
        flags.DEFINE_string("processes", "auto", f"Who started the processes of this run: {', '.join(processes.KINDS)}."),
        flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for processes started by hand."),
        flags.DEFINE_integer("num_processes", None, "How many processes, beside --coordinator."),
        flags.DEFINE_integer("process_id", None, "Which one this is, from 0, beside --coordinator."),
        flags.DEFINE_integer("peer_timeout", processes.PEER_TIMEOUT, "Seconds until a silent process ends the others."),
    )


@contextlib.contextmanager
def joined(holders: ProcessFlags) -> Iterator[None]:
    """Joins the run that the flags describe; a failure inside ends this process, and through it the others. Processes but the first log
    warnings only. Raises ConfigError.
    """
    numbers = (holders.coordinator.value, holders.num_processes.value, holders.process_id.value)
    timeout = holders.peer_timeout.value
    processes.start(processes.find(holders.kind.value, *numbers), timeout)
    if not processes.first():
        logging.getLogger("moe_jax").setLevel(logging.WARNING)
    with processes.ending(timeout):
        yield
