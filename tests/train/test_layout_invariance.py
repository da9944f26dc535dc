"""The promise that carries the rest: a train step's numbers do not depend on how it is laid out.

Loss, auxiliary losses, gradient norm, every gradient, expert loads and the next router bias are compared with those of one device
without accumulation and remat, at float32 tolerance. A missing psum, a gradient off by the size of an axis, an auxiliary loss over
the wrong scope, a load counted twice under remat: each fails here.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
import tiny
from tolerance import assert_close

from moe_jax.mesh import make_mesh, shard_batch
from moe_jax.models.transformer import build
from moe_jax.train.step import make_gradient_fn

REFERENCE = dict(mesh="one device", accumulation=1, remat="none")
LAYOUTS = [
    dict(zip(("mesh", "accumulation", "remat"), point, strict=True))
    for point in itertools.product(tiny.MESHES, (1, 4), ("none", "full"))
]
CORNERS = [  # every mesh, both accumulations, both remats, each router on each mesh
    dict(mesh="data 8", accumulation=1, remat="full"),
    dict(mesh="expert 8", accumulation=4, remat="none"),
    dict(mesh="data 2 expert 4", accumulation=1, remat="none"),
    dict(mesh="fsdp 2 expert 2 tensor 2", accumulation=4, remat="full"),
    dict(mesh="one device", accumulation=4, remat="none"),
]
REST = [layout for layout in LAYOUTS if layout not in CORNERS and layout != REFERENCE]


def measure(config):
    """Gradients, next bias and metrics of one step, as nested dicts of NumPy arrays by path."""
    count = np.prod(config.mesh.shape)
    mesh = make_mesh(config, jax.devices()[:count])
    with jax.set_mesh(mesh):
        graphdef, params, bias = build(config.model, seed=3)
        bias = jax.tree.map(lambda b: b + 0.02 * (jax.numpy.arange(b.shape[-1]) % 3), bias)
        step = jax.jit(make_gradient_fn(config, graphdef))
        gradients, bias, metrics = step(params, bias, shard_batch(mesh, tiny.batch()), jax.random.key(5))
    tree = {"gradient": gradients, "bias": bias, "metric": metrics}
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@functools.cache
def reference(router, **moe):
    return measure(tiny.config(router, **REFERENCE, **moe))


def compare(router, layout, reference_moe=None, **moe):
    expected = reference(router, **(reference_moe or {}))
    actual = measure(tiny.config(router, **layout, **moe))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("['metric']['exchange/"):
            continue  # what travels is what differs
        if value.dtype.kind == "i":
            np.testing.assert_array_equal(actual[name], value, err_msg=name)
        else:
            assert_close(actual[name], value, what=name)


@pytest.mark.parametrize("layout", CORNERS, ids=lambda x: "-".join(map(str, x.values())))
@pytest.mark.parametrize("router", ["mixtral", "deepseek", pytest.param("switch", marks=pytest.mark.slow)])
def test_corner_layouts(router, layout):
    compare(router, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", REST, ids=lambda x: "-".join(map(str, x.values())))
def test_every_layout(layout):
    """The whole product for the router with a state and groups; of the others what follows."""
    compare("deepseek", layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [x for x in REST if (x["accumulation"], x["remat"]) in ((4, "none"), (1, "full"))], ids=str)
@pytest.mark.parametrize("router", ["mixtral", "switch"])
def test_every_mesh(router, layout):
    compare(router, layout)


@pytest.mark.parametrize(
    ("mesh", "moe"),
    [
        ("data 2 expert 4", dict(exchange="all_gather")),
        ("fsdp 2 expert 2 tensor 2", dict(exchange="all_gather", dispatch="einsum", capacity_factor=100.0)),
        ("expert 8", dict(dispatch="capacity", capacity_factor=100.0)),
        pytest.param("data 2 expert 4", dict(exchange="ragged", exchange_chunks=2), marks=pytest.mark.slow),
        pytest.param(
            "fsdp 2 expert 2 tensor 2",
            dict(exchange_factor=1.0, exchange_overflow="exact", send_once=False),
            marks=pytest.mark.slow,
        ),
        ("expert_outer 2 expert 4", dict(exchange_chunks=2, exchange_factor=1.25, exchange_overflow="exact")),
        pytest.param(
            "expert_outer 2 expert 2 tensor 2",
            dict(exchange="ragged", exchange_factor=1.0, exchange_overflow="exact"),
            marks=pytest.mark.slow,
        ),
        ("one device", dict(dispatch="einsum", capacity_factor=100.0)),
        pytest.param("one device", dict(grouped_matmul="reference"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_exchange_and_dispatch(mesh, moe):
    compare("mixtral", REFERENCE | {"mesh": mesh}, **moe)


@pytest.mark.parametrize(("remat", "unroll"), [("none", 0), ("full", 0), ("none", 2)])
def test_layers_in_a_loop_or_unrolled(remat, unroll):
    compare("switch", REFERENCE | {"mesh": "data 2 expert 4", "remat": remat}, model=dict(scan_unroll=unroll))


@pytest.mark.parametrize("scope", [pytest.param("sequence", marks=pytest.mark.slow), "microbatch"])
def test_other_balance_scopes(scope):
    moe = dict(balance_loss_scope=scope)
    compare("deepseek", REFERENCE | {"mesh": "data 2 expert 4"}, moe, **moe)
    if scope == "sequence":  # a microbatch's own scope does depend on the microbatches
        compare("deepseek", REFERENCE | {"accumulation": 4}, moe, **moe)


def test_the_reference_exercises_what_it_compares():
    for router in tiny.ROUTERS:
        expected = reference(router)
        assert expected["['metric']['router/load']"].sum() > 0
        assert (expected["['metric']['router/padding']"] > 0).all()
        assert expected["['metric']['router/balance_loss']"] > 1.02
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
