"""The schedule of programs compiled for TPUs that are not there: what is computed while tokens travel."""

import functools

import jax
import jax.numpy as jnp
import pytest
import topology as topologies
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tpu_schedule import Pair, Schedule

from moe_jax.config import ModelConfig, MoEConfig, RouterConfig
from moe_jax.exchange.ragged_all_to_all import plan_ragged, ragged_all_to_all, reverse
from moe_jax.layers.moe import MoE
from moe_jax.mesh import AXES, batch_spec

ASYNC = {"xla_tpu_enable_async_all_to_all": True, "xla_tpu_enable_async_ragged_all_to_all": True}  # off unless asked for

SCHEDULE = """HloModule jit_f, is_scheduled=true, entry_computation_layout={()->f32[]}

FileNames
1 "f.py"

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(8,128)} parameter(0)
  ROOT %dot.1 = f32[8]{0} convolution(%p, %p), dim_labels=bf_io->bf, metadata={op_name="jit(f)/first"}
}

%body (q: (f32[8], s32[])) -> (f32[8], s32[]) {
  %q = (f32[8]{0}, s32[]{:T(128)}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%q), index=0
  %kernel = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/second"}
  ROOT %t = (f32[8]{0}, s32[]) tuple(%kernel, %x)
}

%gathered (r: f32[8]) -> f32[8] {
  %r = f32[8]{0} parameter(0)
  ROOT %ag = f32[8]{0} all-gather(%r), dimensions={0}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(8,128)} parameter(0)
  %go = ((f32[8]{0}), f32[8]{0}, u32[]{:S(2)}) all-to-all-start(%a), channel_id=1, metadata={op_name="jit(f)/out"}
  %one = f32[8]{0:T(8,128)(2,1)S(1)} fusion(%a), kind=kOutput, calls=%fused
  %go.2 = (f32[8]{0}, f32[8]{0}) ragged-all-to-all-start(%a, %one), channel_id=1
  %come = f32[8]{0} all-to-all-done(%go)
  %two = (f32[8]{0}, /*index=1*/s32[]) while(%come), condition=%cond, body=%body
  %come.2 = f32[8]{0} ragged-all-to-all-done(%go.2)
  %async-collective-start = (f32[8]{0}) fusion(%come.2), kind=kCustom, calls=%gathered
  %three = f32[8]{0} dot(%come.2, %come.2), metadata={op_name="jit(f)/third"}
  %async-collective-done = f32[8]{0} fusion(%async-collective-start), kind=kCustom, calls=%gathered
  ROOT %last = f32[8]{0} all-to-all(%async-collective-done), dimensions={0}
}
"""


def test_parser():
    schedule = Schedule.of(SCHEDULE)
    assert schedule.pairs() == [
        Pair("all-to-all", "jit(f)/out", "main", ("jit(f)/first",)),
        Pair("ragged-all-to-all", "go.2", "main", ("jit(f)/second",)),
        Pair("all-gather", "async-collective-start", "main", ("jit(f)/third",)),
    ]
    assert schedule.synchronous()["all-to-all"] == 1
    with pytest.raises(ValueError, match="no schedule"):
        Schedule.of(SCHEDULE.replace("is_scheduled=true, ", ""))


def toy(exchange):
    """Two chunks of tokens, each sent, multiplied twice, sent home."""

    def body(x_TD, w_DD, rows_n):
        def chunk(x_TD):
            send, home = exchange(x_TD, rows_n)
            return home(jax.nn.gelu(send(x_TD) @ w_DD) @ w_DD)

        return jnp.concatenate([chunk(x_TD) for x_TD in jnp.split(x_TD, 2)])

    return body


def dense(x_TD, rows_n):
    send = functools.partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0, tiled=True)
    return send, send


def ragged(x_TD, rows_n):
    plan = plan_ragged(rows_n, x_TD.shape[0], axis_name="expert")
    move = functools.partial(ragged_all_to_all, axis_name="expert")
    out = lambda x_TD: move(x_TD, jnp.zeros_like(x_TD), *plan.arguments)  # noqa: E731
    home = lambda y_TD: move(y_TD, jnp.zeros_like(x_TD), *reverse(plan).arguments)  # noqa: E731
    return out, home


