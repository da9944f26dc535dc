"""Weights in 8 and 4 bits against NumPy written out here: integers, scales, bounds, names, layouts, refusals."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

from moe_jax.config import AttentionConfig, ConfigError, RouterConfig
from moe_jax.models.transformer import abstract
from moe_jax.ops import quantised
from moe_jax.ops.quantised import SUMMED, Format, Quantised, format_of, spec_of, summed_axes
from moe_jax.ops.quantised_tree import quantise_tree
from moe_jax.routing import ROUTERS, make_router

quantise = jax.jit(quantised.quantise, static_argnums=(0, 2))
dequantise = jax.jit(quantised.dequantise, static_argnums=1)

# By name, beside the routers' own: what a serving model keeps in floating point.
KEPT = re.compile(r"(scale|bias|b|bq|bk|bv|bo|b_up|b_gate|b_down|sink|table)_[A-Z]+|w_shared_gate_D")
SHAPES = {
    "wq_DHN": (16, 3, 4),
    "wo_HND": (4, 8, 6),
    "wk_up_RHN": (8, 2, 4),
    "w_gate_DF": (24, 6),
    "w_down_EFD": (3, 16, 4),
}


def weights(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def oracle(name, w, how):
    """(integers, scales repeated to the weight's shape), float32 NumPy."""
    w, letters = np.asarray(w, np.float32), name.rsplit("_", 1)[1]
    axes = [letters.index(letter) for letter in SUMMED[letters]]
    rows = np.moveaxis(w, axes, range(-len(axes), 0))
    grouped = rows.reshape(-1, how.group or np.prod([w.shape[axis] for axis in axes]))
    half_steps = 2 ** (how.bits - 1) - 0.5
    scale = np.abs(grouped).max(axis=1, keepdims=True) * np.float32(1.0001) / np.float32(half_steps)
    scale = np.broadcast_to(np.where(scale < 1e-19, np.float32(1), scale), grouped.shape)
    back = [np.moveaxis(a.reshape(rows.shape), range(-len(axes), 0), axes) for a in (np.round(grouped / scale), scale)]
    return back[0].astype(np.int32), back[1]


CASES = [(name, how, "float32") for name in SHAPES for how in ("int8", "int4:8")] + [
    ("wo_HND", "int4:4", "float32"),  # half a head
    ("wo_HND", "int4:16", "float32"),  # two heads
    ("w_down_EFD", "int8", "bfloat16"),
    ("w_down_EFD", "int4:2", "bfloat16"),
]


@pytest.mark.parametrize(("name", "how", "dtype"), CASES)
def test_integers_scales_and_the_bound_of_half_a_step(name, how, dtype):
    w, how = weights(SHAPES[name], dtype=dtype), format_of(how)
    q = quantise(name, w, how)
    integers, scale = oracle(name, w, how)
    np.testing.assert_array_equal(q.qarray().qvalue, integers)
    assert np.abs(integers).max() == 2 ** (how.bits - 1) - 1
    dq = np.asarray(dequantise(q, jnp.float32))
    np.testing.assert_allclose(dq, integers * scale, rtol=1e-6)
    assert np.all(np.abs(dq - np.asarray(w, np.float32)) <= scale / 2)
    np.testing.assert_array_equal(dequantise(q, dtype), dq.astype(dtype))
    assert q.shape == w.shape
    assert q.nbytes == w.size * how.bits // 8 + q.scale.size * 4
    assert q.scale.size == w.size // (how.group or np.prod([w.shape[axis] for axis in summed_axes(name)]))


def test_numbers_that_the_format_has_come_back():
    step = np.float32(2.0**-6)
    w = step * np.arange(-7, 8, dtype=np.float32)[:, None]
    largest = step * np.float32(7.5 / 1.0001)  # makes the scale `step`
    q = quantise("w_up_DF", jnp.concatenate([w, jnp.full((1, 1), largest)]), Format(4, 16))
    np.testing.assert_array_equal(q.qarray().qvalue[:15, 0], np.arange(-7, 8))
    np.testing.assert_allclose(dequantise(q, jnp.float32)[:15], w, rtol=1e-6, atol=0)
    for how in (Format(8), Format(4, 8)):
        np.testing.assert_array_equal(dequantise(quantise("w_up_DF", jnp.zeros((8, 2)), how), jnp.float32), 0)


def test_two_integers_in_a_byte_the_first_in_the_low_half():
    byte = jnp.array([[0x21, 0x0F], [0xF1, 0x78]], jnp.uint8).view(jnp.int8)
    ones = jnp.ones((1, 2))
    np.testing.assert_array_equal(Quantised(byte, ones, -2).qarray().qvalue, [[1, -1], [2, 0], [1, -8], [-1, 7]])
    np.testing.assert_array_equal(Quantised(byte, ones, -1).qarray().qvalue, [[1, 2, -1, 0], [1, -1, -8, 7]])


def test_a_large_weight_coarsens_its_own_group_alone():
    w = np.array(weights((4, 8, 3)))
    plain = quantise("wo_HND", w, Format(4, 16))  # a group is two heads
    w[1, 2, 0] = 1000
    spoilt = quantise("wo_HND", w, Format(4, 16))
    changed = np.asarray(dequantise(plain, jnp.float32) != dequantise(spoilt, jnp.float32))
    assert changed[:2, :, 0].any()
    assert not changed[2:].any()
    assert not changed[..., 1:].any()


def test_the_layers_and_experts_of_a_weight_are_taken_from_both_arrays():
    w_LEFD = weights((2, 3, 16, 4))
    for how in (Format(8), Format(4, 8)):
        q = quantise("w_down_EFD", w_LEFD, how)
        one = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a[1], jnp.int32(2), keepdims=False), q)
        assert one.shape == (16, 4)
        np.testing.assert_array_equal(dequantise(one, jnp.float32), dequantise(q, jnp.float32)[1, 2])
        alone = quantise("w_down_FD", w_LEFD[1, 2], how)
        np.testing.assert_array_equal(one.values, alone.values)


ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4)
LATENT = AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=4, kv_rank=8, q_rank=12, rope_head_dim=4, v_head_dim=4)
MODELS = {
    "every bias": {
        "attention": dataclasses.replace(ATTENTION, qkv_bias=True, out_bias=True, sinks=True, qk_norm="full"),
        "norm": "layer",
        "head_bias": True,
    },
    "head norms": {"attention": dataclasses.replace(ATTENTION, qk_norm="head"), "post_norms": True, "tied_embeddings": True},
    "latent": {"attention": LATENT, "mtp_layers": 1},
    "latent without q_rank": {"attention": dataclasses.replace(LATENT, q_rank=0), "activation": "gelu"},
}


