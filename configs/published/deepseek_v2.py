"""DeepSeek-V2: 235.74 B parameters, 21.38 B active (DeepSeek-AI, 2405.04434).

Source: the paper and config.json of deepseek-ai/DeepSeek-V2, as MaxText carries it. A token may use 3 of 8 groups of experts, ranked by
the best expert of each. Of the paper's three losses the expert-level one is
there (0.003, by sequence), not those between devices.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """DeepSeek-V2; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=102_400, d_model=5120, num_layers=60, d_ff=12288, norm_eps=1e-6)
    presets.latent_attention(config, num_heads=128, q_rank=1536, factor=40, mscale=0.707)
    config.model.moe.update(num_experts=160, d_ff=1536, num_shared_experts=2, first_dense=1)
    config.model.moe.router.update(name="deepseek", top_k=6)
    config.model.moe.router.deepseek.update(score="softmax", normalize=False, scale=16.0, num_groups=8, top_groups=3)
    config.model.moe.router.deepseek.update(group_best=1, bias_update="none")
    config.model.moe.update(balance_loss_weight=0.003, balance_loss_scope="sequence")
    return presets.finish(config, arg)