def mesh_of_tpus(name):
    devices = topologies.devices(name)
    axis_types = (AxisType.Explicit,) * len(AXES)
    return jax.make_mesh((1, 1, 1, len(devices), 1), AXES, axis_types=axis_types, devices=devices)


def abstract(mesh, shape, dtype, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def toy_schedule(exchange, topology, options):
    mesh = mesh_of_tpus(topology)
    n, width, split = mesh.size, 1024, P("expert")
    with jax.set_mesh(mesh):
        step = jax.jit(jax.shard_map(toy(exchange), in_specs=(split, P(), split), out_specs=split))
        x_TD, w_DD = abstract(mesh, (n * 2048, width), jnp.bfloat16, split), abstract(mesh, (width, width), jnp.bfloat16, P())
        lowered = step.lower(x_TD, w_DD, abstract(mesh, (n * n,), jnp.int32, split))
        return Schedule.of(lowered.compile(compiler_options=options).as_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exchange", "collective", "topology"),
    [
        (dense, "all-to-all", "v5p:2x2x1"),
        (dense, "all-to-all", "v5e:2x4"),
        (dense, "all-to-all", "v6e:2x4"),
        (ragged, "ragged-all-to-all", "v5p:2x2x1"),
        (ragged, "ragged-all-to-all", "v5e:2x4"),
    ],
)
def test_one_chunk_travels_while_the_other_is_multiplied(exchange, collective, topology):
    schedule = toy_schedule(exchange, topology, ASYNC)
    products = [len(pair.compute) for pair in schedule.pairs() if pair.collective == collective]
    assert len(products) + schedule.synchronous()[collective] == 4
    assert sum(count > 0 for count in products) >= 2  # the second way out, and the first way home


@pytest.mark.slow
@pytest.mark.parametrize(("exchange", "collective"), [(dense, "all-to-all"), (ragged, "ragged-all-to-all")])
def test_nothing_overlaps_unless_asked_for(exchange, collective):
    schedule = toy_schedule(exchange, "v5p:2x2x1", {})
    assert schedule.synchronous()[collective] == 4
    assert collective not in {pair.collective for pair in schedule.pairs()}


def layer_schedule():
    """The schedule of a whole MoE layer with shared experts and two chunks, forward, on four v5p chips."""
    mesh, width, length = (
        mesh_of_tpus("v5p:2x2x1"),
        1024,
        4096,
    )  # with less to multiply, the compiler does not find it worth while
    moe = MoEConfig(
        num_experts=2 * mesh.size,
        d_ff=width,
        num_shared_experts=1,
        router=RouterConfig("mixtral", 2),
        exchange="all_to_all",
        exchange_factor=1.25,
        exchange_chunks=2,
    )
    model = ModelConfig(d_model=width, moe=moe)
    with jax.set_mesh(mesh):
        make = lambda: nnx.split(MoE(model, 0.02, jnp.bfloat16, rngs=nnx.Rngs(0)))  # noqa: E731
        graphdef, state = jax.eval_shape(make)
        state = jax.tree.map(lambda w: abstract(mesh, w.shape, w.dtype, w.sharding.spec), state)
        tokens = [abstract(mesh, (mesh.size, length), dtype, batch_spec(2)) for dtype in (jnp.bool_, jnp.int32)]
        x_BSD = abstract(mesh, (mesh.size, length, width), jnp.bfloat16, batch_spec(3))
        forward = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs)[0])
        return Schedule.of(forward.lower(state, x_BSD, *tokens).compile(compiler_options=ASYNC).as_text())


@pytest.mark.slow
def test_what_a_layer_does_while_tokens_travel():
    """The shared experts do not wait for the exchange, and the routed ones work on one chunk while another is on its way."""
    pairs = [pair for pair in layer_schedule().pairs() if pair.collective == "all-to-all"]
    meanwhile = [source for pair in pairs for source in pair.compute if "shard_map" not in source]
    assert {source.split("/")[-2] for source in meanwhile} == {"TD,DF->TF", "TF,FD->TD"}  # of layers.mlp, no expert's
    during = [[source for source in pair.compute if "shard_map" in source] for pair in pairs]
    assert sum(len(sources) > 0 for sources in during) >= 2  # the second chunk's way out, the first one's way home
