"""A step under measured routing instead of perfect balance: what imbalance costs in time, and what fixed buffers would buy and drop.

In every layer all devices wait for the one whose experts got most rows (the next exchange, or the next gather of parameters, needs them
all), so a layer's experts take the slowest device's rows over the mean times as long. A ragged exchange waits for the device that sends or
receives most rows; one of fixed buffers takes the same time whatever the routing, and so does a gather. Only the matrix units' share of
the experts' time goes with the rows: buffers are cleared and passed over whole.

Routing comes from a record (docs/routing_record.md), which says which device sent what to whom; or from loads alone, [steps, L, E], as
training logs them (`router/load`), taken to be the same on all devices.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_jax.config import Config, ConfigError
from moe_jax.dispatch.capacity import Group, capacity
from moe_jax.exchange.room import Traffic
from moe_jax.mesh import BATCH_AXES, EXPERT_AXES
from moe_jax.plan.roofline import Prediction
from moe_jax.routing import make_router
from moe_jax.train.routing_log import RoutingLog

FACTORS = (1.0, 1.25, 1.5, 2.0)


@dataclass(frozen=True)
class Routed:
    """Who sent how much to whom. N microbatches (of all steps), L layers, G groups of devices that share E experts, P devices of a group.

    Attributes:
      rows_NLGPE: assignments from each device to each expert.
      tokens_NLGPQ: tokens of device P with an expert on device Q: the rows that travel where tokens are sent once.
    """

    rows_NLGPE: np.ndarray
    tokens_NLGPQ: np.ndarray

    @property
    def received_NLGQ(self) -> np.ndarray:
        """Rows of each device's experts."""
        *head, P, E = self.rows_NLGPE.shape
        return self.rows_NLGPE.reshape(*head, P, P, E // P).sum(axis=(-3, -1))


@dataclass(frozen=True)
class Buffers:
    """What fixed buffers would do.

    Attributes:
      name: "capacity_factor" or "exchange_factor".
      factor: its value.
      seconds: of a step.
      dropped: fraction of all assignments.
    """

    name: str
    factor: float
    seconds: float
    dropped: float


@dataclass(frozen=True)
class Simulation:
    """A step under measured routing.

    Attributes:
      balanced: seconds of a step at perfect balance.
      seconds: under the routing, mean over steps.
      slowest: seconds of the slowest step (microbatch, where they are accumulated).
      experts_L: by layer, the slowest device's rows over the mean, mean over steps.
      exchange_L: the same of rows sent or received, whichever is more; 1 where the exchange does not depend on routing.
      buffers: what fixed buffers would do, by factor.
    """

    balanced: float
    seconds: float
    slowest: float
    experts_L: tuple[float, ...]
    exchange_L: tuple[float, ...]
    buffers: tuple[Buffers, ...]


def from_record(path: str | os.PathLike, config: Config, sizes: dict[str, int]) -> Routed:
    """The routing of a record's training steps (of all its batches where it has none), as a mesh of these axis sizes would send it.

    Raises:
      RecordError: no record, or a damaged one.
      ConfigError: a record of other experts or layers, or of batches that the mesh does not divide.
    """
    log, moe = RoutingLog(path), config.model.moe
    if (log.header.num_experts, len(log.header.layers)) != (moe.num_experts, config.model.num_moe_layers):
        raise ConfigError(
            f"record {str(path)!r} has {len(log.header.layers)} layers of {log.header.num_experts} experts, and model.num_layers and"
            f" model.moe.num_experts make {config.model.num_moe_layers} of {moe.num_experts}; plan for the config it was recorded with."
        )
    keys = [key for key in log.keys if key.startswith("train/")] or log.keys
    return _routed(np.stack([log.read(key).choice_BSLM for key in keys]), config, sizes)


def from_loads(load_SLE: np.ndarray, config: Config, sizes: dict[str, int]) -> Routed:
    """The same of loads alone, [steps, L, E]: every device sends its equal share of each expert's load, and no token has two experts on
    a device, so that what imbalance costs between devices of one kind is a lower bound.

    Raises:
      ConfigError: other numbers of layers or experts than the config's.
    """
    expected = config.model.num_moe_layers, config.model.moe.num_experts
    if load_SLE.ndim != 3 or load_SLE.shape[1:] != expected:
        raise ConfigError(
            f"loads of shape {load_SLE.shape} are not [steps, {expected[0]}, {expected[1]}]; give the config's own."
        )
    groups, devices = _groups(sizes)
    shape = (*load_SLE.shape[:2], groups, devices, load_SLE.shape[2])
    rows = np.broadcast_to(load_SLE[:, :, None, None] / (groups * devices * config.train.accumulation), shape)
    return Routed(rows, rows.reshape(*shape[:4], devices, -1).sum(axis=-1))


def simulate(
    prediction: Prediction, routed: Routed, config: Config, sizes: dict[str, int], factors: Sequence[float] = FACTORS
) -> Simulation:
    """Time of a step that was predicted at perfect balance, under `routed`, and with fixed buffers of each of `factors`.

    Args:
      prediction: of `config` on a mesh of `sizes`.
      routed: `from_record` or `from_loads`, of the same config and sizes.
      config: of the step.
      sizes: of the mesh axes by name.
      factors: capacity and exchange factors to try.
    """
    experts = _slowest(routed.received_NLGQ)
    exchange = _exchange_slowdown(routed, config)
    seconds_N = _seconds(prediction, experts.mean(axis=1), exchange.mean(axis=1))
    tried = [_with_capacity(prediction, routed, config, factor) for factor in factors]
    if _groups(sizes)[1] > 1 and config.model.moe.exchange in ("auto", "all_to_all", "ragged"):
        tried += [_with_room(prediction, routed, config, sizes, factor) for factor in factors]
    return Simulation(
        prediction.seconds,
        float(seconds_N.mean()),
        float(seconds_N.max()),
        tuple(experts.mean(axis=0).tolist()),
        tuple(exchange.mean(axis=0).tolist()),
        tuple(tried),
    )


def _routed(choice_XBSLM, config, sizes):
    """Of X batches; as `train.step.split`, microbatch m has rows m, m + count, ..., and devices have blocks of its rows."""
    X, B, S, L, M = choice_XBSLM.shape
    count, E, (groups, P) = config.train.accumulation, config.model.moe.num_experts, _groups(sizes)
    shards = math.prod(sizes[axis] for axis in BATCH_AXES)
    if B % (count * shards):
        raise ConfigError(
            f"a recorded batch of {B} rows cannot be split over {count} microbatches and {shards} devices; change the mesh."
        )
    by_shard = choice_XBSLM.reshape(X, shards, B // count // shards, count, S, L, M)
    order = [axis for axis in BATCH_AXES if axis not in EXPERT_AXES] + list(EXPERT_AXES)
    by_axis = by_shard.reshape(X, *(sizes[axis] for axis in BATCH_AXES), *by_shard.shape[2:])
    moved = np.transpose(by_axis, (0, *(1 + BATCH_AXES.index(axis) for axis in order), *range(5, by_axis.ndim)))
    lists = np.moveaxis(moved.reshape(X, groups, P, -1, count, S, L, M), (4, 6), (1, 2)).reshape(X * count, L, groups, P, -1, M)
    rows = np.stack([(lists == e).sum(axis=(-2, -1)) for e in range(E)], axis=-1)
    device = np.where(lists < E, lists // (E // P), P)
    tokens = np.stack([(device == q).any(axis=-1).sum(axis=-1) for q in range(P)], axis=-1)
    return Routed(rows, tokens)


def _groups(sizes):
    """(groups that share a set of experts, devices of one)."""
    devices = math.prod(sizes[axis] for axis in EXPERT_AXES)
    return math.prod(sizes[axis] for axis in BATCH_AXES) // devices, devices


def _slowest(rows_NLGQ):
    """The most of any device over the mean of all, [N, L]; 1 where nothing was routed."""
    mean = rows_NLGQ.mean(axis=(2, 3))
    return np.where(mean > 0, rows_NLGQ.max(axis=(2, 3)) / np.where(mean > 0, mean, 1), 1.0)


def _exchange_slowdown(routed, config):
    if config.model.moe.exchange != "ragged":
        return np.ones(routed.tokens_NLGPQ.shape[:2])
    away = _travelling(routed, config) * (1 - np.eye(routed.tokens_NLGPQ.shape[-1]))
    return np.maximum(_slowest(away.sum(axis=-1)), _slowest(away.sum(axis=-2)))


def _travelling(routed, config):
    """Rows between devices, [N, L, G, P, Q]."""
    *head, P, E = routed.rows_NLGPE.shape
    if config.model.moe.send_once and E > P:
        return routed.tokens_NLGPQ
    return routed.rows_NLGPE.reshape(*head, P, P, E // P).sum(axis=-1)


def _seconds(prediction, experts, exchange):
    """The step's seconds with experts and exchange so many times as slow."""
    part = prediction.parts.get("experts")
    sent = sum(seconds for (_, what), seconds in prediction.network.items() if what == "exchange")
    return prediction.seconds + (part.matrix if part else 0.0) * (experts - 1) + sent * (exchange - 1)


def _with_capacity(prediction, routed, config, factor):
    """Every expert computes its whole buffer, full or not; what is beyond is dropped."""
    load_NLGE = routed.rows_NLGPE.sum(axis=3)
    tokens, choices = _tokens(routed, config)
    moe = config.model.moe
    rows = capacity(tokens, choices, moe.num_experts, factor)
    dropped = np.maximum(load_NLGE - rows, 0).sum() / max(load_NLGE.sum(), 1)
    computed = rows * moe.num_experts / (tokens * choices)
    return Buffers("capacity_factor", factor, float(_seconds(prediction, computed, 1.0)), float(dropped))


def _with_room(prediction, routed, config, sizes, factor):
    """Buffers of each pair of devices hold `factor` times the balanced rows; those the config has now are what `prediction` sends."""
    now, moe = config.model.moe, dataclasses.replace(config.model.moe, exchange="all_to_all", exchange_factor=factor)
    tokens, choices = _tokens(routed, config)
    P = _groups(sizes)[1]
    group = Group(tokens, choices, moe.num_experts)
    traffic = Traffic(group, tokens // P, round(tokens * choices / P), moe.num_experts, P, 1, int(choices))
    per_pair = traffic.rows(moe)[0] // P
    sent = _travelling(routed, config)
    kept_NLGPQ = np.minimum(sent, per_pair) / np.maximum(sent, 1)
    *head, _, E = routed.rows_NLGPE.shape
    kept_NLGQ = (routed.rows_NLGPE.reshape(*head, P, P, E // P).sum(axis=-1) * kept_NLGPQ).sum(axis=-2)
    kept_NLGQ = np.minimum(kept_NLGQ, traffic.expert_rows(moe) or np.inf)
    total = routed.rows_NLGPE.sum()
    experts = (kept_NLGQ.max(axis=(2, 3)) / routed.received_NLGQ.mean(axis=(2, 3)).clip(1e-9)).mean()
    rows_now = traffic.rows(now)[0] if now.exchange != "ragged" else sent.sum(axis=-1).mean()
    exchange = traffic.rows(moe)[0] / rows_now
    return Buffers(
        "exchange_factor", factor, float(_seconds(prediction, experts, exchange)), float(1 - kept_NLGQ.sum() / max(total, 1))
    )


def _tokens(routed, config):
    """(tokens of a group in a microbatch, choices of each)."""
    groups = routed.rows_NLGPE.shape[2]
    tokens = config.data.batch_size * config.data.seq_len // config.train.accumulation // groups
    return tokens, make_router(config.model.moe.router, config.model.moe.num_experts).active_experts
