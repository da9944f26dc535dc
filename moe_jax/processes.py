"""Runs of several processes: where this one stands among them, who speaks, and what happens when one of them dies.

JAX knows Slurm, TPU slices, Kubernetes and MPI (`jax._src.clusters`, whose detection is used here as it is); three flags say the same
by hand. One process alone starts nothing. What every process must know to compute together (config, data, checkpoint) is compared
before the first step, so that hosts that see different disks are told so, and do not wait for each other for ever.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import itertools
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import clusters, distributed

from moe_jax.validation import ConfigError, RefusalError

RUN_AGAIN = 76  # exit status of a process that cannot go on (another one is gone, a step hangs): start the whole run again
PEER_TIMEOUT = 60  # seconds without a sign of life after which a process counts as dead
_AGREE_TIMEOUT = 600  # seconds that a process may take longer than another to read the data, say
# the kinds of --processes, by the classes of jax._src.clusters that detect them
_CLUSTERS = {
    "slurm": ("SlurmCluster",),
    "tpu": ("GkeTpuCluster", "GceTpuCluster"),
    "kubernetes": ("K8sCluster",),
    "ompi": ("OmpiCluster",),
    "mpi4py": ("Mpi4pyCluster",),
}
KINDS = ("auto", "none", *_CLUSTERS)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands in its run.

    Attributes:
      coordinator: HOST:PORT of process 0, which all reach.
      count: processes of the run.
      index: of this one, from 0.
      local_devices: which of the host's devices are this process's; None for all.
    """

    coordinator: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None


def find(
    kind: str = "auto", coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Place | None:
    """This process's place: what the three numbers say, else what the scheduler of `kind` says; None for a process alone.

    Args:
      kind: one of `KINDS`. "auto" takes the three where they are given, else the first scheduler that started this process, else none;
        of a pod in Kubernetes it asks only where that belongs to an indexed Job. "mpi4py" is never taken by itself.
      coordinator, num_processes, process_id: all or none; HOST:PORT of process 0, how many there are, which one this is.

    Raises:
      ConfigError: an unknown kind, some of the three without the others or beside a scheduler, numbers that make no sense, a scheduler
        that did not start this process.
    """
    if kind not in KINDS:
        raise ConfigError(f"--processes = {kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) < len(given):
        if missing:
            raise ConfigError(f"{missing[0]} is missing; give all of {', '.join(given)}, or none.")
        if kind != "auto":
            raise ConfigError(f"--processes = {kind!r} contradicts --coordinator = {coordinator!r}; leave one of them out.")
        return _explicit(coordinator, num_processes, process_id)
    if kind == "none":
        return None
    names = _automatic() if kind == "auto" else _CLUSTERS[kind]
    present = next((cluster for name in names if (cluster := getattr(clusters, name)).is_env_present()), None)
    if present is not None:
        return _of(present)
    if kind != "auto":
        raise ConfigError(
            f"--processes = {kind!r}, but this process was not started by it; use its launcher, or --coordinator=HOST:PORT"
            " --num_processes=N --process_id=I, or --processes=none."
        )
    return None


def _automatic():
    kinds = ("ompi", "slurm", "tpu") + (("kubernetes",) if "JOB_COMPLETION_INDEX" in os.environ else ())
    return [name for kind in kinds for name in _CLUSTERS[kind]]


def _explicit(coordinator, num_processes, process_id):
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--coordinator = {coordinator!r} is not HOST:PORT, e.g. 10.0.0.1:8476.")
    if num_processes < 1:
        raise ConfigError(f"--num_processes = {num_processes} must be at least 1.")
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process_id = {process_id} is not one of the {num_processes} processes of --num_processes; they are 0 to"
            f" {num_processes - 1}."
        )
    return Place(coordinator, num_processes, process_id) if num_processes > 1 else None


def _of(cluster):
    try:
        if (count := cluster.get_process_count()) <= 1:
            return None
        address = cluster.get_coordinator_address(300, os.environ.get("JAX_COORDINATOR_PORT"))
        local = cluster.get_local_process_id()
        return Place(address, count, cluster.get_process_id(), None if local is None else (local,))
    except (KeyError, ValueError, RuntimeError, AttributeError, OSError) as error:
        raise ConfigError(
            f"{cluster.__name__} of JAX cannot tell the processes of this run: {error!r}; give --coordinator=HOST:PORT"
            " --num_processes=N --process_id=I, or --processes=none for one process."
        ) from error


def start(place: Place | None, peer_timeout: int = PEER_TIMEOUT) -> None:
    """Joins the run; returns when every process has. None does nothing. Call before anything asks JAX for its devices.

    From here on a process that dies ends the others within `peer_timeout` seconds, with one sentence and exit status `RUN_AGAIN`.

    Raises:
      ConfigError: a timeout that is too short to tell; processes that do not meet.
    """
    if peer_timeout < 5:
        raise ConfigError(f"--peer_timeout = {peer_timeout} must be at least 5 seconds.")
    if place is None:
        return
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            local_device_ids=place.local_devices,
            cluster_detection_method="deactivate",  # everything is known
            heartbeat_timeout_seconds=peer_timeout,
        )
    except (RuntimeError, ValueError) as error:  # JaxRuntimeError among them
        raise ConfigError(
            f"process {place.index} of {place.count} did not meet the others at {place.coordinator}: {str(error).splitlines()[0]}"
        ) from error
    _speak_when_aborted(peer_timeout)


