"""Llama 2 13B: 13.02 B parameters, dense (Meta, 2307.09288). As many as Mixtral 8x7B has active.

Source: config.json of meta-llama/Llama-2-13b-hf, as LitGPT and MaxText carry it.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """Llama 2 13B; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=32_000, d_model=5120, num_layers=40, d_ff=13824, norm_eps=1e-5)
    config.model.attention.update(num_heads=40, num_kv_heads=40, head_dim=128)
    config.model.attention.rope.theta = 1e4
    return presets.finish(config, arg)
