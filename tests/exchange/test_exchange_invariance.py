"""Layout invariance: every exchange, on every mesh and under every skew, gives the one-device oracle's values and gradients."""

import functools
import itertools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from island import MESHES, SKEWS, BiasRouter, D, E, inputs, island_step, make_mesh, moe_config, oracle
from routes import routed
from tolerance import assert_close, assert_close_over_wire

WIRES = {  # out and home
    "compute": ("compute", "compute"),
    "bf16": ("bfloat16", "bfloat16"),
    "int8": ("int8", "compute"),
    "float8": ("float8_e4m3fn", "float32"),
    "bf16_out": ("bfloat16", "compute"),
    "bf16_home": ("compute", "bfloat16"),
    "int8_bf16": ("int8", "bfloat16"),
    "float8_bf16": ("float8_e4m3fn", "bfloat16"),
}


class Point(NamedTuple):
    """One compiled program. `factor` bounds the buffers, with the exact path on overflow; 0 for none."""

    mesh: str
    exchange: str
    dispatch: str
    send_once: bool = False
    chunks: int = 1
    wire: str = "compute"
    top_k: int = 2
    factor: float = 0.0

    def config(self):
        dispatch_wire, combine_wire = WIRES[self.wire]
        return moe_config(
            self.top_k,
            exchange=self.exchange,
            exchange_factor=self.factor,
            exchange_overflow="exact" if self.factor else "drop",
            exchange_chunks=self.chunks,
            send_once=self.send_once,
            dispatch_wire=dispatch_wire,
            combine_wire=combine_wire,
            dispatch=self.dispatch,
            capacity_factor=E / self.top_k,  # a row for every token
            balance_loss_scope="sequence",
        )


# Every value with every value of every other setting, but for wires on meshes (`test_points_cover_all_pairs`).
POINTS = [
    Point("data2_expert4", "ragged", "dropless", False, 2, "compute", 3),
    Point("outer2_expert4", "all_to_all", "einsum", True, 1, "bf16", 2),
    Point("outer2_expert2_tensor2", "ragged", "capacity", False, 1, "float8", 2, 1.5),
    Point("expert8", "all_to_all", "capacity", True, 1, "int8", 3, 2.3),
    Point("fsdp2_expert2_tensor2", "all_gather", "einsum", False, 2, "bf16", 3),
    Point("expert8", "all_gather", "dropless", False, 1, "int8", 2),
    Point("outer2_expert2_tensor2", "all_to_all", "dropless", True, 2, "float8", 3),
    Point("data2_expert4", "all_to_all", "einsum", True, 1, "compute", 2, 1.8),
    Point("fsdp2_expert2_tensor2", "ragged", "capacity", True, 1, "bf16", 3, 1.0),
    Point("outer2_expert4", "all_gather", "capacity", False, 4, "bf16", 2),
    Point("outer2_expert4", "ragged", "dropless", True, 2, "int8", 3, 2.0),
    Point("fsdp2_expert2_tensor2", "all_to_all", "dropless", False, 2, "bf16", 2),
    Point("expert8", "ragged", "einsum", True, 2, "int8", 2),
    Point("data2_expert4", "all_gather", "capacity", False, 1, "compute", 3),
    Point("outer2_expert2_tensor2", "all_gather", "einsum", False, 2, "float8", 3),
]

