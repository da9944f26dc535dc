"""Mixtral 8x22B: 140.62 B parameters, 39.15 B active (Mistral AI, 2024).

Source: config.json of mistralai/Mixtral-8x22B-v0.1, as LitGPT carries it. MaxText has that of v0.3, whose vocabulary is 32,768:
`:model.vocab_size=32768`. The weight of the balance loss is not published; 0.01 is Switch's.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """Mixtral 8x22B; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=32_000, d_model=6144, num_layers=56, d_ff=16384, norm_eps=1e-5)
    config.model.attention.update(num_heads=48, num_kv_heads=8, head_dim=128)
    config.model.attention.rope.theta = 1e6
    config.model.moe.update(num_experts=8, d_ff=16384, balance_loss_weight=0.01)
    config.model.moe.router.update(name="mixtral", top_k=2)
    return presets.finish(config, arg)
