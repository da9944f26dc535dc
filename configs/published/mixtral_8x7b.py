"""Mixtral 8x7B: 46,702,792,704 parameters, 12.88 B active (Mistral AI, 2401.04088).

Source: config.json of mistralai/Mixtral-8x7B-v0.1, as LitGPT and MaxText carry it. The paper gives no weight of the balance loss; 0.01
is Switch's.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """Mixtral 8x7B; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=32_000, d_model=4096, num_layers=32, d_ff=14336, norm_eps=1e-5)
    config.model.attention.update(num_heads=32, num_kv_heads=8, head_dim=128)
    config.model.attention.rope.theta = 1e6
    config.model.moe.update(num_experts=8, d_ff=14336, balance_loss_weight=0.01)
    config.model.moe.router.update(name="mixtral", top_k=2)
    return presets.finish(config, arg)