# With these wires on meshes too, and every three values of the other settings together (`test_more_points_cover_all_triples`).
MORE_POINTS = [
    Point("expert8", "all_to_all", "capacity", False, 2, "bf16_out", 3),
    Point("expert8", "all_to_all", "dropless", False, 2, "compute", 3),
    Point("expert8", "all_to_all", "dropless", False, 1, "float8_bf16", 2),
    Point("expert8", "ragged", "capacity", False, 2, "bf16", 3, 2.3),
    Point("expert8", "ragged", "dropless", False, 1, "int8_bf16", 2, 2.3),
    Point("expert8", "all_gather", "capacity", False, 2, "float8", 2),
    Point("expert8", "all_gather", "einsum", False, 2, "bf16_home", 2),
    Point("data2_expert4", "all_to_all", "capacity", False, 2, "bf16_home", 3, 1.5),
    Point("data2_expert4", "all_to_all", "dropless", True, 2, "float8", 3),
    Point("data2_expert4", "ragged", "capacity", True, 2, "float8_bf16", 2),
    Point("data2_expert4", "ragged", "dropless", True, 1, "bf16_out", 2, 1.5),
    Point("data2_expert4", "ragged", "einsum", False, 2, "bf16", 2, 1.5),
    Point("data2_expert4", "all_gather", "capacity", False, 2, "int8", 3),
    Point("data2_expert4", "all_gather", "dropless", False, 2, "int8_bf16", 3),
    Point("fsdp2_expert2_tensor2", "all_to_all", "capacity", False, 2, "int8_bf16", 2, 1.2),
    Point("fsdp2_expert2_tensor2", "all_to_all", "einsum", True, 1, "float8_bf16", 2),
    Point("fsdp2_expert2_tensor2", "ragged", "capacity", False, 2, "compute", 2),
    Point("fsdp2_expert2_tensor2", "ragged", "dropless", True, 1, "bf16_out", 2),
    Point("fsdp2_expert2_tensor2", "ragged", "dropless", True, 2, "float8", 3, 1.2),
    Point("fsdp2_expert2_tensor2", "all_gather", "capacity", False, 1, "bf16_home", 3),
    Point("fsdp2_expert2_tensor2", "all_gather", "dropless", False, 2, "int8", 3),
    Point("outer2_expert4", "all_to_all", "capacity", False, 2, "float8", 3),
    Point("outer2_expert4", "all_to_all", "dropless", False, 1, "float8_bf16", 3, 2.0),
    Point("outer2_expert4", "ragged", "capacity", True, 1, "bf16_home", 2, 2.0),
    Point("outer2_expert4", "ragged", "einsum", False, 2, "int8_bf16", 2),
    Point("outer2_expert4", "ragged", "einsum", True, 2, "compute", 2),
    Point("outer2_expert4", "all_gather", "dropless", False, 1, "bf16_out", 3),
    Point("outer2_expert2_tensor2", "all_to_all", "capacity", False, 1, "compute", 3, 1.5),
    Point("outer2_expert2_tensor2", "all_to_all", "dropless", True, 1, "bf16_home", 2, 1.5),
    Point("outer2_expert2_tensor2", "all_to_all", "einsum", False, 2, "bf16_out", 3, 1.5),
    Point("outer2_expert2_tensor2", "ragged", "capacity", True, 2, "int8_bf16", 3),
    Point("outer2_expert2_tensor2", "ragged", "dropless", False, 1, "int8", 3),
    Point("outer2_expert2_tensor2", "all_gather", "capacity", False, 1, "bf16", 3),
    Point("outer2_expert2_tensor2", "all_gather", "dropless", False, 1, "float8_bf16", 2),
]


def name_of(point):
    words = [point.mesh, point.exchange, point.dispatch, *["once"] * point.send_once, f"k{point.top_k}"]
    words += [f"{point.chunks}chunks"] * (point.chunks > 1) + [point.wire] * (point.wire != "compute")
    return "-".join(words + [f"exact{point.factor}"] * (point.factor > 0))


@functools.cache
def expected(skew, top_k, wire):
    """The oracle's answer, with the tokens that a scaled or narrow wire delivers (None: unrounded)."""
    return jax.tree.map(np.asarray, oracle(*inputs(skew), None, top_k, wire))


def check(point):
    step = island_step(make_mesh(point.mesh), point.config())
    exact = {}
    for skew in SKEWS:
        data = inputs(skew)
        result = step(*data)
        (value, (y, sums, stats)), grads = result
        answers = dict(loss=value, y=y) | {f"gradient of {name}": g for name, g in grads.items()}
        want_sums, want_stats = check_answers(point, skew, answers)
        jax.tree.map(functools.partial(assert_close, dtype="float32", what=f"{skew} sums"), sums, want_sums)
        check_counts(point, data[1], y, sums, stats, want_stats)
        exact[skew] = int(stats.exact)
    num_islands = 8 // MESHES[point.mesh].get("tensor", 1)
    assert set(exact.values()) == ({0, num_islands} if point.factor else {0}), exact
    again = step(*data)
    jax.tree.map(np.testing.assert_array_equal, again, result)  # bit for bit
    assert step.jitted._cache_size() == 1  # compiled once


