"""Meshes of devices that are not there, for their own compilers: TPUs by libtpu, NVIDIA's GPUs by JAX's CUDA plugin without a GPU."""

import importlib.util
import os

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType

from moe_jax import validation
from moe_jax.config import Config, ConfigError
from moe_jax.mesh import AXES
from moe_jax.plan.topology import Topology

NEEDS = {"tpu": ("libtpu", "jax[tpu]"), "gpu": ("jax_cuda13_plugin", "jax-cuda13-plugin")}


def device_mesh(config: Config, topology: Topology) -> jax.sharding.Mesh:
    """The mesh of `config` on devices of `topology`, to trace and compile for; nothing can run on it.

    Raises:
      ConfigError: the compiler's package is not installed, there is none for this platform, or mesh and devices do not fit.
    """
    platform = topology.chip.platform
    if platform not in NEEDS:
        raise ConfigError(f"topology = {topology.text!r} has no compiler of its own to ask; use --depth=jaxpr.")
    package, requirement = NEEDS[platform]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"--depth={platform} needs {package}: pip install '{requirement}=={jax.__version__}', the version of the jax that is installed."
        )
    shape = validation.check_devices(config, topology.num_devices)
    devices = _tpus(topology, shape) if platform == "tpu" else _gpus(topology).reshape(shape)
    return jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _tpus(topology, shape):
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is opened, so that several processes may compile at once
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to ask
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{topology.chip.name}-8")
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology.text)
    return mesh_utils.create_device_mesh(shape, described.devices, allow_split_physical_axes=True)


def _gpus(topology):
    hosts, gpus = topology.shape
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name=topology.chip.name,
        target_config=GPU_TARGETS[topology.chip.name],
        topology=f"1x{hosts}x{gpus}",  # of one slice
    )
    return np.array(described.devices)


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
