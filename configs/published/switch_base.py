"""Switch-Base as a decoder: `switch_base.py:8` to `:256` experts, presets and changes after it (`:64,debug`). Not the published model.

The published Switch-Base is a T5 encoder of 12 layers and a decoder of 12 (Fedus et al., 2101.03961, table 1 and section 3; switch_base.gin
of Flaxformer). This is one decoder with the 24 layers of both, every other one MoE, so that the experts are exactly the published ones.
What it lacks is the 12 cross-attentions with their norms, a final norm and the two tables of relative positions, 28,322,304 parameters
in all; its positions are rotary. Routing is Switch's: one expert, buffers of 1.25 times the balanced load, loss weight 0.01, no z-loss.
"""

from ml_collections import ConfigDict

from configs.published import presets
from moe_jax.config import ConfigError


def get_config(arg: str = "") -> ConfigDict:
    """Switch-Base as a decoder; `arg` is the number of experts (default: 8), then as in `configs.published.presets`.

    Raises:
      ConfigError: as `presets.finish`.
    """
    experts, _, rest = (arg or "8").partition(",")
    if not experts.isdigit():
        experts, rest = "8", arg
    if int(experts) < 2:
        raise ConfigError(f"configs/published/switch_base.py:{experts} asks for {experts} experts; give 2 or more.")
    config = presets.start()
    config.model.update(vocab_size=32_128, d_model=768, num_layers=24, d_ff=3072, norm_eps=1e-6)
    config.model.update(activation="relu", tied_embeddings=True)
    config.model.attention.update(num_heads=12, num_kv_heads=12, head_dim=64)
    presets.switch_routing(config, int(experts), every=2)
    config.model.moe.d_ff = 3072
    return presets.finish(config, rest)
