"""The promise that carries the rest: a train step's numbers do not depend on how it is laid out.

Loss, auxiliary losses, gradient norm, every gradient, expert loads and the next router bias are compared with those of one device
without accumulation and remat, at float32 tolerance. A missing psum, a gradient off by the size of an axis, an auxiliary loss over
the wrong scope, a load counted twice under remat: each fails here.
"""

import functools
import itertools

import numpy as np
import pytest
import tiny
from one_step import assert_same, measure

REFERENCE = dict(mesh="one device", accumulation=1, remat="none")
PLAIN = dict(accumulation=1, remat="none")
REMAT = dict(accumulation=1, remat="full")
SPLIT = dict(accumulation=4, remat="none")
BOTH = dict(accumulation=4, remat="full")
# Every router on every mesh and with every step, every mesh with three of the four steps (`test_layouts_cover_all_pairs`).
STEPS = {
    "one device": dict(mixtral=SPLIT, deepseek=BOTH, switch=REMAT),
    "data 8": dict(deepseek=PLAIN, switch=SPLIT, mixtral=BOTH),
    "expert 8": dict(switch=BOTH, mixtral=PLAIN, deepseek=REMAT),
    "data 2 expert 4": dict(mixtral=REMAT, deepseek=SPLIT, switch=PLAIN),
    "fsdp 2 expert 2 tensor 2": dict(deepseek=BOTH, switch=REMAT, mixtral=SPLIT),
    "expert_outer 2 expert 4": dict(switch=SPLIT, mixtral=BOTH, deepseek=PLAIN),
    "expert_outer 2 expert 2 tensor 2": dict(mixtral=PLAIN, deepseek=REMAT, switch=BOTH),
}
LAYOUTS = [(router, dict(mesh=mesh) | step) for mesh, steps in STEPS.items() for router, step in steps.items()]
FAST = [(next(iter(steps)), mesh) for mesh, steps in STEPS.items()]


@functools.cache
def reference(router, **moe):
    return measure(tiny.config(router, **REFERENCE, **moe))


def compare(router, layout, reference_moe=None, **moe):
    assert_same(measure(tiny.config(router, **layout, **moe)), reference(router, **(reference_moe or {})))


def layouts(fast):
    return pytest.mark.parametrize(
        ("router", "layout"),
        [(router, layout) for router, layout in LAYOUTS if ((router, layout["mesh"]) in FAST) == fast],
        ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
    )


@layouts(fast=True)
def test_every_mesh(router, layout):
    compare(router, layout)


@pytest.mark.matrix
@layouts(fast=False)
def test_every_router_on_every_mesh(router, layout):
    compare(router, layout)


def test_layouts_cover_all_pairs():
    """And every router takes every step; of the fast tier every router, every mesh and every step."""
    points = [(router, *layout.values()) for router, layout in LAYOUTS]
    values = [set(column) for column in zip(*points, strict=True)]
    assert [len(column) for column in values] == [len(tiny.ROUTERS), len(tiny.MESHES), 2, 2]

    def cover(points, *axes):
        return {tuple(point[axis] for axis in axes) for point in points} == set(
            itertools.product(*(values[axis] for axis in axes))
        )

    assert all(cover(points, *axes) for axes in (*itertools.combinations(range(4), 2), (0, 2, 3)))
    assert all(cover([point for point in points if point[:2] in FAST], *axes) for axes in ((0,), (1,), (2, 3)))


@pytest.mark.parametrize(
    ("mesh", "moe"),
    [
        ("fsdp 2 expert 2 tensor 2", dict(exchange="all_gather", dispatch="einsum", capacity_factor=100.0)),
        ("expert 8", dict(dispatch="capacity", capacity_factor=100.0)),
        ("expert_outer 2 expert 4", dict(exchange_chunks=2, exchange_factor=1.25, exchange_overflow="exact")),
        pytest.param(
            "fsdp 2 expert 2 tensor 2",
            dict(exchange_factor=1.0, exchange_overflow="exact", send_once=False),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "expert_outer 2 expert 2 tensor 2",
            dict(exchange="ragged", exchange_chunks=2, exchange_factor=1.0, exchange_overflow="exact"),
            marks=pytest.mark.slow,
        ),
        pytest.param("one device", dict(dispatch="einsum", capacity_factor=100.0), marks=pytest.mark.slow),
        pytest.param("one device", dict(grouped_matmul="reference"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_exchange_and_dispatch(mesh, moe):
    compare("mixtral", REFERENCE | {"mesh": mesh}, **moe)


@pytest.mark.parametrize(("remat", "unroll"), [("full", 0), ("none", 2)])
def test_layers_in_a_loop_or_unrolled(remat, unroll):
    """0 and, of two layers, 2 are the same: all of them one after the other."""
    compare("switch", REFERENCE | {"mesh": "data 2 expert 4", "remat": remat}, model=dict(scan_unroll=unroll))


@pytest.mark.parametrize(
    ("scope", "accumulation"),
    [
        pytest.param("sequence", 4, marks=pytest.mark.slow),
        ("microbatch", 1),  # whose own scope does depend on the microbatches
    ],
)
def test_other_balance_scopes(scope, accumulation):
    moe = dict(balance_loss_scope=scope)
    compare("deepseek", REFERENCE | {"mesh": "data 2 expert 4", "accumulation": accumulation}, moe, **moe)


def test_the_reference_exercises_what_it_compares():
    for router in tiny.ROUTERS:
        expected = reference(router)
        assert expected["['metric']['router/load']"].sum() > 0
        assert (expected["['metric']['router/padding']"] > 0).all()
        assert expected["['metric']['router/balance_loss']"] > 1.02
        assert (expected["['metric']['router/margin']"] > 0).all()
        assert (expected["['metric']['router/gradient_ratio']"] > 0.01).all()
        assert expected["['metric']['train/logit_z_loss']"] > 1
        assert all(np.abs(value).max() > 1e-7 for name, value in expected.items() if name.startswith("['gradient']"))
    assert len(np.unique(reference("deepseek")["['metric']['router/bias']"])) > 3


def test_running_loads_are_near_the_exact_ones_and_not_equal():
    exact = reference("mixtral")
    running = measure(tiny.config("mixtral", **(REFERENCE | {"accumulation": 4}), balance_loss_accumulation="running"))
    name = "['metric']['router/balance_loss']"
    assert running[name] != exact[name]
    np.testing.assert_allclose(running[name], exact[name], rtol=0.2)
    np.testing.assert_array_equal(running["['metric']['router/load']"], exact["['metric']['router/load']"])
