"""Llama 2 70B: 68.98 B parameters, dense (Meta, 2307.09288). What a mixture of experts is measured against.

Source: config.json of meta-llama/Llama-2-70b-hf, as LitGPT and MaxText carry it.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """Llama 2 70B; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=32_000, d_model=8192, num_layers=80, d_ff=28672, norm_eps=1e-5)
    config.model.attention.update(num_heads=64, num_kv_heads=8, head_dim=128)
    config.model.attention.rope.theta = 1e4
    return presets.finish(config, arg)
