"""DeepSeek-V2-Lite: 15.71 B parameters, 2.45 B active without the embedding (DeepSeek-AI, 2405.04434, appendix B).

Source: the paper and config.json of deepseek-ai/DeepSeek-V2-Lite, as MaxText carries it. Queries have no latent. Its one loss is the
expert-level one, of weight 0.001, by sequence.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """DeepSeek-V2-Lite; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=102_400, d_model=2048, num_layers=27, d_ff=10944, norm_eps=1e-6)
    presets.latent_attention(config, num_heads=16, q_rank=0, factor=40, mscale=0.707)
    config.model.moe.update(num_experts=64, d_ff=1408, num_shared_experts=2, first_dense=1)
    config.model.moe.router.update(name="deepseek", top_k=6)
    config.model.moe.router.deepseek.update(score="softmax", normalize=False, bias_update="none")
    config.model.moe.update(balance_loss_weight=0.001, balance_loss_scope="sequence")
    return presets.finish(config, arg)
