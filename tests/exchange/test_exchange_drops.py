"""Who is dropped when buffers are full, exactly: the exchanges against a model of the rules in plain Python."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from claim_model import Level, deliver
from island import D, E, moe_config, run_exchange
from meshes import mesh_of
from tolerance import assert_close

T = 12  # tokens a device


def inputs(top_k, seed=1):
    """Eight devices' tokens: a skewed popularity, a fifth of padding, and weights with many ties."""
    rng = np.random.default_rng(seed)
    popularity_E = np.array([1, 0.01, 3, 1, 1, 1, 8, 5])  # the last device is the full one: its ring starts with itself
    expert_TK = np.stack([rng.choice(E, top_k, replace=False, p=popularity_E / popularity_E.sum()) for _ in range(8 * T)])
    expert_TK[rng.random(8 * T) < 0.2] = E
    weight_TK = rng.choice([0.125, 0.25, 0.5, 0.75], expert_TK.shape).astype(np.float32)
    x_TD = rng.uniform(1.0, 2.0, (8 * T, D)).astype(np.float32)
    return x_TD, expert_TK.astype(np.int32), weight_TK


def room(factor, balanced, worst):
    """The rows of a buffer, in exact arithmetic."""
    return min(worst, math.ceil(Fraction(str(factor)) * balanced)) if factor else worst


def copies(top_k, num_local, once):
    """Rows a token sends to a device of `num_local` experts, the mean over all sets of K experts."""
    here = [sum(expert < num_local for expert in chosen) for chosen in itertools.combinations(range(E), top_k)]
    return Fraction(sum(min(count, 1) if once else count for count in here), len(here))


def rules(moe, sizes, top_k):
    """The model's levels, the rows a receiver computes, and the bytes of a row at each level; all for one chunk of tokens."""
    n, tokens = math.prod(sizes), T // moe.exchange_chunks
    levels, row_bytes, columns, num_local = [], [], top_k, E
    list_tokens, compute_rows = tokens, None  # tokens in the list of the level at hand, each with `columns` choices
    for size, inside in zip(sizes, (math.prod(sizes[i + 1 :]) for i in range(len(sizes))), strict=True):
        num_local //= size
        once = moe.send_once and columns > 1 and num_local > 1
        arriving = Fraction(n * tokens, inside) * copies(top_k, num_local, once)
        worst = list_tokens if once else list_tokens * min(columns, num_local)
        bounded = dict(peer_rows=room(moe.exchange_factor, arriving / size, worst))
        list_tokens = size * bounded["peer_rows"]
        if moe.exchange == "ragged":
            bounded = dict(receive_rows=room(moe.exchange_factor, arriving, size * worst))
            list_tokens = bounded["receive_rows"]
        levels.append(Level(size, once, **bounded))
        keys = {"position": 2, "probability": 3}[moe.capacity_priority] if moe.dispatch == "capacity" else 0
        row_bytes.append(2 * 4 * D + 4 * (2 * columns + (keys > 0) if once else 1 + keys))
        columns = columns if once else 1
        balanced = Fraction(n * tokens * top_k * num_local, E * inside)
        compute_rows = room(moe.exchange_factor, balanced, list_tokens * min(columns, num_local)) if once else None
    return levels, compute_rows if moe.dispatch == "dropless" else None, row_bytes


