"""Qwen1.5-MoE-A2.7B: 14.32 B parameters, 2.69 B active (Qwen team, 2024).

Source: config.json of Qwen/Qwen1.5-MoE-A2.7B, as the transformers class Qwen2MoeConfig carries it. One shared expert of width 5,632
behind a sigmoid gate, which the weights have as one (the blog counts it as 4 of width 1,408); biases on q, k, v; weights of the routed
experts are not renormalised.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """Qwen1.5-MoE-A2.7B; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=151_936, d_model=2048, num_layers=24, d_ff=5632, norm_eps=1e-6)
    config.model.attention.update(num_heads=16, num_kv_heads=16, head_dim=128, qkv_bias=True)
    config.model.attention.rope.theta = 1e6
    config.model.moe.update(num_experts=60, d_ff=1408, balance_loss_weight=0.001)
    config.model.moe.router.update(name="mixtral", top_k=4)
    config.model.moe.router.mixtral.normalize = "before"
    config.model.moe.update(num_shared_experts=1, shared_d_ff=5632, shared_gate=True)
    return presets.finish(config, arg)
