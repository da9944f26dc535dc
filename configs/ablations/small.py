"""The run every ablation starts from: 0.7 million parameters, 2.0 million tokens, about a minute on one CPU core.

Every layer is MoE: 8 experts of width 96, 2 a token, no shared one; routing as in Mixtral with its balance loss. A token uses
`ACTIVE` hidden units of a layer's `TOTAL`; the sweeps keep these two where they say that parameters are equal.
"""

from ml_collections import ConfigDict

from configs import base

ACTIVE, TOTAL = 192, 768


def get_config(arg: str = "") -> ConfigDict:
    """The small config; `arg` as in `configs.base`."""
    config = base.get_config()
    config.model.update(d_model=64, num_layers=4, d_ff=ACTIVE, remat="none")
    config.model.attention.update(num_heads=4, num_kv_heads=2, head_dim=16)
    config.model.moe.update(num_experts=8, d_ff=96, num_shared_experts=0, balance_loss_weight=0.01)
    config.model.moe.router.update(name="mixtral", top_k=2)
    config.data.update(seq_len=128, batch_size=16, max_megabytes=8.0)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=50)
    config.train.update(steps=1000, log_every=10, eval_every=1000, eval_rows=256, checkpoint_every=500)
    config.train.update(keep_checkpoints=1, sample_tokens=0, tensorboard=False)
    return base.override(config, arg)