def check_answers(point, skew, answers):
    """Sharply against the oracle that is given the tokens as they come off the wire; then what the rounding itself costs."""
    dispatch_wire, combine_wire = WIRES[point.wire]
    rounded = None if dispatch_wire == "compute" else dispatch_wire
    for wire in {rounded, None}:
        (value, (y, want_sums, want_stats)), grads = expected(skew, point.top_k, wire)
        wants = dict(loss=value, y=y) | {f"gradient of {name}": g for name, g in grads.items()}
        for name, want in wants.items():
            if wire == rounded and combine_wire != "bfloat16":
                assert_close(answers[name], want, dtype="float32", what=f"{skew} {name}")
            else:
                costs = "bfloat16" if wire == rounded else rounded
                assert_close_over_wire(answers[name], want, costs, what=f"{skew} {name}")
    return want_sums, want_stats


def check_counts(point, mask_BS, y, sums, stats, want_stats):
    np.testing.assert_array_equal(stats.load_E, want_stats.load_E)
    np.testing.assert_array_equal(stats.load_E, sums.load_E)
    assert int(stats.load_E.sum()) == int(mask_BS.sum()) * point.top_k
    assert int(stats.padding) == int((~mask_BS).sum()) * point.top_k
    drops = (stats.dropped_capacity, stats.dropped_sender, stats.dropped_receiver, stats.refused)
    assert [int(count) for count in drops] == [0] * 4
    assert float(stats.bytes_sent) > 0
    assert not np.any(np.asarray(y)[~np.asarray(mask_BS)])


@pytest.mark.parametrize("point", POINTS, ids=name_of)
def test_equals_one_device(point):
    check(point)


@pytest.mark.matrix
@pytest.mark.parametrize("point", MORE_POINTS, ids=name_of)
def test_more_points_equal_one_device(point):
    check(point)


VALUES = dict(
    mesh=tuple(MESHES),
    exchange=("all_to_all", "ragged", "all_gather"),
    dispatch=("dropless", "capacity", "einsum"),
    send_once=(False, True),
    chunked=(False, True),
    wire=tuple(WIRES),
    top_k=(2, 3),
    bounded=(False, True),
)


def missing(points, number, settings):
    """The values of any `number` of these settings that no point has together, of those that mean something."""
    told = [point._asdict() | dict(chunked=point.chunks > 1, bounded=point.factor > 0) for point in points]
    for names in itertools.combinations(settings, number):
        met = {tuple(point[name] for name in names) for point in told}
        for values in itertools.product(*(settings[name] for name in names)):
            point = dict(zip(names, values, strict=True))
            no_buffers = point.get("exchange") == "all_gather" and (point.get("send_once") or point.get("bounded"))
            if not no_buffers and values not in met:
                yield point


def test_points_cover_all_pairs():
    pairs = missing(POINTS, 2, VALUES | {"wire": tuple(WIRES)[:4]})
    assert not [pair for pair in pairs if pair.keys() != {"mesh", "wire"}]


def test_more_points_cover_all_triples():
    """Of what the exchanges are made of. The quadratic einsum is in pairs; with eight experts on eight devices nothing is sent once."""
    points = POINTS + MORE_POINTS
    assert not list(missing(points, 2, VALUES))
    parts = {name: VALUES[name] for name in ("mesh", "exchange", "send_once", "chunked", "bounded")}
    triples = missing(points, 3, parts | {"dispatch": ("dropless", "capacity")})
    assert not [triple for triple in triples if not (triple.get("mesh") == "expert8" and triple.get("send_once"))]


@pytest.mark.parametrize("top_k", [2, 3])
def test_tokens_have_several_experts_on_one_device(top_k):
    """Else nothing here would show whether they travel once."""
    params, mask, bias, _ = inputs("uniform")
    routing = routed(BiasRouter(E, top_k), params["x"].reshape(-1, D), params["router"], bias, mask.reshape(-1))
    expert_KT = np.asarray(routing.expert_A).reshape(top_k, -1)
    for experts_a_device in (2, 4):
        devices = np.sort(expert_KT // experts_a_device, axis=0)
        merged = np.sum(devices[1:] == devices[:-1], axis=0)
        assert np.sum(merged > 0) > 5
        assert top_k == 2 or experts_a_device == 2 or np.any(merged == 2)  # three in one row


def test_skews_are_what_they_say():
    loads = {skew: np.asarray(expected(skew, 2, None)[0][1][2].load_E) for skew in SKEWS}
    assert loads["uniform"].max() < 2 * loads["uniform"].mean()
    assert 2.5 * loads["zipf"].mean() < loads["zipf"].max()
    assert np.count_nonzero(loads["zipf"]) >= E - 2
    assert loads["one_expert"].max() == 64
    assert np.count_nonzero(loads["empty_experts"]) == 4
    assert loads["padding"].sum() == 2 * (64 // 2 - 3)
