"""GLM-4.5-Air: 106,852,245,504 parameters without the layer that predicts one token more, 13.4 B active (Zhipu AI, 2508.06471).

Source: config.json of zai-org/GLM-4.5-Air, as transformers and Megatron-Bridge carry it. Sigmoid routing with a balancing bias, which is
state here and no parameter; half of each head rotates; biases on q, k, v; no norm of queries and keys, unlike GLM-4.5.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """GLM-4.5-Air; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=151_552, d_model=4096, num_layers=46, d_ff=10944, norm_eps=1e-5)
    config.model.update(mtp_layers=1, mtp_loss_weight=0.3)
    config.model.attention.update(num_heads=96, num_kv_heads=8, head_dim=128, qkv_bias=True)
    config.model.attention.rope.update(theta=1e6, dim=64)
    config.model.moe.update(num_experts=128, d_ff=1408, num_shared_experts=1, first_dense=1)
    config.model.moe.router.update(name="deepseek", top_k=8)
    return presets.finish(config, arg)
