"""FLOPs read off the jaxpr against the closed form of `sizes`, which knows no jaxpr."""

import dataclasses
import functools
import math

import jax
import pytest
import tiny

from moe_jax.config import AttentionConfig
from moe_jax.plan import moved, program, topology, work
from moe_jax.sizes import flops_per_token

LATENT = AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=4, kv_rank=8, q_rank=12, rope_head_dim=4, v_head_dim=4)
NO_LOSSES = {"balance_loss_weight": 0.0, "z_loss_weight": 0.0}  # for whose sake a pass counts loads first
WINDOWED = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, window=4, full_every=3)


def config(mesh, **changes):
    made = tiny.config("mixtral", mesh, **changes)
    return dataclasses.replace(made, train=dataclasses.replace(made.train, observe=False))  # whose probe routes once more


CASES = {  # name: (topology, config); between them every mesh axis, both platforms' kernels and the CPU's loop
    "experts over 4, kernel": ("v5p:2x2x2", config("data 2 expert 4")),
    "experts over 4, loop over blocks": ("cpu:8", config("data 2 expert 4")),
    "fsdp and tensor, all done again": ("h100:1x8", config("fsdp 2 expert 2 tensor 2", remat="full")),
    "dense, windows in two of three layers": ("cpu:8", config("data 8", num_experts=0, model={"attention": WINDOWED})),
    "capacity buffers, accumulated, latent attention": (
        "v5p:2x2x2",
        config("expert 8", accumulation=2, dispatch="capacity", capacity_factor=1.0, **NO_LOSSES, model={"attention": LATENT}),
    ),
}


@functools.cache
def traced(case):
    text, made = CASES[case]
    where = topology.parse(text)
    return program.trace(made, topology.abstract_mesh(made, where))


def everywhere(case, **kwargs):
    """FLOPs of all devices by part and phase, what the tensor axis does twice (routers) taken off."""
    step = traced(case)
    table = work.flops(work.products(step), **kwargs)
    devices = math.prod(step.mesh.shape.values())
    return {
        part: {phase: devices * n / (step.mesh.shape["tensor"] if part == "router" else 1) for phase, n in row.items()}
        for part, row in table.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_every_device_together_does_what_the_closed_form_says(case):
    made = CASES[case][1]
    length, tokens = made.data.seq_len, made.data.batch_size * made.data.seq_len
    # A block of queries sees all keys up to its end, and rows this short are one block: as if the mean context were the whole row.
    unwindowed = dataclasses.replace(made.model.attention, window=0, full_every=0)
    closed = flops_per_token(dataclasses.replace(made.model, attention=unwindowed), 2 * length - 1) * tokens
    done = everywhere(case)
    assert sum(row["forward"] for row in done.values()) == closed
    assert sum(row["backward"] for row in done.values()) == 2 * closed


def test_each_part_on_its_own():
    D, F, V, T, S = 16, 8, 64, 32 * 8, 8
    forward = {part: row["forward"] / (2 * T) for part, row in everywhere("experts over 4, kernel").items()}
    assert forward == {
        "attention projections": 3 * D * 4 * (4 + 2 + 2 + 4),
        "attention scores": 3 * 2 * S * 4 * 4,
        "router": 2 * D * 8,
        "experts": 2 * 2 * 3 * D * F,  # two layers, two experts a token, three matrices
        "dense and shared": 3 * D * 24 + 2 * 3 * D * F,
        "head": D * V,
    }


def test_a_window_is_counted_in_the_layers_that_have_one():
    """Rows of 128 tokens are two blocks of 64 queries. The first sees 64 keys in every layer; the second 128, or with a window of 4 the 67
    that any of its queries may see. One layer of three has no window."""
    made = dataclasses.replace(
        CASES["dense, windows in two of three layers"][1], data=tiny.DataConfig(seq_len=128, batch_size=8)
    )
    step = program.trace(made, topology.abstract_mesh(made, topology.parse("cpu:8")))
    pairs = 2 * 64 * (64 + 67) + 64 * (64 + 128)
    assert (
        work.flops(work.products(step))["attention scores"]["forward"] == 2 * 2 * 4 * 4 * pairs
    )  # FLOPs, products, heads, width


def test_what_is_done_again():
    plain, again = everywhere("experts over 4, kernel"), everywhere("fsdp and tensor, all done again")
    assert {part: row["again"] for part, row in plain.items() if row["again"]} == {
        "attention scores": plain["attention scores"]["forward"] / 2  # queries by keys, not weights by values
    }
    for part in ("attention projections", "router", "experts"):
        assert again[part]["again"] == again[part]["forward"]
    assert again["attention scores"]["again"] == 1.5 * again["attention scores"]["forward"]
    assert again["head"]["again"] == 0


@pytest.mark.parametrize("case", ["experts over 4, kernel", "experts over 4, loop over blocks"])
def test_the_worst_load_fills_the_buffers(case):
    """Four devices may all send their 32 tokens' 2 choices to one of them: four times the balanced load, and again what each of its 2
    experts has to itself."""
    balanced, worst = (everywhere(case, worst=worst) for worst in (False, True))
    assert worst["experts"]["forward"] == 4 * balanced["experts"]["forward"]
    assert {part: row for part, row in worst.items() if part != "experts"} == {
        part: row for part, row in balanced.items() if part != "experts"
    }


def test_kernel_and_loop_count_alike():
    assert everywhere("experts over 4, kernel") == everywhere("experts over 4, loop over blocks")


def test_the_optimizer_moves_its_state():
    """AdamW reads parameter, two moments and gradient and writes the first three, in float32; the norm of the gradients reads them once
    more, and the copies for a step that is skipped nothing."""
    step = traced("dense, windows in two of three layers")
    held = sum(x.size // math.prod(step.mesh.shape[a] for a in _axes(x)) for x in jax.tree.leaves(step.state.params))
    moves = {move.part: move.bytes for move in moved.moves(step)}
    assert 28 * held <= moves["optimizer"] <= 1.5 * 32 * held


def _axes(array):
    return [axis for axes in array.sharding.spec for axis in ((axes,) if isinstance(axes, str) else axes or ())]
