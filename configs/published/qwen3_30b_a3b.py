"""Qwen3-30B-A3B: 30.53 B parameters, 3.35 B active (Qwen team, 2505.09388).

Source: config.json of Qwen/Qwen3-30B-A3B, as LitGPT carries it. The base of the rotary embedding is that of the first release; the 2507
release, which MaxText's file describes, has 1e7: `:model.attention.rope.theta=1e7`. The vocabulary is padded from the report's
151,669. Queries and keys are normed per head.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """Qwen3-30B-A3B; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=151_936, d_model=2048, num_layers=48, d_ff=6144, norm_eps=1e-6)
    config.model.attention.update(num_heads=32, num_kv_heads=4, head_dim=128, qk_norm="head")
    config.model.attention.rope.theta = 1e6
    config.model.moe.update(num_experts=128, d_ff=768, balance_loss_weight=0.001)
    config.model.moe.router.update(name="mixtral", top_k=8)
    return presets.finish(config, arg)
