"""The compilers of devices that are not there: TPUs' by libtpu, NVIDIA's GPUs' by JAX's CUDA plugin without a GPU. Nothing can run."""

import dataclasses
import importlib.util
import os
import re
import time
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType

from moe_jax import validation
from moe_jax.config import Config, ConfigError
from moe_jax.mesh import AXES
from moe_jax.plan import program
from moe_jax.plan.topology import Topology

NEEDS = {"tpu": ("libtpu", "jax[tpu]"), "gpu": ("jax_cuda13_plugin", "jax-cuda13-plugin")}
QUICK = {"exec_time_optimization_effort": -1.0}  # XLA:TPU's compile time to about a half, with the same collectives

UNKNOWN = {
    "jaxpr": (
        "No compiler was asked: temporaries are estimated by rules (plan/liveness.py), within some 15 %.",
        "Neither the program's code nor fragmentation is counted, nor what a compiler computes twice when memory runs out.",
        "Arrays are counted as they are, not as a chip pads them (TPUs store tiles of 8 x 128 numbers).",
        "Attention is XLA's: on a GPU with cuDNN its scores would not be stored.",
    ),
    "gpu": (
        "This compiler refuses nothing: its bytes were compared with the card's memory, of which CUDA, NCCL and JAX's own allocator"
        " (XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75 unless set) leave less.",
        "There was no GPU to tune on: kernels and their workspaces are XLA's first guess.",
        "There was no cuDNN: attention is compiled as XLA's and not as the fused kernel, which stores no scores.",
        "Registers and shared memory of the kernels are not proven.",
    ),
    "tpu": (
        "The chip's memory is what the compiler has it for; other programs on the chip and the runtime take theirs off.",
        "Success is the criterion: the sum of arguments, results, temporaries and code leaves fragmentation out.",
    ),
}


@dataclass(frozen=True)
class Verdict:
    """A compiler's own account of a step; bytes of one device.

    Attributes:
      depth: "gpu" or "tpu".
      fits: whether the step fits: on a TPU whether it compiled, on a GPU whether `total` is within `memory`.
      arguments: the state and the batch.
      outputs: that take no argument's place.
      temporaries: at the worst moment.
      code: the program itself.
      peak: arguments and what is alive beside them at the worst moment, as the compiler has it: without code and gaps. 0 if refused.
      total: arguments, outputs, temporaries and code, the careful figure. XLA:TPU's temporaries can be more than the chip has and the
        program fits all the same; of a program that was refused what the compiler says it needs, 0 if it does not say.
      memory: of the device.
      refusal: the compiler's first line if it refused, else empty.
      seconds: that compiling took.
      unknown: what this depth cannot know, in sentences.
      compiled: the program; None if it was refused.
    """

    depth: str
    fits: bool
    arguments: int
    outputs: int
    temporaries: int
    code: int
    peak: int
    total: int
    memory: int
    refusal: str
    seconds: float
    unknown: tuple[str, ...]
    compiled: jax.stages.Compiled | None = dataclasses.field(repr=False)


def verdict(step: program.Step, topology: Topology, *, quick: bool = False) -> Verdict:
    """Compiles a step that was traced on `device_mesh(config, topology)` for these devices, and says whether it fits.

    Args:
      step: as `program.trace` makes it.
      topology: the devices.
      quick: spares a TPU's compiler part of its effort, with the same collectives.

    Raises:
      jax.errors.JaxRuntimeError: the compiler fails for another reason than memory.
    """
    depth, start = topology.chip.platform, time.perf_counter()
    options = QUICK if quick and depth == "tpu" else {}
    numbers = dict.fromkeys(("arguments", "outputs", "temporaries", "code", "peak"), 0)
    compiled, refusal, needed = None, "", 0
    try:
        compiled = program.compile_step(step, **options)
    except jax.errors.JaxRuntimeError as error:
        if not (refusal := refused_for_memory(str(error))):
            raise
        needed = needed_bytes(refusal)
    if compiled is not None:
        numbers = account(compiled)
        needed = sum(numbers.values()) - numbers["peak"]
    fits = not refusal and (depth == "tpu" or needed <= topology.chip.memory)
    seconds = time.perf_counter() - start
    return Verdict(
        depth,
        fits,
        **numbers,
        total=needed,
        memory=topology.chip.memory,
        refusal=refusal,
        seconds=seconds,
        unknown=UNKNOWN[depth],
        compiled=compiled,
    )


def account(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of one device by part: `Verdict`'s arguments, outputs (less what takes an argument's place), temporaries, code and peak."""
    stats = compiled.memory_analysis()
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0),
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
    }


def refused_for_memory(message: str) -> str:
    """The first line of a compiler's message that says that the program does not fit; empty if it says something else."""
    return message.strip().splitlines()[0] if "RESOURCE_EXHAUSTED" in message else ""


def needed_bytes(refusal: str) -> int:
    """What a refusal says that the program needs, its figures being in GiB ("Used 98.10G of 95.74G hbm"); 0 if it does not say."""
    found = re.search(r"(?:Used|required for HLO temporaries \(|Total hbm usage >=) ?([\d.]+)([KMGT])", refusal)
    return round(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]]) if found else 0


def device_mesh(config: Config, topology: Topology) -> jax.sharding.Mesh:
    """The mesh of `config` on devices of `topology`, to trace and compile for.

    Raises:
      ConfigError: as `devices`, or mesh and devices do not fit.
    """
    shape = validation.check_devices(config, topology.num_devices)
    found = devices(topology)
    if topology.chip.platform == "tpu":  # topologies.make_mesh splits no physical axis
        placed = mesh_utils.create_device_mesh(shape, found, allow_split_physical_axes=True)
    else:
        placed = np.array(found).reshape(shape)
    return jax.sharding.Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def devices(topology: Topology) -> list[jax.Device]:
    """The devices of a topology, in its order.

    Raises:
      ConfigError: the compiler's package is not installed, there is none for this platform, or it has other devices.
    """
    platform = topology.chip.platform
    if platform not in NEEDS:
        raise ConfigError(f"topology = {topology.text!r} has no compiler of its own to ask; use --depth=jaxpr.")
    package, requirement = NEEDS[platform]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"--depth={platform} needs {package}: pip install '{requirement}=={jax.__version__}', the version of the jax that is installed."
        )
    described = _tpus(topology) if platform == "tpu" else _gpus(topology)
    if len(described) != topology.num_devices:  # libtpu has the two cores of a v4 apart, a v4 itself shows them as one
        raise ConfigError(
            f"topology = {topology.text!r} is {topology.num_devices} devices, and its compiler describes {len(described)}; use"
            " --depth=jaxpr."
        )
    return described


def _tpus(topology):
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is opened, so that several processes may compile at once
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to ask
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{topology.chip.name}-8")
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.text).devices)


def _gpus(topology):
    hosts, gpus = topology.shape
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name=topology.chip.name,
        target_config=GPU_TARGETS[topology.chip.name],
        topology=f"1x{hosts}x{gpus}",  # of one slice
    )
    return list(described.devices)


def _hopper(description, memory, bandwidth):
    """XLA's description of a Hopper GPU (openxla, xla/backends/gpu/target_config/specs/h100_sxm.txtpb has the fields)."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{description}"
"""


GPU_TARGETS = {
    "h100": _hopper("NVIDIA H100 80GB HBM3", 80 * 10**9, 3352320000000),
    "h200": _hopper("NVIDIA H200", 141 * 10**9, 4800000000000),
}
