"""Every collective of a step by its jaxpr: closed forms to the byte, rules one by one, and what is refused."""

import dataclasses
import importlib
import math
import pkgutil
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import published
from configs.published import mixtral_8x7b
from moe_jax.analysis import bench_comm, describe
from moe_jax.config import Config, ConfigError, MeshConfig, from_dict
from moe_jax.mesh import BATCH_AXES
from moe_jax.plan import closed_forms, program, topology, traffic
from moe_jax.plan.reconcile import operand_bytes
from moe_jax.plan.traffic_table import part, phase, table, useful
from moe_jax.plan.what_runs import what_runs


def on(mesh: dict, **settings) -> Config:
    model = settings.pop("model", {})
    return dataclasses.replace(tiny.config(**settings, model=model), mesh=MeshConfig(**{"data": 1} | mesh))


def counted(config):
    devices = math.prod(config.mesh.shape)
    mesh = topology.abstract_mesh(config, topology.parse(f"h100:1x{devices}"))
    return traffic.collectives(program.trace(config, mesh)), mesh


def totals(entries):
    sums = Counter()
    for entry in entries:
        sums[entry.kind, entry.axes, entry.dtype] += entry.bytes * entry.executions
    return dict(sums)


def weights_of(entries, mesh):
    """Of weights and their gradients."""
    own = [e for e in entries if part(e) not in ("counts", "exchange", "norms of gradients and metrics")]
    return [e for e in own if operand_bytes(e, mesh.shape) > 4]


def more(*case):
    return pytest.param(*case, marks=pytest.mark.matrix)


@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        (dict(fsdp=2, expert=4), dict(remat="full", exchange="all_to_all")),
        (dict(data=2, fsdp=2, expert=2), dict(remat="none", exchange="all_gather", model=dict(dtype="bfloat16"))),
        more(dict(expert_outer=2, expert=4), dict(remat="dots", exchange="ragged")),
        more(dict(expert_outer=2, expert=2, fsdp=2), dict(remat="full", exchange="all_to_all", send_once=False)),
        more(dict(data=2, expert=4), dict(remat="full", exchange="ragged", model=dict(tied_embeddings=True))),
        more(dict(expert=8), dict(remat="none", exchange="all_to_all", dispatch_wire="int8")),
    ],
    ids=str,
)
def test_a_step_is_its_closed_form_to_the_byte(mesh, settings):
    config = on(mesh, **settings)
    entries, abstract = counted(config)
    assert totals(weights_of(entries, abstract)) == closed_forms.weights(config, describe.abstract_params(config, abstract))
    rows = [e for e in entries if part(e) == "exchange"]
    assert all(e.upper_bound for e in rows) == (config.model.moe.exchange == "ragged")
    assert by_kind(rows) == exchange_form(config)


def by_kind(entries):
    sums = Counter()
    for entry in entries:
        sums[entry.axes, entry.kind] += entry.bytes * entry.executions
    return dict(sums)


def exchange_form(config):
    """`bench_comm.closed_form`, of all layers."""
    moe, sizes = config.model.moe, config.mesh
    tokens = config.data.batch_size * config.data.seq_len // math.prod(getattr(sizes, axis) for axis in BATCH_AXES)
    shape = bench_comm.Shape(tokens, config.model.d_model, moe.d_ff, moe.num_experts, moe.router.top_k, config.model.dtype)
    fields = {field.name: getattr(moe, field.name) for field in dataclasses.fields(moe)} | {"num_shared_experts": 0}
    form = bench_comm.closed_form(shape, bench_comm.Contender("", fields, sizes.expert_outer, sizes.expert))
    return {key: size * config.model.num_moe_layers for key, size in form.items()}


@pytest.mark.parametrize("remat", [more("none"), "full"])
def test_sums_over_the_tensor_axis_are_their_closed_form(remat):
    config = on(dict(fsdp=2, tensor=4), remat=remat, num_experts=0, num_shared_experts=0, first_dense=0)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=four_heads(config)))
    entries, mesh = counted(config)
    expected = closed_forms.weights(config, describe.abstract_params(config, mesh)) | closed_forms.activations(config)
    assert totals(weights_of(entries, mesh)) == expected


def four_heads(config):
    return dataclasses.replace(config.model.attention, num_kv_heads=4)


