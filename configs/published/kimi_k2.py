"""Kimi K2: 1,026 B parameters, 32.86 B active (Moonshot AI, 2025). DeepSeek-V3's architecture with more experts, half the heads, no groups.

Source: config.json of moonshotai/Kimi-K2-Instruct, as MaxText carries it. The report says 1.04 T; the config gives 1.026 T. YaRN's two
borders are both at one turn there.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """Kimi K2; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=163_840, d_model=7168, num_layers=61, d_ff=18432, norm_eps=1e-6)
    presets.latent_attention(config, num_heads=64, q_rank=1536, factor=32, mscale=1.0, theta=5e4, beta_fast=1.0)
    config.model.moe.update(num_experts=384, d_ff=2048, num_shared_experts=1, first_dense=1)
    config.model.moe.router.update(name="deepseek", top_k=8)
    config.model.moe.router.deepseek.scale = 2.827
    return presets.finish(config, arg)
