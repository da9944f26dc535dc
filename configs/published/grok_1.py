"""Grok-1: 315.7 B parameters, 83.76 B active (xAI, 2024; published as 314 B).

Source: run.py and model.py of github.com/xai-org/grok-1. Norms before and after attention and FFN, tied and scaled embeddings, scaled
logits, scores capped at 30, probabilities of the two chosen experts as they are. The weight of the balance loss is not published; 0.01
is Switch's.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """Grok-1; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=131_072, d_model=6144, num_layers=64, d_ff=32768, norm_eps=1e-5)
    config.model.attention.update(num_heads=48, num_kv_heads=8, head_dim=128, softcap=30.0)
    config.model.attention.rope.theta = 1e4
    config.model.update(activation="geglu", post_norms=True, tied_embeddings=True)
    config.model.update(embedding_scale=78.38367176906169, logit_scale=0.5773502691896257)
    config.model.moe.update(num_experts=8, d_ff=32768, balance_loss_weight=0.01)
    config.model.moe.router.update(name="mixtral", top_k=2)
    config.model.moe.router.mixtral.normalize = "before"
    return presets.finish(config, arg)
