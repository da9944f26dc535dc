"""Our routers, their losses and the DeepSeek MoE block against transformers': the same experts, weights and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from copy_weights import gradients, moe_params, randomise, values
from flax import nnx
from routes import routed
from tolerance import assert_close

from moe_jax.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, RouterConfig
from moe_jax.layers.moe import MoE, RouterState
from moe_jax.mesh import make_mesh, shard_batch
from moe_jax.models.transformer import token_ids
from moe_jax.routing import losses, make_router

pytestmark = pytest.mark.slow

BATCH, SEQ_LEN, WIDTH, EXPERTS = 8, 13, 20, 12
TOKENS = BATCH * SEQ_LEN
X_TD = np.random.default_rng(1).normal(size=(TOKENS, WIDTH)).astype(np.float32)
COTANGENT_TE = np.random.default_rng(2).normal(size=(TOKENS, EXPERTS)).astype(np.float32)
MASK_T = np.ones(TOKENS, bool)

# Positive and negative biased affinities. Releases that mask the groups that lose with 0.0, not -inf, fail the second (vLLM
# #13474): there an expert of such a group beats one whose biased affinity is negative.
BIASES = {
    "positive": np.linspace(0, 0.4, EXPERTS, dtype=np.float32),
    "negative": np.linspace(-2, -1.2, EXPERTS, dtype=np.float32),
}


def _ours(config, w_DE, bias_E):
    """(logits, weights, chosen as 0 or 1, each [T, E]; gradients by X_TD and w_DE) of a router on one device."""
    router = make_router(config, EXPERTS)

    @jax.value_and_grad
    def weigh(inputs):
        routing = routed(router, *inputs, bias_E, MASK_T)
        return jnp.sum(_dense(routing, routing.weight_A) * COTANGENT_TE)

    routing = routed(router, X_TD, w_DE, bias_E, MASK_T)
    _, grads = weigh((X_TD, w_DE))
    return routing.logits_TE, _dense(routing, routing.weight_A), _dense(routing, jnp.ones_like(routing.weight_A)), grads


def _dense(routing, value_A):
    return jnp.zeros((TOKENS, EXPERTS)).at[routing.token_A, routing.expert_A].add(value_A)


def _compare(router, config, bias_E=None):
    """Compares ours with a torch module that returns logits, weights [T, K] and experts [T, K]."""
    import torch

    router.weight.data = torch.tensor(np.random.default_rng(3).normal(0, 0.4, (EXPERTS, WIDTH)), dtype=torch.float32)
    x = torch.tensor(X_TD, requires_grad=True)
    logits_TE, weight_TK, expert_TK = router(x)
    weight_TE = torch.zeros(TOKENS, EXPERTS).scatter(1, expert_TK, weight_TK)
    (weight_TE * torch.tensor(COTANGENT_TE)).sum().backward()

    bias_E = np.zeros(EXPERTS, np.float32) if bias_E is None else bias_E
    ours = _ours(config, router.weight.detach().numpy().T, bias_E)
    assert_close(ours[0], logits_TE.detach().numpy(), what="logits")
    np.testing.assert_array_equal(ours[2], torch.zeros(TOKENS, EXPERTS).scatter(1, expert_TK, 1.0).numpy())
    assert_close(ours[1], weight_TE.detach().numpy(), what="weights")
    assert_close(ours[3][0], x.grad.numpy(), what="gradient by x")
    assert_close(ours[3][1], router.weight.grad.numpy().T, what="gradient by the router")


@pytest.mark.parametrize(
    ("family", "normalize", "option"),
    [
        ("mixtral", "after", {}),
        ("olmoe", "before", {"norm_topk_prob": False}),
        ("olmoe", "after", {"norm_topk_prob": True}),
        ("qwen3_moe", "before", {"norm_topk_prob": False}),
        ("qwen3_moe", "after", {"norm_topk_prob": True}),
    ],
)
def test_softmax_routers(family, normalize, option):
    from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    config_of, router_of = {
        "mixtral": (MixtralConfig, MixtralTopKRouter),
        "olmoe": (OlmoeConfig, OlmoeTopKRouter),
        "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeTopKRouter),
    }[family]
    router = router_of(config_of(hidden_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=3, **option))
    _compare(router, RouterConfig("mixtral", 3, {"normalize": normalize}))


def _deepseek_config(normalize=True):
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        hidden_size=WIDTH,
        moe_intermediate_size=10,
        n_routed_experts=EXPERTS,
        n_shared_experts=2,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
        experts_implementation="eager",
    )


def _our_deepseek(normalize=True):
    return RouterConfig("deepseek", 3, {"num_groups": 4, "top_groups": 2, "normalize": normalize, "scale": 2.5})


@pytest.mark.parametrize("sign", BIASES)
@pytest.mark.parametrize("normalize", [True, False])
def test_deepseek_router(normalize, sign):
    import torch
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    router = DeepseekV3TopkRouter(_deepseek_config(normalize))
    router.e_score_correction_bias = torch.tensor(BIASES[sign])
    _compare(router, _our_deepseek(normalize), BIASES[sign])


@pytest.mark.parametrize("mesh", [MeshConfig(data=1), MeshConfig(data=2, expert=4)])
def test_deepseek_block_with_shared_experts(mesh):
    import torch
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    block = DeepseekV3MoE(_deepseek_config())
    randomise(block, seed=4)
    block.gate.e_score_correction_bias = torch.tensor(BIASES["positive"])
    x = torch.tensor(X_TD.reshape(BATCH, SEQ_LEN, WIDTH), requires_grad=True)
    cotangent = np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
    y = block(x)
    (y * torch.tensor(cotangent)).sum().backward()

    moe = MoEConfig(num_experts=EXPERTS, d_ff=10, num_shared_experts=2, router=_our_deepseek())
    config = Config(model=ModelConfig(d_model=WIDTH, moe=moe), mesh=mesh, data=DataConfig(seq_len=SEQ_LEN, batch_size=BATCH))
    mesh = make_mesh(config, jax.devices()[: np.prod(mesh.shape)])
    with jax.set_mesh(mesh):
        actual_y, (dparams, dx) = _run_layer(config.model, mesh, block, cotangent)
    assert_close(actual_y, y.detach().numpy(), what="output")
    assert_close(dx, x.grad.numpy(), what="gradient by x")
    expected = moe_params(gradients(block), config.model)
    jax.tree_util.tree_map_with_path(lambda p, a, e: assert_close(a, e, what=jax.tree_util.keystr(p)), dparams, expected)


def _run_layer(model, mesh, block, cotangent):
    """(output, gradients by parameters and by X_TD) of our layer with the torch block's weights, on the ambient mesh."""

    layer = nnx.eval_shape(lambda: MoE(model, 1.0, jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    graphdef, shapes, _ = nnx.split(layer, nnx.Param, RouterState)
    shapes, params = nnx.to_pure_dict(shapes), moe_params(values(block), model)
    params = jax.tree.map(lambda new, like: jax.device_put(new, like.sharding.spec), params, shapes)
    bias = {"bias_E": jnp.asarray(BIASES["positive"])}
    arrays = {"x": X_TD.reshape(cotangent.shape), "mask": MASK_T.reshape(cotangent.shape[:2]), "cotangent": cotangent}

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params, x_BSD, batch):
        y_BSD, _ = nnx.merge(graphdef, params, bias)(x_BSD, batch["mask"], token_ids(batch["mask"]))
        return jnp.sum(y_BSD * batch["cotangent"]), y_BSD

    batch = shard_batch(mesh, arrays)
    (_, y_BSD), grads = jax.device_get(run(params, batch["x"], batch))
    return y_BSD, grads


def test_switch_router_and_its_losses():
    import torch
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers import modeling_switch_transformers as switch

    config = SwitchTransformersConfig(
        d_model=WIDTH, num_experts=EXPERTS, expert_capacity=TOKENS, router_jitter_noise=0.0, router_state=False
    )
    router = switch.SwitchTransformersTop1Router(config)
    randomise(router, seed=6)
    w_DE = router.classifier.weight.detach().numpy().T
    x = torch.tensor(X_TD.reshape(BATCH, SEQ_LEN, WIDTH), requires_grad=True)
    choice_BSE, weight_BS1, logits_BSE = router(x)
    probs_BSE, expert_BS = logits_BSE.softmax(-1), choice_BSE.argmax(-1)

    ours = RouterConfig("switch", 1, {"jitter": 0.0})
    logits_TE, weight_TE, chosen_TE, _ = _ours(ours, w_DE, np.zeros(EXPERTS, np.float32))
    assert_close(logits_TE, logits_BSE.detach().numpy().reshape(TOKENS, EXPERTS), what="logits")
    np.testing.assert_array_equal(chosen_TE, choice_BSE.numpy().reshape(TOKENS, EXPERTS))
    assert_close(weight_TE.sum(1), weight_BS1.detach().numpy().ravel(), what="weights")

    # Their balance loss is 1 at perfect balance, like ours (K = 1), and is taken over each group of tokens by itself, then
    # averaged: our "sequence" scope when the groups are the sequences, our "global" scope when there is one group.
    theirs = {
        "z": switch.router_z_loss_func(logits_BSE),
        "sequence": switch.load_balancing_loss_func(probs_BSE, expert_BS),
        "global": switch.load_balancing_loss_func(probs_BSE.reshape(1, TOKENS, EXPERTS), expert_BS.reshape(1, TOKENS)),
        "weights": (weight_BS1.ravel() * torch.tensor(COTANGENT_TE[:, 0])).sum(),
    }
    for name, value in theirs.items():
        expected_dw = torch.autograd.grad(value, router.classifier.weight, retain_graph=True)[0].numpy().T
        actual, dw = jax.value_and_grad(_switch_loss)(w_DE, ours, name)
        assert_close(actual, value.detach().numpy(), what=name)
        assert_close(dw, expected_dw, what=f"gradient of {name}")


def _switch_loss(w_DE, config, name):
    routing = routed(make_router(config, EXPERTS), X_TD, w_DE, np.zeros(EXPERTS, np.float32), MASK_T)
    sums = losses.routing_sums(routing, MASK_T, BATCH, sequence_balance=True)
    return {
        "z": losses.z_loss(sums.z_sum, sums.num_tokens),
        "sequence": losses.sequence_balance_loss(sums.sequence_balance_sum, sums.num_sequences),
        "global": losses.balance_loss(sums.load_E, sums.prob_sum_E, sums.num_tokens),
        "weights": jnp.sum(_dense(routing, routing.weight_A).sum(1) * COTANGENT_TE[:, 0]),
    }[name]
