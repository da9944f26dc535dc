"""Counts from jaxprs held against compiled programs: rules, what no rule explains, and real programs for GPUs and TPUs that are absent."""

import dataclasses
import importlib.util
import math

import pytest
import tiny

from configs.published import mixtral_8x7b
from moe_jax.analysis.ledger import Entry, ledger, wire_bytes
from moe_jax.config import Config, MeshConfig, from_dict
from moe_jax.plan import program, targets, topology, traffic
from moe_jax.plan.reconcile import EQUAL, GATHER, REPEATED, SCATTER, Reconciliation, operand_bytes, reconcile

SIZES = {"a": 2, "b": 4}


def entry(kind, axes, size, loops=(), dtype="float32"):
    n = math.prod(SIZES[axis] for axis in axes)
    return Entry(kind, axes, dtype, wire_bytes(kind, size, n), loops)


@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"])
@pytest.mark.parametrize("axes", [("a",), ("b",), ("a", "b")])
def test_operands_from_what_they_put_on_the_wire(kind, axes):
    splits = kind in ("reduce-scatter", "all-to-all")
    for size in (8, 64, 1000) if splits else (1, 4, 12, 36, 1000):
        assert operand_bytes(entry(kind, axes, size), SIZES) == size


B, AB = ("b",), ("a", "b")
BIG = entry("all-reduce", AB, 4096)


def rules(counted, compiled, platform="gpu"):
    found = reconcile(counted, compiled, SIZES, platform)
    assert not found.unexplained
    return [line.rule for line in found.explained]


def test_messages_that_join_and_loops_that_are_unrolled_are_the_same():
    counted = [entry("all-reduce", AB, 4096, (3,)), entry("all-reduce", AB, 100)]
    assert rules(counted, [entry("all-reduce", AB, 3 * 4096 + 100)]) == []
    assert rules(counted, [*[entry("all-reduce", AB, 4096)] * 3, entry("all-reduce", AB, 100)]) == []


def test_small_equal_sums_are_sent_once():
    loads = [entry("all-reduce", AB, 32, (5,))] * 2
    assert rules([BIG, *loads], [BIG, loads[0]]) == [EQUAL]
    for left in ([BIG, entry("all-reduce", AB, 32, (2,))], [loads[0]], [BIG, BIG, *loads]):
        with pytest.raises(ValueError, match=r"all-reduce over a\+b of float32: 4416 bytes counted"):
            reconcile([BIG, *loads], left, SIZES).check()


def test_what_loops_of_one_step_repeat_is_sent_once():
    once, twice = [entry("all-gather", B, 4096, (2,))], [entry("all-gather", B, 4096, (2, 1))] * 2
    assert rules(twice, once) == [REPEATED]
    assert len(reconcile(once * 2, once, SIZES).unexplained) == 1  # no such loop
    assert len(reconcile(twice, [entry("all-gather", B, 4000, (2,))], SIZES).unexplained) == 1  # part of an array


def test_what_the_tpu_compiler_rewrites_has_a_name():
    scatters = [entry("reduce-scatter", B, 800, (2,)), entry("reduce-scatter", B, 8000)]
    gather = entry("all-gather", B, 100)
    as_sum = entry("all-reduce", B, 1600)
    assert rules(scatters, [scatters[1], as_sum], "tpu") == [SCATTER, SCATTER]
    assert rules([gather], [entry("all-reduce", B, 400)], "tpu") == [GATHER, GATHER]
    assert set(rules([gather, *scatters], [scatters[1], entry("all-reduce", B, 2000)], "tpu")) == {GATHER, SCATTER}
    assert len(reconcile(scatters, [scatters[1], as_sum], SIZES).unexplained) == 2
    assert len(reconcile(scatters, [scatters[1], entry("all-reduce", B, 1604)], SIZES, "tpu").unexplained) == 2


@pytest.mark.parametrize("extra", [entry("all-gather", B, 2048), entry("all-reduce", AB, 4)])
def test_what_is_compiled_and_was_not_counted_is_unexplained(extra):
    assert len(reconcile([BIG], [BIG, extra], SIZES, "tpu").unexplained) == 1


def of(mesh, **settings) -> Config:
    """A tiny model whose every weight is above `reconcile.SMALL`."""
    model = dict(d_model=64, d_ff=96, vocab_size=256, attention=dataclasses.replace(tiny.config().model.attention, head_dim=16))
    model |= settings.pop("model", {})
    config = tiny.config(**{"d_ff": 32, "remat": "full"} | settings, model=model)
    return dataclasses.replace(config, mesh=MeshConfig(**{"data": 1} | mesh))


