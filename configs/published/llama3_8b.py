"""Llama 3 8B: 8.03 B parameters, dense (Meta, 2407.21783).

Source: config.json of meta-llama/Meta-Llama-3-8B, as LitGPT and MaxText carry it; Llama 3.1 stretches its positions, this one does not.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """Llama 3 8B; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=128_256, d_model=4096, num_layers=32, d_ff=14336, norm_eps=1e-5)
    config.model.attention.update(num_heads=32, num_kv_heads=8, head_dim=128)
    config.model.attention.rope.theta = 5e5
    return presets.finish(config, arg)
