"""Rows that the buffers of one MoE layer's exchange hold: as they are, at the worst load, and at the expected one."""

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_jax.config import Config, MoEConfig
from moe_jax.dispatch import Group
from moe_jax.exchange.room import Traffic, copies
from moe_jax.mesh import EXPERT_AXES
from moe_jax.routing import make_router
from moe_jax.routing.contract import Tokens


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
      expected: what is full of them when tokens go to all experts evenly; None for a router whose lists have places that are no choices,
        as some tokens take fewer experts.
    """

    static: Rows
    worst: Rows
    expected: Rows | None


def buffers(config: Config, num_devices: int) -> Buffers | None:
    """Those of one MoE layer and one microbatch, its chunks together.

    None for a model or mesh without an exchange of tokens, and for a router that is no token choice, whose lists the batch decides.
    """
    moe = config.model.moe
    sizes = [getattr(config.mesh, axis) for axis in EXPERT_AXES if getattr(config.mesh, axis) > 1]
    if not config.model.num_moe_layers or not sizes or moe.exchange not in ("auto", "all_to_all", "ragged"):
        return None
    if (choices := _choices(config)) is None:
        return None
    split = num_devices // config.mesh.tensor
    tokens = config.data.batch_size * config.data.seq_len // (split * config.train.accumulation)
    width = config.model.d_model * jnp.dtype(config.model.dtype).itemsize
    unbounded = dataclasses.replace(moe, exchange_factor=0.0)
    about = sizes, tokens, choices, width
    every_place = make_router(moe.router, moe.num_experts).active_experts == choices
    return Buffers(_rows(moe, *about), _rows(unbounded, *about), _expected(moe, *about) if every_place else None)


def _choices(config) -> int | None:
    """Choices of each token in a router's list; None where that is no fixed number."""
    router = make_router(config.model.moe.router, config.model.moe.num_experts)
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in router.params(config.model.d_model).items()}

    def route(x_TD, params):
        place_T = jnp.arange(len(x_TD), dtype=jnp.int32)
        noise_key = jax.random.key(0) if router.uses_noise else None
        tokens = Tokens(x_TD, place_T >= 0, place_T, place_T, noise_key, training=True)
        return router(tokens, params, router.init_state())

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        x_TD = jax.ShapeDtypeStruct((max(64, config.model.moe.num_experts), config.model.d_model), jnp.float32)
        return jax.eval_shape(route, x_TD, params).choices


def _levels(moe: MoEConfig, sizes, tokens, choices, rows_of):
    """Each level's traffic from the outside in; `rows_of` says how many rows arrive there."""
    experts = moe.num_experts
    group = Group(math.prod(sizes) * tokens, choices, experts)
    length = tokens * choices
    for level, peers in enumerate(sizes):
        traffic = Traffic(group, tokens, length, experts, peers, math.prod(sizes[level + 1 :]), choices)
        yield traffic
        tokens, once = rows_of(traffic), traffic.sends_once(moe)
        choices = choices if once else 1
        length, experts = tokens * choices, traffic.num_local


def _rows(moe, sizes, tokens, choices, width) -> Rows:
    sent = arrived = computed = 0
    for traffic in _levels(moe, sizes, tokens, choices, lambda traffic: traffic.rows(moe)[1]):
        sending, arriving = traffic.rows(moe)
        sent, arrived = sent + sending, arrived + arriving
        computed = traffic.expert_rows(moe) or arriving
    return Rows(sent, arrived, computed, (sent + arrived) * width)


def _expected(moe, sizes, tokens, choices, width) -> Rows:
    """Of balanced load, the rows that are full: what the group sends to one device's experts, shared by the levels within."""

    def arriving(traffic, once):
        return math.ceil(traffic.group.num_tokens * copies(traffic.group, traffic.num_local, once) / traffic.share)

    sent = arrived = computed = 0
    for traffic in _levels(moe, sizes, tokens, choices, lambda traffic: arriving(traffic, traffic.sends_once(moe))):
        rows = arriving(traffic, traffic.sends_once(moe))
        sent, arrived, computed = sent + rows, arrived + rows, arriving(traffic, False)
    return Rows(sent, arrived, computed, (sent + arrived) * width)
