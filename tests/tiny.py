"""The tiny model and batch that several tests share."""

import dataclasses

import numpy as np

from moe_jax.config import AttentionConfig, Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, RouterConfig, TrainConfig

VOCAB, SEQ_LEN, BATCH = 64, 8, 32

ROUTERS = {
    "switch": RouterConfig("switch", 1, {"jitter": 0.1}),
    "mixtral": RouterConfig("mixtral", 2),
    "deepseek": RouterConfig("deepseek", 3, {"num_groups": 4, "top_groups": 2, "bias_speed": 0.01, "scale": 2.5}),
}

MESHES = {
    "one device": MeshConfig(data=1),
    "data 8": MeshConfig(data=8),
    "expert 8": MeshConfig(data=1, expert=8),
    "data 2 expert 4": MeshConfig(data=2, expert=4),
    "fsdp 2 expert 2 tensor 2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    "expert_outer 2 expert 4": MeshConfig(data=1, expert_outer=2, expert=4),
    "expert_outer 2 expert 2 tensor 2": MeshConfig(data=1, expert_outer=2, expert=2, tensor=2),
}


def config(router="mixtral", mesh="one device", *, accumulation=1, remat="none", model=None, **moe) -> Config:
    """A dense layer and two MoE layers; weights far from zero so that routing has no near ties."""
    moe_config = MoEConfig(
        num_experts=8,
        d_ff=8,
        num_shared_experts=1,
        first_dense=1,
        router=ROUTERS[router],
        balance_loss_weight=0.1,
        z_loss_weight=0.01,
    )
    model_config = ModelConfig(
        vocab_size=VOCAB,
        d_model=16,
        num_layers=3,
        d_ff=24,
        init_std=0.2,
        remat=remat,
        scan_unroll=1,  # the loop compiles faster; test_layout_invariance.py compares
        logit_z_loss_weight=1e-3,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
        moe=dataclasses.replace(moe_config, **moe),
    )
    return Config(
        model=dataclasses.replace(model_config, **(model or {})),
        mesh=MESHES[mesh],
        data=DataConfig(seq_len=SEQ_LEN, batch_size=BATCH),
        train=TrainConfig(accumulation=accumulation),
    )


def batch(seed=0, rows=BATCH, seq_len=SEQ_LEN) -> dict[str, np.ndarray]:
    """Packed rows: two documents each, then padding of 0 to 3 tokens; the last row is padding altogether."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, seq_len)).astype(np.int32)
    targets = rng.integers(0, VOCAB, (rows, seq_len)).astype(np.int32)
    first, padding = rng.integers(1, seq_len - 4, (rows, 1)), rng.integers(0, 4, (rows, 1))
    column = np.arange(seq_len)[None, :]
    segments = np.where(column < first, 1, 2) * (column < seq_len - padding)
    segments[-1] = 0
    positions = np.where(column < first, column, column - first)
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
        "loss_weights": (segments > 0).astype(np.float32),
    }