def count() -> int:
    """Processes of the run; unlike `jax.process_count` it may be asked before the devices are."""
    return distributed.global_state.num_processes if jax.distributed.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that speaks and writes; may be asked before the devices are."""
    return not jax.distributed.is_initialized() or distributed.global_state.process_id == 0


def say(text: str) -> None:
    """Prints `text`, once a run."""
    if first():
        print(text)


def agree(facts: Mapping[str, object]) -> None:
    """Returns when all processes have called it with equal facts; each is compared by its `repr`.

    Raises:
      ConfigError: process 0 has another one; the first is named, with both values where they are short.
    """
    if count() == 1:
        return
    client, texts = distributed.global_state.client, {name: repr(value) for name, value in facts.items()}
    for number, (name, text) in enumerate(texts.items()):
        key = f"moe_jax/agree/{_digest(','.join(texts))}/{number}"
        said = text if len(text) < 200 else _digest(text)
        if first():
            client.key_value_set(key, said)
        theirs = client.blocking_key_value_get(key, _AGREE_TIMEOUT * 1000)
        if theirs != said:
            raise ConfigError(
                f"{name} is {said} in process {distributed.global_state.process_id} and {theirs} in process 0; all processes need the"
                " same command, data and workdir (on a disk that they share)."
            )
    client.wait_at_barrier(f"moe_jax/agreed/{_digest(','.join(texts))}", _AGREE_TIMEOUT * 1000)


def connect(mesh: jax.sharding.Mesh) -> None:
    """Has CPU processes open gloo's connections, one after the other, for every group of devices that a collective may span on `mesh`.

    Gloo gives the others 30 seconds to appear, and a program takes one process longer to compile than another. Once they are connected
    they wait for each other for half an hour. Each of the programs here is one sum, compiled before all meet.
    """
    if count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    several = [axis for axis, size in mesh.shape.items() if size > 1]
    for axes in (axes for n in range(1, len(several) + 1) for axes in itertools.combinations(several, n)):
        devices = math.prod(
            mesh.shape[axis] for axis in axes
        )  # one number on each of them, so that one collective spans them all
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axes))
        ones = jax.make_array_from_callback((devices,), sharding, lambda _: np.ones(1))
        program = jax.jit(jnp.sum).lower(ones).compile()
        distributed.global_state.client.wait_at_barrier(f"moe_jax/connect/{axes}", _AGREE_TIMEOUT * 1000)
        jax.block_until_ready(program(ones))


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def ending(peer_timeout: int = PEER_TIMEOUT) -> Iterator[None]:
    """Ends the process at once when what is inside fails and others wait for it: JAX's own way out would have it wait for them.

    A collective whose other end is gone fails here before JAX knows why, so an error of JAX gets `peer_timeout` seconds to be explained.
    Does nothing for a process alone, and lets pass what all processes reach together: an exit of status 0 or None, and an error with an
    `exit_status` of its own, such as that of a run that was told to stop and has saved.
    """
    try:
        yield
    except BaseException as error:
        if count() == 1 or hasattr(error, "exit_status") or (isinstance(error, SystemExit) and error.code in (0, None)):
            raise
        status = _report(error)
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(peer_timeout + 10)  # when a process is gone, `_speak_when_aborted` ends the wait
        _meet_at_the_door()
        _leave(status)


def _report(error) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, RefusalError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def _meet_at_the_door():
    """Waits for processes that fail for the same reason, which would take this one's end for their own; not long for those that do not."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.global_state.client.wait_at_barrier("moe_jax/failed", 10_000)
        if first():
            time.sleep(1)  # the others' ends must not be aborted by that of their service


def _leave(status):
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _speak_when_aborted(peer_timeout):
    """JAX's client ends the process with abort(3) once another is gone. Python can only be told of that by a handler set in C.

    (The client takes a callback, but jaxlib 0.10.2 cannot pass it the status: std::bad_cast.)
    """
    client, index, total = distributed.global_state.client, distributed.global_state.process_id, count()

    def ask(answers):
        try:
            client.key_value_try_get("moe_jax/nothing")
            answers.append(True)
        except Exception as error:
            answers.append("NOT_FOUND" in str(error))

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(_):
        answers: list[bool] = []  # whether the service still speaks with this process: then it is not why
        asking = threading.Thread(target=ask, args=(answers,), daemon=True)
        asking.start()
        asking.join(2)
        if answers and answers[0]:
            return  # abort(3) goes on
        print(
            f"error: another process of this run of {total} is gone, or was not heard of for {peer_timeout} seconds (named above; see"
            f" its own output); process {index} stops. Start all again: the run goes on from its last checkpoint.",
            file=sys.stderr,
        )
        _leave(RUN_AGAIN)

    global _ON_ABORT
    _ON_ABORT = on_abort  # C keeps no reference
    ctypes.CDLL(None).signal(signal.SIGABRT, on_abort)


_ON_ABORT = None
