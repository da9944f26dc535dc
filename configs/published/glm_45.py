"""GLM-4.5: 352.8 B parameters without the layer that predicts one token more, 33.6 B active (Zhipu AI, 2508.06471).

Source: config.json of zai-org/GLM-4.5, as transformers and Megatron-Bridge carry it. Sigmoid routing with a balancing bias, which is
state here and no parameter; half of each head rotates; biases on q, k, v; queries and keys are normed per head.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """GLM-4.5; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=151_552, d_model=5120, num_layers=92, d_ff=12288, norm_eps=1e-5)
    config.model.update(mtp_layers=1, mtp_loss_weight=0.3)
    config.model.attention.update(num_heads=96, num_kv_heads=8, head_dim=128, qkv_bias=True, qk_norm="head")
    config.model.attention.rope.update(theta=1e6, dim=64)
    config.model.moe.update(num_experts=160, d_ff=1536, num_shared_experts=1, first_dense=3)
    config.model.moe.router.update(name="deepseek", top_k=8)
    config.model.moe.router.deepseek.scale = 2.5
    return presets.finish(config, arg)
