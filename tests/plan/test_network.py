"""Links under mesh axes and times of collectives, by hand."""

import math

import numpy as np
import pytest

from moe_jax.analysis.ledger import Entry
from moe_jax.config import Config, ConfigError, DataConfig, MeshConfig
from moe_jax.mesh import AXES
from moe_jax.plan import chips, network, targets, topology

GB = 1e9


def net(text, *shape, **kwargs):
    return network.Network(dict(zip(AXES, shape, strict=True)), topology.parse(text), **kwargs)


def test_every_chip_says_where_its_figures_are_from():
    for chip in chips.CHIPS.values():
        assert chip.sources
        assert chip.platform == "cpu" or (chip.flops["bfloat16"] and chip.bandwidth and chip.link)


def test_rates_by_dtype():
    v5p, h100 = chips.CHIPS["v5p"], chips.CHIPS["h100"]
    assert v5p.matrix_rate("bfloat16") == 459e12
    assert v5p.matrix_rate("float32") == pytest.approx(459e12 / 6)  # six passes of bfloat16
    assert v5p.matrix_rate("float8_e4m3fn") == 459e12  # no float8 of its own
    assert h100.matrix_rate("float8_e4m3fn") == pytest.approx(2 * h100.matrix_rate("float16"), rel=1e-3)
    assert chips.CHIPS["cpu"].matrix_rate("float32") == 0


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("v5p:4x4x8", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),  # less than a cube
        ("v6e:16x16", (True, True, False)),
        ("v6e:8x16", (False, True, False)),
        ("v5e:4x4", (False, False, False)),
    ],
)
def test_which_sides_close(text, closed):
    assert network.rings(topology.parse(text)) == closed


def test_a_ring_gathers_both_ways():
    """Four shards of 1 GB: 3 GB sent over two links of 100 GB/s, and two hops."""
    ring = net("v5p:4x4x4", 1, 1, 16, 4, 1)
    assert ring.axis_bandwidth(["expert"]) == 200 * GB
    assert ring.seconds(Entry("all-gather", ("expert",), "bfloat16", 3 * 10**9)) == pytest.approx(3 / 200 + 2e-6)
    assert ring.seconds(Entry("all-reduce", ("expert",), "bfloat16", 3 * 10**9)) == pytest.approx(3 / 200 + 4e-6)


def test_a_line_half_as_fast():
    assert net("v6e:4x4", 1, 1, 4, 4, 1).axis_bandwidth(["expert"]) == 100 * GB


def test_axes_on_two_sides_use_both():
    whole = net("v5p:4x4x4", 1, 1, 16, 4, 1)
    assert whole.axis_bandwidth(["fsdp"]) == 400 * GB
    assert whole.axis_bandwidth(["fsdp", "expert"]) == 600 * GB


def test_a_side_that_two_axes_share():
    """A mesh of 8 x 8 splits one side of 4: neighbours to the inner axis, every other chip to the outer."""
    split = net("v5p:4x4x4", 1, 1, 8, 8, 1)
    assert split.route(("expert",)).text == "ring of 4 x line of 2"
    assert split.axis_bandwidth(["expert"]) == 200 * GB + 100 * GB
    assert split.route(("fsdp",)).text == "ring of 2, 2 apart x ring of 4"
    assert split.axis_bandwidth(["fsdp"]) == 100 * GB + 200 * GB


def test_all_to_all_in_a_ring_is_a_quarter_of_the_gather():
    """Of an array of V bytes over n devices: V / (4 x 200 GB/s), where gathering it takes V / (200 GB/s)."""
    ring, whole = net("v6e:16x16", 1, 1, 16, 16, 1), 16 * 10**9
    sent = Entry("all-to-all", ("expert",), "bfloat16", whole // 16 * 15 // 16)
    assert ring.seconds(sent) == pytest.approx(whole / 4 / (200 * GB), rel=1e-3)
    assert ring.seconds(Entry("ragged-all-to-all", ("expert",), "bfloat16", sent.bytes)) == ring.seconds(sent)


def test_all_to_all_waits_for_the_longest_side():
    """4 x 4 x 8: of what half of the 128 devices hold, half crosses the middle of the long side, by 16 rings of two links each."""
    torus = net("v5p:4x4x8", 1, 1, 1, 128, 1)
    crossing = 128 / 2 / 2 / (16 * 2 * 100 * GB)
    assert torus.route(("expert",)).per_operand_byte == pytest.approx(crossing)


def test_a_permutation_uses_one_link():
    ring = net("v5p:4x4x4", 1, 1, 16, 4, 1)
    assert ring.seconds(Entry("collective-permute", ("expert",), "bfloat16", 10**9)) == pytest.approx(0.01, rel=1e-3)


def test_two_devices_of_a_chip_share_its_links():
    pair = net("tpu7x:2x2x4", 1, 1, 16, 1, 2)
    assert pair.route(("tensor",)).text == "the two halves of a chip"
    assert pair.axis_bandwidth(["tensor"]) == 600 * GB
    assert pair.axis_bandwidth(["fsdp"]) == 3 * 100 * GB / 2  # three sides, and the other half's group beside
    assert pair.axis_bandwidth(["fsdp", "tensor"]) == 3 * 100 * GB


def test_gpus_inside_a_host_and_between():
    hosts = net("h100:8x8", 1, 1, 8, 8, 1)
    assert hosts.axis_bandwidth(["expert"]) == 450 * GB
    assert hosts.axis_bandwidth(["fsdp"]) == 50 * GB
    # All 64: of a gathered byte 7/8 come from other hosts, through eight shares of the host network.
    assert hosts.axis_bandwidth(["fsdp", "expert"]) == pytest.approx((63 / 64) / (7 / 8 / (8 * 50 * GB)))
    assert hosts.route(("fsdp", "expert")).per_operand_byte == pytest.approx(7 / 8 / (50 * GB))
    assert net("h100:8x8", 1, 1, 8, 8, 1, host_bandwidth=25 * GB).axis_bandwidth(["fsdp"]) == 25 * GB


def test_refusals():
    with pytest.raises(ConfigError, match="has no links to plan with"):
        net("cpu:8", 1, 1, 1, 8, 1)
    with pytest.raises(ConfigError, match="make them agree"):
        net("h100:8x8", 1, 1, 8, 4, 1)


@pytest.mark.slow
def test_meshes_lie_as_the_compiler_lays_them():
    """libtpu's devices against ours, which needs no libtpu."""
    for text, mesh in (
        ("v5p:4x4x4", MeshConfig(data=1, fsdp=8, expert=8)),
        ("v5p:4x4x8", MeshConfig(data=2, fsdp=8, expert=4, tensor=2)),
        ("v6e:4x8", MeshConfig(data=1, fsdp=4, expert=8)),
        ("v5e:2x4", MeshConfig(data=1, fsdp=2, expert=4)),
        ("tpu7x:4x4x4", MeshConfig(data=1, fsdp=16, expert=8)),
    ):
        where = topology.parse(text)
        devices = targets.device_mesh(Config(mesh=mesh, data=DataConfig(batch_size=256)), where).devices
        theirs = np.array([(*device.coords, device.core_on_chip) for device in devices.flat]).reshape(*mesh.shape, 4)
        assert np.array_equal(network.places(mesh.shape, where), theirs), text
        assert len(np.unique(theirs.reshape(-1, 4), axis=0)) == math.prod(mesh.shape)
