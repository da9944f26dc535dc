"""DBRX: 131.60 B parameters, 36.5 B active (Databricks, 2024).

Source: config.json of databricks/dbrx-base, as the transformers class DbrxConfig carries it. LayerNorms without biases, queries, keys
and values cut to [-8, 8], a balance loss of weight 0.05.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """DBRX; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=100_352, d_model=6144, num_layers=40, d_ff=10752, norm_eps=1e-5, norm="layer_no_bias")
    config.model.attention.update(num_heads=48, num_kv_heads=8, head_dim=128, qkv_clip=8.0)
    config.model.attention.rope.theta = 5e5
    config.model.moe.update(num_experts=16, d_ff=10752, balance_loss_weight=0.05)
    config.model.moe.router.update(name="mixtral", top_k=4)
    return presets.finish(config, arg)
