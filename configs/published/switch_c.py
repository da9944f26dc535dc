"""Switch-C as a decoder: 1.57 T parameters in 30 layers of 2,048 experts. Not the published model.

The published Switch-C is a T5 encoder of 15 layers and a decoder of 15 (Fedus et al., 2101.03961, table 9; switch_c.gin of
Flaxformer, whose 30 heads are taken here; the table has 32). This is one decoder with the 30 layers of both, so that the experts are
exactly the published ones. What it lacks is the 15 cross-attentions with their norms, a final norm and the two tables of relative
positions; its positions are rotary.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """Switch-C as a decoder; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=32_128, d_model=2080, num_layers=30, d_ff=6144, norm_eps=1e-6, activation="relu")
    config.model.attention.update(num_heads=30, num_kv_heads=30, head_dim=64)
    presets.switch_routing(config, 2048, every=1)
    config.model.moe.d_ff = 6144
    return presets.finish(config, arg)