def names_of(model):
    config = tiny.config(model=model, expert_bias=True, shared_gate=True).model
    with jax.set_mesh(mesh_of()):
        return [path[-1] for path in nnx.to_flat_state(abstract(config)[1]).paths]


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_of_a_model_has_a_rule_or_is_known_to_stay(model):
    for name in names_of(MODELS[model]):
        stays = name.startswith(("w_router", "b_router")) or KEPT.fullmatch(name)
        assert (summed_axes(name) is None) == bool(stays), name


def test_every_rule_is_some_parameters_and_those_that_one_would_name():
    names = {name for model in MODELS.values() for name in names_of(model)}
    assert {name.rsplit("_", 1)[1] for name in names if summed_axes(name)} == set(SUMMED)
    by_hand = {"wo_HND": (-3, -2), "w_down_EFD": (-2,), "w_gate_DF": (-2,), "wq_up_RHN": (-3,), "w_embed_DD": (-2,)}
    assert {name: summed_axes(name) for name in by_hand} == by_hand


@pytest.mark.parametrize("family", ROUTERS)
def test_routers_parameters_stay(family):
    def make(top_k):
        try:
            return make_router(RouterConfig(family, top_k), 4)
        except ConfigError:  # a family of one expert a token, or of all
            return None

    router = make(2) or make(1) or make(4)
    assert not [name for name in router.params(8) if summed_axes(name)]


def test_a_routers_matrix_stays_whatever_its_letters():
    assert summed_axes("w_router_hidden_DF") is None
    assert summed_axes("w_hidden_DF") == (-2,)


PARAMS = {
    "groups": {"moe": {"experts": {"w_up_EDF": (2, 3, 16, 4), "w_down_EFD": (2, 3, 8, 16), "b_up_EF": (2, 3, 4)}}},
    "dense": {0: {"w_up1_DF": (16, 8)}, 1: {"w_up20_DF": (16, 8), "scale_D": (16,)}},
    "embed": {"table_VD": (10, 16)},
}


