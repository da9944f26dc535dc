"""DeepSeek-V3: 671,026,419,200 parameters, 37.55 B active; a layer that predicts one token more is beside them (2412.19437).

Source: the paper and config.json of deepseek-ai/DeepSeek-V3, as MaxText carries it. A token may use 4 of 8 groups of experts. The bias
moves by 0.001, as for the first 14.3 T tokens; the further token's loss weighs 0.3, as for the first 10 T.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """DeepSeek-V3; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=129_280, d_model=7168, num_layers=61, d_ff=18432, norm_eps=1e-6, init_std=0.006)
    config.model.update(mtp_layers=1, mtp_loss_weight=0.3)
    presets.latent_attention(config, num_heads=128, q_rank=1536, factor=40, mscale=1.0)
    config.model.moe.update(num_experts=256, d_ff=2048, num_shared_experts=1, first_dense=3)
    config.model.moe.router.update(name="deepseek", top_k=8)
    config.model.moe.router.deepseek.update(scale=2.5, num_groups=8, top_groups=4, bias_speed=0.001)
    config.model.moe.update(balance_loss_weight=0.0001, balance_loss_scope="sequence")
    return presets.finish(config, arg)
