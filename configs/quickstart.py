"""The main job in miniature: a DeepSeek-style MoE learns Python's own sources and documentation.

    bash launch/quickstart.sh

8 emulated devices, data 2 x expert 4, tokens exchanged by all_to_all. Other routers are one flag away:
`--config.model.moe.router.name=mixtral`, or `--config.model.moe.router.name=switch --config.model.moe.router.top_k=1`.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    """The quickstart's config; `arg` as in `configs.base`."""
    config = base.get_config()
    config.model.update(d_model=128, num_layers=4, d_ff=384, remat="none")
    config.model.moe.update(
        num_experts=16, d_ff=64, num_shared_experts=1, first_dense=1, exchange="all_to_all", exchange_factor=2.0
    )
    config.model.moe.router.update(name="deepseek", top_k=4)
    config.model.moe.router.deepseek.bias_speed = 0.01  # ten times the paper's, for a run ten thousand times shorter
    config.mesh.update(data=2, expert=4, emulate=8)
    config.data.update(seq_len=256, batch_size=16)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=50)
    config.train.update(steps=300, eval_every=100, eval_rows=32, checkpoint_every=100, sample_prompt="def main(", report=True)
    return base.override(config, arg)
