"""Phi-3.5-MoE: 41.87 B parameters, 6.64 B active (Microsoft, 2404.14219).

Source: config.json of microsoft/Phi-3.5-MoE-instruct, as the transformers class PhimoeConfig carries it. LayerNorms with biases,
biases on the projections of attention and on the head. Not the published model to the last operation: it routes by SparseMixer
(2310.00811), here it is Mixtral's softmax of the two; and it divides the wavelengths by factors of a list (LongRoPE), here they are
plain. The weight of the balance loss is not published; 0.01 is Switch's.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """Phi-3.5-MoE; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=32_064, d_model=4096, num_layers=32, d_ff=6400, norm_eps=1e-5, norm="layer", head_bias=True)
    config.model.attention.update(num_heads=32, num_kv_heads=8, head_dim=128, qkv_bias=True, out_bias=True)
    config.model.attention.rope.theta = 1e4
    config.model.moe.update(num_experts=16, d_ff=6400, balance_loss_weight=0.01)
    config.model.moe.router.update(name="mixtral", top_k=2)
    return presets.finish(config, arg)
