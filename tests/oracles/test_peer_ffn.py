"""Our MoE layer against transformers' gpt-oss and Qwen2-MoE blocks: the same weights, the same values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from copy_weights import gradients, values
from flax import nnx
from tolerance import assert_close

from moe_jax.config import MoEConfig, RouterConfig
from moe_jax.layers.moe import MoE

pytestmark = pytest.mark.slow

BATCH, SEQ_LEN, D, F, E, K = 4, 7, 12, 10, 6, 2
X_BSD, G_BSD = np.random.default_rng(0).normal(size=(2, BATCH, SEQ_LEN, D)).astype(np.float32)


def _gpt_oss():
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    sizes = dict(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K, swiglu_limit=0.9)
    ours = MoEConfig(
        num_experts=E, d_ff=F, num_shared_experts=0, expert_bias=True, router=RouterConfig("mixtral", K, {"bias": True})
    )
    return GptOssMLP(GptOssConfig(**sizes, experts_implementation="eager")), ours, ("swiglu_clamped", 0.9)


def _gpt_oss_params(left):
    in_EDF, bias_EF = left["experts.gate_up_proj"], left["experts.gate_up_proj_bias"]
    experts = {"w_gate_EDF": in_EDF[..., ::2], "w_up_EDF": in_EDF[..., 1::2], "w_down_EFD": left["experts.down_proj"]}
    experts |= {"b_gate_EF": bias_EF[:, ::2], "b_up_EF": bias_EF[:, 1::2], "b_down_ED": left["experts.down_proj_bias"]}
    return {"experts": experts, "w_router_DE": left["router.weight"].T, "b_router_E": left["router.bias"]}


def _qwen2_moe():
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    sizes = dict(
        hidden_size=D, moe_intermediate_size=F, shared_expert_intermediate_size=14, num_experts=E, num_experts_per_tok=K
    )
    theirs = Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**sizes, experts_implementation="eager"))
    router = RouterConfig("mixtral", K, {"normalize": "before"})
    ours = MoEConfig(num_experts=E, d_ff=F, num_shared_experts=1, shared_d_ff=14, shared_gate=True, router=router)
    return theirs, ours, ("swiglu", 7.0)


def _qwen2_moe_params(left):
    gate_EFD, up_EFD = np.split(left["experts.gate_up_proj"], 2, axis=1)
    experts = {"w_gate_EDF": gate_EFD, "w_up_EDF": up_EFD, "w_down_EFD": left["experts.down_proj"]}
    shared = {f"w_{name}_{axes}": left[f"shared_expert.{name}_proj.weight"].T for name, axes in SHARED.items()}
    return {
        "experts": {name: w.swapaxes(1, 2) for name, w in experts.items()},
        "shared": shared,
        "w_router_DE": left["gate.weight"].T,
        "w_shared_gate_D": left["shared_expert_gate.weight"][0],
    }


SHARED = {"gate": "DF", "up": "DF", "down": "FD"}
CASES = {"gpt-oss": (_gpt_oss, _gpt_oss_params), "Qwen2-MoE": (_qwen2_moe, _qwen2_moe_params)}


@pytest.mark.parametrize("name", CASES)
def test_the_same_values_and_gradients(name):
    import torch

    make, to_ours = CASES[name]
    theirs, config, (activation, limit) = make()
    rng = np.random.default_rng(1)
    for parameter in theirs.parameters():
        parameter.data = torch.tensor(rng.normal(0, 0.4, parameter.shape), dtype=torch.float32)
    x = torch.tensor(X_BSD, requires_grad=True)
    output = theirs(x)
    output = output[0] if isinstance(output, tuple) else output
    output.backward(torch.tensor(G_BSD))

    layer = MoE.standalone(D, config, activation=activation, activation_limit=limit, rngs=nnx.Rngs(0))
    graphdef, initial, rest = nnx.split(layer, nnx.Param, ...)
    params = jax.tree.map(jnp.asarray, to_ours(values(theirs)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, nnx.to_pure_dict(initial))
    y_BSD, pullback = jax.vjp(lambda params, x: nnx.merge(graphdef, params, rest)(x)[0], params, jnp.asarray(X_BSD))
    grads, g_x_BSD = pullback(jnp.asarray(G_BSD))
    assert_close(y_BSD, output.detach().numpy(), what="values")
    assert_close(g_x_BSD, x.grad.numpy(), what="gradient of x")
    expected = jax.tree.leaves_with_path(to_ours(gradients(theirs)))
    for (path, gradient), (_, e) in zip(jax.tree.leaves_with_path(grads), expected, strict=True):
        assert np.abs(e).max() > 1e-3
        assert_close(gradient, e, what=jax.tree_util.keystr(path))
