"""Devices that are not there: described, to lower for, or of a TPU, to compile for (what a program costs and whether it fits)."""

import importlib.util
import os

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType


def described_mesh(device_kind: str, platform: str, **sizes: int) -> jax.sharding.AbstractMesh:
    """A mesh with these Explicit axes of, say, ("NVIDIA H200", "cuda") or ("TPU v5", "tpu"); needs nothing installed.

    Under `jax.sharding.use_abstract_mesh` a function can be traced, and `.lower(lowering_platforms=(platform,))`.
    """
    device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=None, platform=platform)
    axis_types = (AxisType.Explicit,) * len(sizes)
    return jax.sharding.AbstractMesh((*sizes.values(),), (*sizes,), axis_types=axis_types, abstract_device=device)


def tpu_devices(name: str = "v5p:2x2x1") -> list[jax.Device]:
    """The devices of a TPU topology such as "v5p:2x2x1". A test that asks for them fails without libtpu, which the slow tier installs.

    libtpu comes with `pip install 'jax[tpu]==<the jax that is installed>'`; JAX finds it by itself, and it touches no hardware here.
    Build a mesh of them (`jax.make_mesh(..., devices=devices)`), set it, and `.lower(...).compile()`: nothing can be run.
    """
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail("compiling for a TPU needs libtpu; `bash launch/test.sh slow` installs it (the extra tpu).")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # tests run in several processes
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to ask
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{name.split(':', maxsplit=1)[0]}-8")
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