def compiled_and_counted(config, text) -> Reconciliation:
    where = topology.parse(text)
    package = targets.NEEDS[where.chip.platform][0]
    if importlib.util.find_spec(package) is None:
        pytest.fail(f"compiling for {text} needs {package}; `bash launch/test.sh slow` installs it.")
    mesh = targets.device_mesh(config, where)
    step = program.trace(config, mesh)
    compiled = ledger(program.compile_step(step), mesh)
    return reconcile(traffic.collectives(step), compiled, mesh, where.chip.platform)


TWO_LAYERS = dict(num_layers=2)  # of experts


@pytest.mark.slow
@pytest.mark.parametrize("text", ["h100:1x8", "v5p:2x2x2"])
def test_a_compiled_step_sends_what_was_counted(text):
    config = of(dict(fsdp=2, expert=4), first_dense=0, num_shared_experts=0, model=TWO_LAYERS | dict(dtype="bfloat16"))
    found = compiled_and_counted(config, text)
    found.check()
    allowed = {EQUAL} if text.startswith("h100") else {EQUAL, SCATTER, GATHER}
    assert {line.rule for line in found.explained} <= allowed
    assert ("all-to-all", ("expert",), "bfloat16") in {(line.kind, line.axes, line.dtype) for line in found.matched}
    assert len(found.matched) >= 5


LATENT = dataclasses.replace(
    tiny.config().model.attention, num_kv_heads=4, head_dim=16, kv_rank=16, q_rank=16, rope_head_dim=8, v_head_dim=16
)
PRODUCT = {
    "no remat": (dict(fsdp=4, expert=4), dict(remat="none")),
    "dots": (dict(fsdp=4, expert=4), dict(remat="dots")),
    "replicas": (dict(data=4, expert=4), {}),
    "replicas alone": (dict(data=16), {}),
    "tensor": (dict(fsdp=2, expert=4, tensor=2), {}),
    "four axes, bfloat16": (dict(data=2, fsdp=2, expert=2, tensor=2), dict(model=dict(dtype="bfloat16"))),
    "two levels": (dict(expert_outer=2, expert=4, fsdp=2), {}),
    "microbatches": (dict(fsdp=4, expert=4), dict(accumulation=2)),
    "microbatches on replicas": (dict(data=4, expert=4), dict(accumulation=2)),
    "all_gather": (dict(fsdp=4, expert=4), dict(exchange="all_gather")),
    "all_gather, dots": (dict(data=2, fsdp=2, expert=2, tensor=2), dict(exchange="all_gather", remat="dots")),
    "ragged": (dict(fsdp=4, expert=4), dict(exchange="ragged")),
    "ragged in two levels": (dict(expert_outer=2, fsdp=2, expert=2, tensor=2), dict(exchange="ragged")),
    "tied": (dict(fsdp=4, expert=4), dict(model=dict(tied_embeddings=True))),
    "tied, tensor": (dict(fsdp=2, expert=4, tensor=2), dict(model=dict(tied_embeddings=True))),
    "tied, replicas": (dict(data=4, expert=4), dict(remat="none", model=dict(tied_embeddings=True))),
    "exact on overflow, in chunks": (
        dict(fsdp=4, expert=4),
        dict(exchange_factor=1.25, exchange_overflow="exact", exchange_chunks=2),
    ),
    "the exchange done again": (dict(fsdp=4, expert=4), dict(remat_exchange=True, send_once=False)),
    "latent attention, a token ahead": (
        dict(fsdp=2, expert=4, tensor=2),
        dict(router="deepseek", model=dict(mtp_layers=1, norm="layer", attention=LATENT)),
    ),
    "groups and a bias": (dict(data=2, fsdp=2, expert=4), dict(router="deepseek")),
}


@pytest.mark.matrix
@pytest.mark.parametrize("name", PRODUCT)
def test_programs_for_h100_send_what_was_counted(name):
    mesh, settings = PRODUCT[name]
    found = compiled_and_counted(of(mesh, **settings), "h100:2x8")
    found.check()
    assert {(line.kind, line.rule) for line in found.explained} <= {("all-reduce", EQUAL)}
    assert sum(line.counted - line.compiled for line in found.explained) < 256


@pytest.mark.matrix
def test_a_lone_layer_s_counting_pass_is_merged_with_its_forward_pass():
    moe = dict(accumulation=2, exchange_factor=1.25, exchange_overflow="exact", first_dense=0)
    found = compiled_and_counted(of(dict(fsdp=4, expert=4), **moe, model=dict(num_layers=1)), "h100:2x8")
    found.check()
    assert {line.rule for line in found.explained} <= {EQUAL, REPEATED}
    assert all(line.compiled < line.counted for line in found.explained)


@pytest.mark.matrix
def test_mixtral_for_64_h100s_sends_what_was_counted():
    found = compiled_and_counted(from_dict(mixtral_8x7b.get_config("h100-64")), "h100:8x8")
    found.check()
    (loads,) = found.explained  # equal sums of loads in 32 layers
    assert (loads.dtype, loads.counted - loads.compiled) == ("int32", 32 * 8 * 4 + 2 * 4)
