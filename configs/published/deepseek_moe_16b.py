"""DeepSeekMoE 16B: 16.38 B parameters, 2.83 B active; 2 shared experts, 64 routed of which 6 (DeepSeek-AI, 2401.06066).

Source: the paper (appendix A; loss weight 0.001 in section 5.1) and config.json of deepseek-ai/deepseek-moe-16b-base. Published
weights have no balance between devices.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """DeepSeekMoE 16B; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=102_400, d_model=2048, num_layers=28, d_ff=10944, norm_eps=1e-6)
    config.model.attention.update(num_heads=16, num_kv_heads=16, head_dim=128)
    config.model.attention.rope.theta = 1e4
    config.model.moe.update(num_experts=64, d_ff=1408, num_shared_experts=2, first_dense=1, balance_loss_weight=0.001)
    config.model.moe.router.update(name="deepseek_moe", top_k=6)
    return presets.finish(config, arg)
