"""What the published configs share: where they start from, and their presets.

v5p-64   64 TPU v5p chips: experts over 8 neighbouring chips, parameters over the rest, 4 sequences of 4,096 tokens a chip
h100-64  64 H100s: the same, so that experts spread over the GPUs of one host; 2 sequences a GPU
debug    the same architecture in miniature on 8 emulated CPU devices: what the model has it keeps (latents, sinks, biases, windows,
         first dense layers, groups, shared experts), in small

Whether parameters and optimizer fit a chip is for `launch.describe` to say: it prints what each device holds.
"""

import math

from ml_collections import ConfigDict

from configs import base
from moe_jax.config import ConfigError


def start() -> ConfigDict:
    """The base config without experts, in bfloat16 and with rows of 4,096 tokens, for a published model to fill in."""
    config = base.get_config()
    config.model.dtype = "bfloat16"
    config.data.seq_len = 4096
    config.model.moe.update(num_experts=0, num_shared_experts=0)
    return config


def latent_attention(
    config: ConfigDict,
    num_heads: int,
    q_rank: int,
    *,
    factor: float,
    mscale: float,
    theta: float = 1e4,
    beta_fast: float = 32.0,
) -> None:
    """DeepSeek's multi-head latent attention (2405.04434, section 2.1), whose other widths are those of V2, V2-Lite, V3 and Kimi K2.

    Contexts are stretched by YaRN from 4,096 tokens. The models' config.json gives the attention's growth with the stretch twice,
    `mscale` and `mscale_all_dim`: as they are equal, sine and cosine keep their size and the scores are multiplied by
    (0.1 mscale ln(factor) + 1)^2 beside 1 / sqrt(width of a query).
    """
    attention = config.model.attention
    attention.update(num_heads=num_heads, num_kv_heads=num_heads, head_dim=128, v_head_dim=128)
    attention.update(q_rank=q_rank, kv_rank=512, rope_head_dim=64)
    attention.scale = (0.1 * mscale * math.log(factor) + 1) ** 2 / math.sqrt(128 + 64)
    attention.rope.update(theta=theta, interleaved=True, scaling="yarn", factor=float(factor), original_length=4096)
    attention.rope.update(amplitude=1.0, beta_fast=beta_fast, beta_slow=1.0)


def switch_routing(config: ConfigDict, num_experts: int, every: int) -> None:
    """Switch Transformer's routing and buffers (2101.03961, sections 2.1 and 2.2), every `every`-th layer."""
    config.model.moe.update(num_experts=num_experts, every=every, balance_loss_weight=0.01)
    config.model.moe.update(dispatch="capacity", capacity_factor=1.25)
    config.model.moe.router.update(name="switch", top_k=1)


def finish(config: ConfigDict, arg: str) -> ConfigDict:
    """Applies presets and `group.field=value` items, separated by commas, in order.

    Raises:
      AttributeError: no such field; the message names the nearest.
      ConfigError: an item is neither.
    """
    for item in filter(None, (part.strip() for part in (arg or "").split(","))):
        if item in PRESETS:
            PRESETS[item](config)
        elif "=" in item:
            base.override(config, item)
        else:
            raise ConfigError(f"config argument {item!r} is no preset ({', '.join(PRESETS)}) and not group.field=value.")
    return config


def _chips(config, rows):
    """64 chips with `rows` sequences each: the expert axis is as long as divides E, 8 at most, and innermost."""
    experts = config.model.moe.num_experts
    expert = next(size for size in (8, 4, 2, 1) if (experts and experts % size == 0) or size == 1)
    config.mesh.update(data=1, fsdp=64 // expert, expert=expert, tensor=1, emulate=0)
    config.model.moe.exchange_factor = 2.0  # the worst case would be room for 8 times the rows
    config.data.batch_size = 64 * rows
    config.optimizer.update(learning_rate=3e-4, warmup_steps=2000)
    config.train.update(steps=100_000, log_every=10, eval_every=1000, eval_rows=256, checkpoint_every=1000)


def _debug(config):
    """Small numbers in place of large ones; zeros, which are features not there, stay."""
    model, attention, moe = config.model, config.model.attention, config.model.moe
    grouped = attention.num_kv_heads < attention.num_heads
    base.shrink(config)
    groups = 2 if attention.full_every == 0 else attention.full_every
    _at_most(moe, first_dense=1)
    model.update(dtype="float32", vocab_size=384, d_model=32, d_ff=48, num_layers=moe.first_dense + moe.every * groups)
    attention.update(num_heads=4, num_kv_heads=2 if grouped else 4, head_dim=8)
    _at_most(attention, kv_rank=16, q_rank=24, rope_head_dim=4, v_head_dim=8, window=16)
    _at_most(attention.rope, dim=4, original_length=32)
    _at_most(moe, num_experts=8, d_ff=16, shared_d_ff=24)
    _at_most(moe.router, top_k=3)
    _at_most(moe.router.deepseek, num_groups=4, top_groups=2)
    config.mesh.update(data=2 if moe.num_experts else 8, fsdp=1, expert=4 if moe.num_experts else 1, tensor=1, emulate=8)


def _at_most(group, **limits):
    for name, limit in limits.items():
        group[name] = min(group[name], limit)


PRESETS = {"v5p-64": lambda config: _chips(config, 4), "h100-64": lambda config: _chips(config, 2), "debug": _debug}
