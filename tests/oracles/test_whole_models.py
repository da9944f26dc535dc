"""Our decoder against transformers' Mixtral, Qwen3-MoE and Llama: the same weights give the same numbers.

Logits wherever there is a token, the loss with its auxiliary part, every parameter's gradient, and every layer's expert loads, at
float32 tolerance. Theirs is the eager arithmetic: attention by two matrix products, experts in a Python loop.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from copy_weights import gradients, our_params, randomise, values
from flax import nnx
from tolerance import assert_close

from moe_jax.config import AttentionConfig, Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, RopeConfig, RouterConfig
from moe_jax.mesh import make_mesh, shard_batch
from moe_jax.models.transformer import abstract, token_ids
from moe_jax.routing import losses
from moe_jax.train import objective as obj

pytestmark = pytest.mark.slow

BATCH, SEQ_LEN = 16, 13
AUX_COEFFICIENT = 0.5  # large enough that a wrong auxiliary gradient shows
EAGER = dict(attn_implementation="eager", experts_implementation="eager", max_position_embeddings=64)
ONE, EIGHT = MeshConfig(data=1), MeshConfig(data=1, fsdp=2, expert=2, tensor=2)


def _sizes(model: ModelConfig) -> dict:
    """What all their configurations call alike."""
    return dict(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.attention.num_heads,
        num_key_value_heads=model.attention.num_kv_heads,
        head_dim=model.attention.head_dim,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.attention.rope.theta},
        tie_word_embeddings=model.tied_embeddings,
        pad_token_id=None,
        **EAGER,
    )


def _mixtral(model):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        intermediate_size=model.moe.d_ff,
        num_local_experts=model.moe.num_experts,
        num_experts_per_tok=model.moe.router.top_k,
        sliding_window=model.attention.window or None,
        output_router_logits=True,
        router_aux_loss_coef=AUX_COEFFICIENT,
        **_sizes(model),
    )
    return MixtralForCausalLM(config)


def _qwen3_moe(model):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        intermediate_size=model.d_ff,
        moe_intermediate_size=model.moe.d_ff,
        num_experts=model.moe.num_experts,
        num_experts_per_tok=model.moe.router.top_k,
        mlp_only_layers=[i for i in range(model.num_layers) if not model.is_moe_layer(i)],
        norm_topk_prob=False,
        output_router_logits=True,
        router_aux_loss_coef=AUX_COEFFICIENT,
        **_sizes(model),
    )
    return Qwen3MoeForCausalLM(config)


def _llama(model):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(intermediate_size=model.d_ff, attention_bias=model.attention.qkv_bias, **_sizes(model)))


@dataclass(frozen=True)
class Case:
    """Their model, ours, the batch ("padded" on the right, or "packed" with two documents a row), and our mesh."""

    theirs: Callable[[ModelConfig], Any]
    ours: ModelConfig
    batch: str
    mesh: MeshConfig = ONE


ODD = ModelConfig(
    vocab_size=37,
    d_model=21,
    num_layers=3,
    d_ff=30,
    norm_eps=3e-3,
    remat="none",
    attention=AttentionConfig(num_heads=6, num_kv_heads=3, head_dim=10, rope=RopeConfig(theta=50.0)),
    moe=MoEConfig(num_experts=5, d_ff=11, num_shared_experts=0, router=RouterConfig("mixtral", 2)),
)
EVEN = replace(  # divides over eight devices
    ODD,
    vocab_size=38,
    d_model=20,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, rope=RopeConfig(theta=50.0)),
    moe=replace(ODD.moe, num_experts=8, d_ff=12),
)
DENSE = replace(ODD, d_model=24, moe=MoEConfig(num_experts=0))  # their Llama wants a multiple of the heads
CASES = {
    "mixtral, window": Case(_mixtral, replace(ODD, attention=replace(ODD.attention, window=4)), "padded"),
    "mixtral, eight devices": Case(_mixtral, EVEN, "padded", EIGHT),
    "qwen3-moe": Case(
        _qwen3_moe,
        replace(
            ODD,
            attention=replace(ODD.attention, qk_norm="head"),
            moe=replace(
                ODD.moe,
                first_dense=1,
                every=2,
                router=RouterConfig("mixtral", 3, {"normalize": "before"}),
                balance_loss_weight=3 * AUX_COEFFICIENT,  # one MoE layer: theirs is top_k times ours, and nothing is pooled
            ),
        ),
        "padded",
    ),
    "llama": Case(_llama, DENSE, "packed"),
}


def _batch(kind: str, vocab_size: int) -> dict[str, np.ndarray]:
    """A batch in our form. The next token is a target where it belongs to the same document."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, vocab_size, (BATCH, SEQ_LEN))
    column, cut = np.arange(SEQ_LEN)[None], rng.integers(3, SEQ_LEN - 3, (BATCH, 1))
    segments = {"padded": column < cut + 3, "packed": 1 + (column >= cut)}[kind].astype(int)
    following = np.pad(segments[:, 1:], ((0, 0), (0, 1)))
    positions = np.where((kind == "packed") & (column >= cut), column - cut, column)
    integers = dict(tokens=tokens, targets=np.roll(tokens, -1, axis=1), segment_ids=segments, positions=positions)
    weights = ((following == segments) & (segments > 0)).astype(np.float32)
    return {name: array.astype(np.int32) for name, array in integers.items()} | {"loss_weights": weights}