def predicted(moe, sizes, groups, expert_TK, weight_TK):
    """delivered_TK, counts by cause [8 devices], bytes [8], chunk after chunk and group after group of devices."""
    n, chunks, top_k = math.prod(sizes), moe.exchange_chunks, expert_TK.shape[-1]
    gathers = moe.exchange == "all_gather"
    levels, compute_rows, row_bytes = ((), None, ()) if gathers else rules(moe, sizes, top_k)
    capacity = None
    if moe.dispatch == "capacity":
        capacity = math.ceil(Fraction(str(moe.capacity_factor)) * n * (T // chunks) * top_k / E)
    expert_GNCTK, weight_GNCTK = (a.reshape(groups, n, chunks, T // chunks, top_k) for a in (expert_TK, weight_TK))
    delivered_GNCTK = np.zeros(expert_GNCTK.shape, bool)
    counts = {name: np.zeros((groups, n), int) for name in ("sender", "refused", "receiver", "capacity")}
    bytes_GN = np.full((groups, n), (n - 1) * T * (2 * 4 * D + 8 * top_k) if gathers else 0)
    for g, c in np.ndindex(groups, chunks):
        outcome = deliver(
            expert_GNCTK[g, :, c],
            weight_GNCTK[g, :, c],
            num_experts=E,
            levels=levels,
            capacity=capacity,
            compute_rows=compute_rows,
            priority=moe.capacity_priority,
        )
        delivered_GNCTK[g, :, c] = outcome.delivered_NTK
        for name, count_GN in counts.items():
            count_GN[g] += getattr(outcome, f"{name}_N")
        for level, bytes_a_row, rows_N in zip(levels, row_bytes, outcome.rows_LN, strict=True):
            bytes_GN[g] += bytes_a_row * (rows_N if moe.exchange == "ragged" else (level.size - 1) * level.peer_rows)
    return delivered_GNCTK.reshape(-1, top_k), {name: count.reshape(-1) for name, count in counts.items()}, bytes_GN.reshape(-1)


def check(settings, mesh_sizes, top_k, causes):
    mesh = mesh_of(**mesh_sizes)
    sizes = [mesh.shape[axis] for axis in ("expert_outer", "expert") if mesh.shape[axis] > 1]
    moe = moe_config(top_k, **(dict(capacity_factor=0.9) | settings))
    x_TD, expert_TK, weight_TK = inputs(top_k)
    y_TD, stats, g_TK = run_exchange(mesh, moe, x_TD, expert_TK, weight_TK)
    want_TK, counts, want_bytes = predicted(moe, sizes, 8 // math.prod(sizes), expert_TK, weight_TK)
    assert {name for name, count in counts.items() if count.sum()} == set(causes.split())

    np.testing.assert_array_equal(g_TK != 0, want_TK)
    assert_close(y_TD, np.einsum("TK,TD->TD", want_TK * weight_TK * (expert_TK + 1), x_TD), dtype="float32")
    assert_close(g_TK, want_TK * (expert_TK + 1) * x_TD.sum(1, keepdims=True), dtype="float32")
    np.testing.assert_array_equal(stats.bytes_sent, want_bytes.astype(np.float32))
    np.testing.assert_array_equal(stats.refused, counts["refused"])
    np.testing.assert_array_equal(stats.dropped_receiver, counts["receiver"])
    np.testing.assert_array_equal(stats.dropped_sender, counts["sender"])
    np.testing.assert_array_equal(stats.exact, 0)
    want_load = [np.bincount(group.ravel(), minlength=E + 1)[:E] for group in expert_TK.reshape(8, -1)]
    np.testing.assert_array_equal(stats.load_E, want_load)
    dropped = stats.dropped_sender.sum() + stats.dropped_receiver.sum() + stats.dropped_capacity.sum()
    assert stats.load_E.sum() == want_TK.sum() + dropped
    np.testing.assert_array_equal(stats.dropped_capacity, counts["capacity"])


A2A, RAGGED, GATHER = (dict(exchange=name) for name in ("all_to_all", "ragged", "all_gather"))
CAPACITY, DROPLESS = dict(dispatch="capacity"), dict(dispatch="dropless")
WEIGHT, SINGLY, CHUNKS = dict(capacity_priority="probability"), dict(send_once=False), dict(exchange_chunks=2)
D2E4, O2E4, O2E2 = dict(data=2, expert=4), dict(expert_outer=2, expert=4), dict(data=2, expert_outer=2, expert=2)


def factor(value):
    return dict(exchange_factor=value)


POINTS = [
    (A2A | DROPLESS | SINGLY | factor(0.8), D2E4, 2, "sender"),
    (A2A | DROPLESS | WEIGHT | factor(0.6), D2E4, 3, "sender receiver"),
    (A2A | CAPACITY | factor(0.8), D2E4, 2, "sender capacity"),
    (A2A | CAPACITY | WEIGHT | SINGLY | factor(1.0), D2E4, 2, "sender capacity"),
    (RAGGED | DROPLESS | SINGLY | factor(0.8), D2E4, 2, "receiver refused"),
    (RAGGED | DROPLESS | factor(0.8), D2E4, 3, "receiver refused"),
    (A2A | CAPACITY | WEIGHT | factor(0.8), O2E2, 3, "sender capacity"),
    (RAGGED | DROPLESS | factor(0.8), O2E2, 3, "receiver refused"),
    (RAGGED | CAPACITY | WEIGHT | factor(0.9) | dict(capacity_factor=0.6), O2E4, 3, "receiver refused capacity"),
    (A2A | CAPACITY | CHUNKS, D2E4, 2, "capacity"),
    (GATHER | CAPACITY | WEIGHT, D2E4, 2, "capacity"),
    (dict(exchange="auto") | CAPACITY, dict(data=8), 2, "capacity"),
]
MORE_POINTS = [
    (A2A | DROPLESS | factor(0.6), D2E4, 3, "sender receiver"),
    (A2A | CAPACITY, D2E4, 3, "capacity"),
    (A2A | CAPACITY | WEIGHT | factor(0.8), D2E4, 3, "sender capacity"),
    (A2A | CAPACITY | WEIGHT, dict(expert=8), 2, "capacity"),
    (RAGGED | CAPACITY | WEIGHT | factor(0.8), D2E4, 3, "receiver refused capacity"),
    (RAGGED | DROPLESS | WEIGHT | SINGLY | factor(0.8), O2E2, 2, "receiver refused"),
    (A2A | DROPLESS | WEIGHT | factor(0.8), O2E2, 3, "sender receiver"),
    (A2A | CAPACITY | WEIGHT | SINGLY | factor(0.8), O2E2, 3, "sender capacity"),
    (A2A | CAPACITY | factor(0.8) | dict(capacity_factor=0.5), O2E4, 2, "sender capacity"),
    (RAGGED | CAPACITY | SINGLY | factor(0.8), O2E2, 2, "receiver refused capacity"),
    (RAGGED | CAPACITY | factor(0.8), O2E2, 3, "receiver refused capacity"),
    (RAGGED | DROPLESS | CHUNKS | WEIGHT | factor(0.8), O2E2, 3, "receiver refused"),
    (A2A | CAPACITY | CHUNKS | WEIGHT | factor(0.8), O2E2, 3, "sender capacity"),
    (GATHER | CAPACITY | CHUNKS, O2E2, 3, "capacity"),
    (GATHER | CAPACITY, O2E4, 3, "capacity"),
]


@pytest.mark.parametrize(("settings", "mesh_sizes", "top_k", "causes"), POINTS)
def test_drops_are_those_of_the_model(settings, mesh_sizes, top_k, causes):
    check(settings, mesh_sizes, top_k, causes)


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "mesh_sizes", "top_k", "causes"), MORE_POINTS)
def test_more_drops_are_those_of_the_model(settings, mesh_sizes, top_k, causes):
    check(settings, mesh_sizes, top_k, causes)


def test_a_device_refuses_others_before_itself():
    """By hand: two devices of two tokens, all for device 1, which has room for three: its own two come first. Where not the
    receiver but its expert has room for three, the devices come in order."""
    expert_NTK = np.full((2, 2, 1), 1)
    weight_NTK = np.ones((2, 2, 1))
    ring = deliver(expert_NTK, weight_NTK, num_experts=2, levels=[Level(2, receive_rows=3)])
    np.testing.assert_array_equal(ring.delivered_NTK[..., 0], [[True, False], [True, True]])
    assert ring.refused_N.tolist() == [1, 0]
    assert ring.receiver_N.tolist() == [0, 1]
    assert ring.rows_LN.tolist() == [[1, 0]]
    queue = deliver(expert_NTK, weight_NTK, num_experts=2, levels=[Level(2)], capacity=3)
    np.testing.assert_array_equal(queue.delivered_NTK[..., 0], [[True, True], [True, False]])
    assert queue.capacity_N.tolist() == [0, 1]


def test_a_refused_row_loses_all_its_assignments():
    """By hand: token 0 wants experts 0 and 1 of device 0, token 1 expert 2 of device 1, then 0. One row to each peer."""
    expert_NTK = np.array([[[0, 1], [2, 0]], [[4, 4], [4, 4]]])
    weight_NTK = np.array([[[0.2, 0.3], [0.6, 0.4]], [[0, 0], [0, 0]]])
    levels = [Level(2, once=True, peer_rows=1)]
    first = deliver(expert_NTK, weight_NTK, num_experts=4, levels=levels)
    np.testing.assert_array_equal(first.delivered_NTK[0], [[True, True], [True, False]])
    heaviest = deliver(expert_NTK, weight_NTK, num_experts=4, levels=levels, priority="probability")
    np.testing.assert_array_equal(heaviest.delivered_NTK[0], [[False, False], [True, True]])
    assert (first.sender_N.tolist(), heaviest.sender_N.tolist()) == ([1, 0], [2, 0])
