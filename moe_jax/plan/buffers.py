"""Rows that the buffers of one MoE layer's exchange hold: as they are, at the worst load, and at the expected one."""

import dataclasses
import math
from dataclasses import dataclass

import jax.numpy as jnp

from moe_jax.config import Config, MoEConfig
from moe_jax.dispatch import Group
from moe_jax.exchange.room import Traffic, copies
from moe_jax.mesh import EXPERT_AXES
from moe_jax.routing import make_router


@dataclass(frozen=True)
class Rows:
    """Rows of one device, summed over the levels of the exchange.

    Attributes:
      sent: of the senders' buffers.
      arrived: of the receivers'.
      computed: that the experts are given, of the innermost level.
      bytes: of `sent` and `arrived` together, each way, in the compute dtype.
    """

    sent: int
    arrived: int
    computed: int
    bytes: int


@dataclass(frozen=True)
class Buffers:
    """Shapes are static: there is room for the worst load unless `model.moe.exchange_factor` bounds it. How much of it is full is
    another matter.

    Attributes:
      static: as the program has them.
      worst: for any load at all (`exchange_factor = 0`).
      expected: what is full of them when tokens go to all experts evenly.
    """

    static: Rows
    worst: Rows
    expected: Rows


def buffers(config: Config, num_devices: int) -> Buffers | None:
    """Those of one MoE layer and one microbatch, its chunks together.

    None for a model or mesh without an exchange of tokens, and for a router that is no token choice, whose lists the batch decides.
    """
    moe = config.model.moe
    sizes = [getattr(config.mesh, axis) for axis in EXPERT_AXES if getattr(config.mesh, axis) > 1]
    if not config.model.num_moe_layers or not sizes or moe.exchange not in ("auto", "all_to_all", "ragged"):
        return None
    if not make_router(moe.router, moe.num_experts).causal:
        return None
    split = num_devices // config.mesh.tensor
    tokens = config.data.batch_size * config.data.seq_len // (split * config.train.accumulation)
    width = config.model.d_model * jnp.dtype(config.model.dtype).itemsize
    unbounded = dataclasses.replace(moe, exchange_factor=0.0)
    return Buffers(_rows(moe, sizes, tokens, width), _rows(unbounded, sizes, tokens, width), _expected(moe, sizes, tokens, width))


def _levels(moe: MoEConfig, sizes, tokens, rows_of):
    """Each level's traffic from the outside in; `rows_of` says how many rows arrive there."""
    choices, experts = moe.router.top_k, moe.num_experts
    group = Group(math.prod(sizes) * tokens, choices, experts)
    length = tokens * choices
    for level, peers in enumerate(sizes):
        traffic = Traffic(group, tokens, length, experts, peers, math.prod(sizes[level + 1 :]), choices)
        yield traffic
        tokens, once = rows_of(traffic), traffic.sends_once(moe)
        choices = choices if once else 1
        length, experts = tokens * choices, traffic.num_local


def _rows(moe, sizes, tokens, width) -> Rows:
    sent = arrived = computed = 0
    for traffic in _levels(moe, sizes, tokens, lambda traffic: traffic.rows(moe)[1]):
        sending, arriving = traffic.rows(moe)
        sent, arrived = sent + sending, arrived + arriving
        computed = traffic.expert_rows(moe) or arriving
    return Rows(sent, arrived, computed, (sent + arrived) * width)


def _expected(moe, sizes, tokens, width) -> Rows:
    """Of balanced load, the rows that are full: what the group sends to one device's experts, shared by the levels within."""

    def arriving(traffic, once):
        return math.ceil(traffic.group.num_tokens * copies(traffic.group, traffic.num_local, once) / traffic.share)

    sent = arrived = computed = 0
    for traffic in _levels(moe, sizes, tokens, lambda traffic: arriving(traffic, traffic.sends_once(moe))):
        rows = arriving(traffic, traffic.sends_once(moe))
        sent, arrived, computed = sent + rows, arrived + rows, arriving(traffic, False)
    return Rows(sent, arrived, computed, (sent + arrived) * width)