MIXTRAL = "h100-64,data.batch_size=64,model.moe.exchange_factor=1.25,mesh.fsdp=8,mesh.expert=8"


@pytest.mark.parametrize(("again", "times"), [(False, 4), more(True, 6)])
def test_mixtral_on_64_devices_by_hand(again, times):
    """4,096 tokens a device, room for 1.25 times the balanced rows: a buffer is 4,096 x 2 x 1.25 rows of 8 KiB, 80 MiB, of which 7/8
    leave the device. Out and home, forward and backward, are four such exchanges a layer, 8.75 GiB in 32 layers, for what came over
    the wire is kept for the backward pass; where it is not (`remat_exchange`), tokens and answers travel once more: six, 13.125 GiB.
    One expert a device leaves nothing to save by sending a token once.
    """
    config = from_dict(mixtral_8x7b.get_config(f"{MIXTRAL},model.moe.remat_exchange={again}"))
    mesh = topology.abstract_mesh(config, topology.parse("h100:8x8"))
    entries = traffic.collectives(program.trace(config, mesh))
    rows = [e for e in entries if (e.kind, e.dtype) == ("all-to-all", "bfloat16")]
    buffer = 80 * 2**20
    assert {e.bytes for e in rows} == {buffer * 7 // 8}
    assert sum(e.bytes * e.executions for e in rows) == times * 32 * buffer * 7 // 8
    assert sum(e.bytes * e.executions for e in rows) / 2**30 == {4: 8.75, 6: 13.125}[times]
    (exchange,) = useful(entries, config)
    assert exchange.expected_bytes == pytest.approx(exchange.buffer_bytes / 1.25)
    layers = [row for row in table(entries, config) if row.part == "exchange" and row.phase == "forward"]
    assert [(row.layers, row.executions) for row in layers] == [(32, 3 * 32)]


def test_rows_of_the_table_add_up():
    config = on(dict(fsdp=2, expert=4), remat="full", exchange="all_to_all")
    entries, _ = counted(config)
    rows = table(entries, config)
    assert sum(row.step_bytes for row in rows) == sum(e.bytes * e.executions for e in entries)
    assert sum(row.executions for row in rows) == sum(e.executions for e in entries)
    assert {row.phase for row in rows} == {"forward", "recompute", "backward", "step"}
    assert all(row.layer_bytes * row.layers == row.step_bytes for row in rows)
    assert {phase(e) for e in entries if part(e) == "exchange"} == {"forward", "backward"}


AXES = ("a", "b", "c")
MESH = jax.sharding.AbstractMesh((2, 4, 1), AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 3)


def of(function, *arrays):
    """(kind, axes, bytes of the operand, loops) of a function of arrays given as (shape, spec)."""
    with jax.sharding.use_abstract_mesh(MESH):
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, spec)) for shape, spec in arrays]
        jaxpr = jax.jit(function).trace(*arguments).jaxpr
    entries = traffic.collectives_of_jaxpr(what_runs(jaxpr), dict(MESH.shape))
    return [(e.kind, e.axes, operand_bytes(e, MESH.shape), e.loops) for e in entries]


def gathered(x):
    return jax.sharding.reshard(x, P(*(None,) * x.ndim))


ROWS, BOTH, COLUMNS = ((8, 16), P("a", None)), ((8, 16), P("a", "b")), ((8, 16), P(None, "b"))
ALL = 8 * 16 * 4  # bytes of the whole array


def looked_up(table, ids):
    return table.at[ids.astype(jnp.int32)].get(out_sharding=P("a", None))


def my_columns(x):
    return jax.sharding.reshard(x, P("b"))


def column(x):
    return jnp.sum(x, axis=0).reshape(16, 1)


def microbatches(x):
    def body(carry, x):
        return carry + jnp.sum(x, axis=0), None

    start = jax.sharding.reshard(jnp.zeros(16), P(None))
    return jax.lax.scan(body, start, jnp.stack([x, 2 * x, 3 * x]))[0]


def layers(x):
    def body(carry, _):
        return carry * jnp.sum(carry), None

    return jax.lax.scan(body, x, None, length=5)[0]


