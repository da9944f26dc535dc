"""OLMoE-1B-7B: 6.92 B parameters, 1.28 B active (Muennighoff et al., 2409.02060).

Source: the paper and its configs/OLMoE-1B-7B-0924.yml. An expert is 1,024 wide (the default of the transformers class, 2,048, is not
the model's); queries and keys are normed over all heads together. The paper takes the mean of the losses over the 16 layers, we the
sum: its 0.01 and 0.001 press 16 times as hard here.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """OLMoE-1B-7B; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=50_304, d_model=2048, num_layers=16, d_ff=1024, norm_eps=1e-5)
    config.model.attention.update(num_heads=16, num_kv_heads=16, head_dim=128, qk_norm="full")
    config.model.attention.rope.theta = 1e4
    config.model.moe.update(num_experts=64, d_ff=1024, balance_loss_weight=0.01, z_loss_weight=0.001)
    config.model.moe.router.update(name="mixtral", top_k=8)
    config.model.moe.router.mixtral.normalize = "before"
    return presets.finish(config, arg)