def _theirs(name: str) -> tuple:
    """(model after a backward pass, its output, the batch in our form)."""
    import torch

    torch.set_num_threads(1)
    case = CASES[name]
    model = case.theirs(case.ours)
    randomise(model, seed=0)
    batch = _batch(case.batch, case.ours.vocab_size)
    counts = np.pad(batch["loss_weights"][:, :-1], ((0, 0), (1, 0)))  # they shift the labels themselves
    labels = torch.tensor(np.where(counts > 0, batch["tokens"], -100), dtype=torch.long)
    # restarting positions, without a mask, are how they are told of several documents in a row
    rows = (
        dict(position_ids=torch.tensor(batch["positions"], dtype=torch.long))
        if case.batch == "packed"
        else dict(attention_mask=torch.tensor(batch["segment_ids"], dtype=torch.long))
    )
    output = model(torch.tensor(batch["tokens"], dtype=torch.long), labels=labels, use_cache=False, **rows)
    output.loss.backward()
    return model, output, batch


def _pooled_balance_loss(sums: obj.Sums, totals: obj.Totals, top_k: int) -> jax.Array:
    """Theirs: tokens of all layers pooled before the product, and f summed over the choices (`routing.losses`)."""
    load_LE, prob_sum_LE = sums.routing.load_E, sums.routing.prob_sum_E
    return top_k * losses.balance_loss(load_LE.sum(0), prob_sum_LE.sum(0), totals.tokens * load_LE.shape[0])


def _ours(name: str) -> tuple:
    """(logits, loss, their auxiliary loss, sums, gradients), computed on the case's mesh with their weights."""
    model, _, batch = _theirs(name)
    case = CASES[name]
    config = Config(model=case.ours, mesh=case.mesh, data=DataConfig(seq_len=SEQ_LEN, batch_size=BATCH))
    mesh = make_mesh(config, jax.devices()[: np.prod(case.mesh.shape)])
    pool = case.ours.num_moe_layers > 1  # one layer: the objective's own balance loss is compared
    with jax.set_mesh(mesh):
        graphdef, shapes, bias = abstract(config.model)
        assert not jax.tree.leaves(bias)
        shapes, copied = nnx.to_pure_dict(shapes), our_params(values(model), config.model, type(model).__name__)
        assert jax.tree.map(np.shape, copied) == jax.tree.map(np.shape, shapes)
        params = jax.tree.map(lambda new, like: jax.device_put(new, like.sharding.spec), copied, shapes)
        objective = partial(obj.objective, graphdef=graphdef, config=config.model)

        @jax.jit
        def logits_fn(params, batch):
            return nnx.merge(graphdef, params, bias)(batch["tokens"], batch["segment_ids"], batch["positions"])[0]

        @jax.jit
        @partial(jax.value_and_grad, has_aux=True)
        def loss_fn(params, batch):
            totals = obj.count(batch)
            batch = batch | {"token_id": token_ids(batch["tokens"])}
            loss, (sums, _) = objective(params, bias, batch, None, totals)
            aux = 0.0 if sums.routing is None else _pooled_balance_loss(sums, totals, case.ours.moe.router.top_k)
            return loss + pool * AUX_COEFFICIENT * aux, (aux, sums)

        # Two programs, one after the other: two independent passes in one may hang on emulated devices, as XLA:CPU lets each
        # device choose which pass's collective to wait in.
        batch = shard_batch(mesh, batch)
        logits = jax.device_get(logits_fn(params, batch))
        (loss, (aux, sums)), grads = jax.device_get(loss_fn(params, batch))
        return logits, loss, aux, sums, grads


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_as_transformers(name):
    model, output, batch = _theirs(name)
    logits, loss, aux, sums, grads = _ours(name)
    is_token = batch["segment_ids"] > 0
    assert_close(logits[is_token], output.logits.detach().numpy()[is_token], what="logits")
    assert_close(loss, output.loss.detach().numpy(), what="loss")
    config = CASES[name].ours
    if config.num_moe_layers:
        assert_close(aux, output.aux_loss.detach().numpy(), what="auxiliary loss")
        scores = np.stack([layer.detach().numpy()[is_token.ravel()] for layer in output.router_logits])
        ranked = -np.sort(-scores, axis=-1)
        top_k = config.moe.router.top_k
        assert np.min(ranked[..., top_k - 1] - ranked[..., top_k]) > 1e-4, "a near tie: choose another seed"
        chosen = scores >= ranked[..., top_k - 1 : top_k]
        np.testing.assert_array_equal(sums.stats.load_E, chosen.sum(1))
        assert_close(sums.routing.z_sum, np.sum(np.log(np.exp(scores).sum(-1)) ** 2, -1), what="router z")
    jax.tree_util.tree_map_with_path(_same_gradient, grads, our_params(gradients(model), config, type(model).__name__))


def _same_gradient(path, actual, expected):
    name = jax.tree_util.keystr(path)
    assert np.abs(expected).max() > 1e-5, f"{name} is not exercised"
    assert_close(actual, expected, what=name)