RULES = {
    "a sum over a split dimension": (lambda x: jnp.sum(x), [BOTH], [("all-reduce", ("a", "b"), 4, ())]),
    "a maximum over one of two": (lambda x: jnp.max(x, axis=0), [BOTH], [("all-reduce", ("a",), 16, ())]),
    "a sum over a whole dimension": (lambda x: jnp.sum(x, axis=1), [ROWS], []),
    "an axis dropped": (gathered, [ROWS], [("all-gather", ("a",), ALL // 2, ())]),
    "two axes dropped, the last first": (
        gathered,
        [BOTH],
        [("all-gather", ("b",), ALL // 8, ()), ("all-gather", ("a",), ALL // 2, ())],
    ),
    "an axis added": (lambda x: jax.sharding.reshard(x, P("a", "b")), [ROWS], []),
    "a product over a split dimension": (
        lambda x, y: jnp.einsum("td,tf->df", x, y, out_sharding=P(None, None)),
        [ROWS, ROWS],
        [("all-reduce", ("a",), 16 * 16 * 4, ())],
    ),
    "a product of rows": (lambda x, y: x @ gathered(y).T, [ROWS, ((8, 16), P(None, None))], []),
    "a lookup": (looked_up, [((32, 16), P(None, None)), ((8,), P("a"))], []),
    "a lookup's gradient": (
        lambda t, i: jax.grad(lambda t: jnp.sum(looked_up(t, i) ** 2))(t),
        [((32, 16), P(None, None)), ((8,), P("a"))],
        [("all-reduce", ("a",), 32 * 16 * 4, ())],
    ),
    "equal gathers": (lambda x: jnp.sin(gathered(x)) + jnp.cos(gathered(x)), [ROWS], [("all-gather", ("a",), ALL // 2, ())]),
    "sums that are added": (
        lambda x, y: jnp.sum(x, axis=0) + jnp.sum(y, axis=0),
        [ROWS, ROWS],
        [("all-reduce", ("a",), 64, ())],
    ),
    "sums of which each device takes its part": (
        lambda x, y: my_columns(jnp.sum(x, axis=0)) + my_columns(jnp.sum(y, axis=0)),
        [ROWS, ROWS],
        [("all-reduce", ("a",), 64, ())],
    ),
    "sums one of which is turned first": (
        lambda x, y: column(x) + column(y).reshape(1, 16).T,
        [ROWS, ROWS],
        [("all-reduce", ("a",), 64, ())] * 2,
    ),
    "sums that are used besides": (
        lambda x, y: (jnp.sum(x, axis=0) + (s := jnp.sum(y, axis=0)), s),
        [ROWS, ROWS],
        [("all-reduce", ("a",), 64, ())] * 2,
    ),
    "sums over other axes": (
        lambda x, y: jnp.sum(x) + jnp.sum(y),
        [ROWS, COLUMNS],
        [("all-reduce", (axis,), 4, ()) for axis in "ab"],
    ),
    "sums of microbatches": (microbatches, [ROWS], [("all-reduce", ("a",), 64, ())]),
    "a sum in a loop": (layers, [ROWS], [("all-reduce", ("a",), 4, (5,))]),
    "what nobody uses": (lambda x: (jnp.sum(x), x)[1], [ROWS], []),
    "half of a barrier": (lambda x, y: jax.lax.optimization_barrier((x, jnp.sum(y)))[0], [ROWS, ROWS], []),
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    function, arrays, expected = RULES[name]
    assert of(function, *arrays) == expected


REFUSED = {
    "an axis moved": (lambda x: jax.sharding.reshard(x, P(None, "a")), [ROWS], "reshard of .* becomes"),
    "no rule": (lambda x: jax.lax.top_k(x, 2), [ROWS], "top_k of .* not known"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_inferred_is_refused(name):
    function, arrays, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        of(function, *arrays)


@pytest.mark.matrix
@pytest.mark.parametrize("module", [m.name for m in pkgutil.iter_modules(published.__path__) if m.name != "presets"])
def test_no_published_model_has_an_equation_without_a_rule(module):
    config = from_dict(importlib.import_module(f"configs.published.{module}").get_config("h100-64"))
    mesh = topology.abstract_mesh(config, topology.parse("h100:8x8"))
    assert traffic.collectives(program.trace(config, mesh))