def params():
    shapes, structure = jax.tree.flatten(PARAMS, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return structure.unflatten([weights(shape, seed) for seed, shape in enumerate(shapes)])


@pytest.mark.parametrize("how", ["int8", "int4:4"])
def test_the_report_of_a_model(how):
    whole = params()
    tree, report = quantise_tree(whole, format_of(how))
    kinds = {kind.name: kind for kind in report.kinds}
    assert set(kinds) == {"w_up_EDF", "w_down_EFD", "b_up_EF", "w_up_DF", "scale_D", "table_VD"}
    for name in ("b_up_EF", "scale_D", "table_VD"):
        assert kinds[name].error is None
        assert kinds[name].bytes_before == kinds[name].bytes_after
    assert tree["embed"]["table_VD"] is whole["embed"]["table_VD"]
    pair = [[of["dense"][0]["w_up1_DF"], of["dense"][1]["w_up20_DF"]] for of in (whole, tree)]
    lost = [np.asarray(dequantise(q, jnp.float32) - w, np.float64) for w, q in zip(*pair, strict=True)]
    expected = np.sqrt(np.mean(np.square(lost)) / np.mean(np.square(np.asarray(pair[0], np.float64))))
    kind = kinds["w_up_DF"]
    np.testing.assert_allclose(kind.error, expected, rtol=1e-5)
    bits = {"int8": (8, 16), "int4:4": (4, 4)}[how]
    assert kind[1:5] == (2, 256, 1024, 256 * bits[0] // 8 + 256 // bits[1] * 4)
    assert report.bytes_after == sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert report.bytes_before == sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    assert f"{kind.error:.2%}" in next(line for line in str(report).splitlines() if line.startswith("w_up_DF"))


def test_none_leaves_everything():
    whole = params()
    tree, report = quantise_tree(whole, format_of("none"))
    assert all(a is b for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(whole), strict=True))
    assert report.bytes_before == report.bytes_after
    assert all(kind.error is None for kind in report.kinds)


class Layer(nnx.Module):
    def __init__(self):
        self.w_DF, self.b_F = nnx.Param(weights((16, 4))), nnx.Param(jnp.zeros(4))


def test_a_module_holds_one_in_a_param():
    graphdef, state = nnx.split(Layer())
    tree, _ = quantise_tree(nnx.to_pure_dict(state), Format(4, 8))

    @jax.jit
    def read(tree):
        return dequantise(nnx.merge(graphdef, tree).w_DF.get_value(), jnp.float32)

    np.testing.assert_array_equal(read(tree), dequantise(tree["w_DF"], jnp.float32))
    again = nnx.to_pure_dict(nnx.state(nnx.merge(graphdef, tree)))
    assert jax.tree.structure(again) == jax.tree.structure(tree)


SPEC = P("expert", "tensor", "fsdp")


@pytest.mark.parametrize("how", ["int8", "int4:4"])
def test_on_a_mesh_the_same_numbers_laid_out_as_the_weight(how):
    w, how = weights((4, 16, 6)), format_of(how)
    alone = quantise("w_down_EFD", w, how)
    mesh = mesh_of(fsdp=2, expert=2, tensor=2)
    with jax.set_mesh(mesh):
        q = quantise("w_down_EFD", jax.device_put(w, NamedSharding(mesh, SPEC)), how)
        specs = spec_of(q, SPEC)
        assert (specs.values, specs.scale) == (SPEC, P("expert", None, "fsdp") if how.bits == 8 else SPEC)
        assert [jax.typeof(array).sharding.spec for array in (q.values, q.scale)] == [specs.values, specs.scale]
        np.testing.assert_array_equal(q.values, alone.values)
        np.testing.assert_allclose(q.scale, alone.scale, rtol=1e-6)
        whole = dequantise(q, jnp.float32)
        assert jax.typeof(whole).sharding.spec == SPEC
        parts = jax.shard_map(lambda q: dequantise(q, jnp.float32), in_specs=(specs,), out_specs=SPEC)(q)
        np.testing.assert_array_equal(parts, whole)
    np.testing.assert_allclose(whole, dequantise(alone, jnp.float32), rtol=1e-6)


def test_groups_that_a_mesh_cuts_are_refused():
    mesh, w = mesh_of(tensor=4), weights((48, 6))
    with jax.set_mesh(mesh):
        split = jax.device_put(w, NamedSharding(mesh, P("tensor", None)))
        with pytest.raises(
            ConfigError, match=r"'int4:8' does not divide the 12 values that w_down_FD sums over.*int4:6 is the nearest"
        ):
            quantise("w_down_FD", split, Format(4, 8))
        with pytest.raises(ConfigError, match=r"3 scales along 48 cannot be split in 4 .*'tensor'"):
            spec_of(quantise("w_down_FD", w, Format(4, 16)), P("tensor", None))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "int5",
            "serve.weights = 'int5' is no format of weights: did you mean 'int[48]'\\? there are none, int8, int4 and int4:GROUP.",
        ),
        ("fp8", "there are none, int8, int4 and int4:GROUP"),
        ("int8:32", "no format of weights"),
        ("int4:7", "groups of 7; give an even number"),
        ("int4:0", "groups of 0; give an even number"),
    ],
)
def test_formats_that_are_not_there(name, message):
    with pytest.raises(ConfigError, match=message) as refused:
        format_of(name, "serve.weights")
    assert re.fullmatch(r"serve\.weights = .*\.", str(refused.value))


def test_format_names():
    assert [str(format_of(name)) for name in ("int8", "int4", "int4:128")] == ["int8", "int4:64", "int4:128"]
    assert format_of("none") is None


def test_a_group_that_does_not_divide_is_refused_before_anything_with_the_nearest_that_does():
    with pytest.raises(
        ConfigError, match=r"w = 'int4:16' does not divide the 8 values that w_down_EFD sums over.*; int4:8 is the near"
    ):
        quantise_tree(params(), Format(4, 16), "w")
    with pytest.raises(ConfigError, match=r"does not divide the 4 x 6 values that wo_HND .*; int4:6 is the nearest"):
        quantise("wo_HND", weights((4, 6, 2)), Format(4, 8))
    with pytest.raises(ConfigError, match=r"5 values that w_up_DF .*; nor does any other .*; use int8"):
        quantise("w_up_DF", weights((5, 2)), Format(4, 2))
    with pytest.raises(ConfigError, match="w_router_DE is no matrix that is quantised"):
        quantise("w_router_DE", weights((8, 2)), Format(8))
