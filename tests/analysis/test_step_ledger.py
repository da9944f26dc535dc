"""Which collectives an observed train step has. A change that adds one fails here: if it is meant, write it into the table."""

import math

import jax
import pytest
import tiny

from moe_jax.analysis.jaxpr_ledger import ledger_of_jaxpr
from moe_jax.analysis.ledger import count, ledger, per_layer
from moe_jax.mesh import make_mesh, shard_batch
from moe_jax.models.transformer import build
from moe_jax.train.step import make_gradient_fn

# (compiled, traced) collectives of one MoE layer, forward and backward, and those compiled in the rest of the step, by kind and axes.
# Traced are those written in the exchange: some are equal, and XLA runs them once. The partitioner's (the gathers and the gradients'
# sums of the dense weights, router and attention included) are compiled only.
BATCH, INNER = ("data", "expert"), ("fsdp", "expert")
STEP = {
    ("data 8", "full"): (
        {("all-reduce", ("data",)): (19, 11)},
        {("all-reduce", ("data",)): 19},
    ),
    ("data 2 expert 4", "none"): (
        {("all-to-all", ("expert",)): (6, 6), ("all-reduce", BATCH): (17, 9), ("all-reduce", ("data",)): (3, 3)},
        {("all-reduce", BATCH): 19, ("all-reduce", ("expert",)): 3},
    ),
    ("fsdp 2 expert 2 tensor 2", "full"): (
        {
            ("all-to-all", ("expert",)): (6, 7),
            ("all-gather", ("fsdp",)): (20, 6),
            ("reduce-scatter", ("fsdp",)): (3, 3),
            ("all-reduce", INNER): (17, 9),
            ("all-reduce", ("tensor",)): (11, 3),
        },
        {
            ("all-gather", ("fsdp",)): 16,
            ("all-gather", ("tensor",)): 1,
            ("all-reduce", INNER): 19,
            ("all-reduce", ("fsdp",)): 19,
            ("all-reduce", ("expert",)): 3,
            ("all-reduce", ("tensor",)): 31,
        },
    ),
}


def step_ledgers(mesh_name, remat, **moe):
    """(compiled, traced) ledgers of the gradients of a tiny train step, its layers in a loop."""
    config = tiny.config("mixtral", mesh_name, remat=remat, model=dict(scan_unroll=1), **moe)
    mesh = make_mesh(config, jax.devices()[: math.prod(config.mesh.shape)])
    with jax.set_mesh(mesh):
        graphdef, params, bias = build(config.model, seed=3)
        step = jax.jit(make_gradient_fn(config, graphdef, observe=True))
        traced = step.trace(params, bias, shard_batch(mesh, tiny.batch()), jax.random.key(5))
        return ledger(traced.lower().compile(), mesh), ledger_of_jaxpr(traced.jaxpr, mesh)


def step_table(compiled, traced, num_layers):
    layers = [count(per_layer(entries, num_layers)) for entries in (compiled, traced)]
    layer = {key: tuple(counts[key] for counts in layers) for key in {**layers[0], **layers[1]}}
    return layer, dict(count([entry for entry in compiled if num_layers not in entry.loops]))


@pytest.mark.parametrize(
    ("mesh_name", "remat"),
    [case if case[0].startswith("fsdp") else pytest.param(*case, marks=pytest.mark.slow) for case in STEP],
    ids=str,
)
def test_a_train_step_has_these_collectives_and_no_others(mesh_name, remat):
    table = step_table(*step_ledgers(mesh_name, remat), num_layers=2)
    assert table == STEP[mesh_name, remat], f"the step now has {table}"


@pytest.mark.slow
def test_the_backward_repeats_the_exchange_only_when_asked():
    exchanges = {}
    for remat_exchange in (False, True):
        compiled, _ = step_ledgers("data 2 expert 4", "full", remat_exchange=remat_exchange)
        exchanges[remat_exchange] = count(per_layer(compiled, 2))["all-to-all", ("expert",)]
    assert exchanges == {False: 6, True: 8}  # out, words, home; gradients out, home, of weights; again out and words
