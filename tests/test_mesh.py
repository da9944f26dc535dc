"""The mesh: its axes, its refusals, and emulated devices in a process of their own."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_jax.config import Config, ConfigError, MeshConfig
from moe_jax.mesh import AXES, BATCH_AXES, _part_of, abstract_mesh, emulate_devices, make_mesh, process_part, shard_batch


def with_mesh(**sizes):
    config = Config(mesh=MeshConfig(**sizes))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=64))


def test_axes_are_explicit_and_filled():
    mesh = make_mesh(with_mesh(expert=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "expert_outer": 1, "fsdp": 1, "expert": 2, "tensor": 2}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    assert dict(abstract_mesh(with_mesh(fsdp=64), 64).shape)["fsdp"] == 64


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"does not fit 8 devices.*mesh\.emulate"):
        make_mesh(with_mesh(data=3))


def test_batches_are_split_over_all_batch_axes():
    mesh = make_mesh(with_mesh(expert=2, tensor=2))
    batch = shard_batch(mesh, {"tokens": np.arange(8 * 3).reshape(8, 3)})["tokens"]
    assert batch.sharding.spec[0] == BATCH_AXES
    assert batch.addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(batch, np.arange(24).reshape(8, 3))
    assert mesh.axis_names == AXES


def test_emulation_that_comes_too_late_is_refused():
    emulate_devices(8)  # what the tests run with: nothing to do
    with pytest.raises(ConfigError, match=r"mesh\.emulate = 4 came too late"):
        emulate_devices(4)


def test_emulation_in_a_fresh_process():
    code = "import os; from moe_jax.mesh import emulate_devices as e; e(6); import jax; print(jax.device_count(), os.environ['NPROC'])"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).split() == [
        "6",
        "12",
    ]  # two threads a device


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        ({0: {0, 1, 2, 3}}, [(0, 1)]),
        ({0: {0, 1}, 1: {2, 3}}, [(0, 2), (1, 2)]),
        ({0: {0}, 1: {0}}, [(0, 1), (0, 1)]),  # the tensor axis goes from process to process
        ({0: {0}, 1: {0}, 2: {1}, 3: {1}}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ({0: {0, 2}, 1: {1, 3}}, [(0, 2), (1, 2)]),
    ],
)
def test_processes_read_the_rows_of_their_devices(shards, expected):
    assert [_part_of(shards, process) for process in shards] == expected


@pytest.mark.parametrize("shards", [{0: {0, 1}, 1: {1, 2}}, {0: {0, 1}, 1: {2}}])
def test_rows_that_overlap_in_part_are_refused(shards):
    with pytest.raises(ConfigError, match="the rows of a batch do not divide over the 2 processes"):
        _part_of(shards, 0)


def test_a_process_alone_reads_all_rows():
    assert process_part(make_mesh(with_mesh(data=2, expert=2, tensor=2))) == (0, 1)
