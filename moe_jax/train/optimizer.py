"""The optimizer: AdamW on a schedule, gradients clipped by their global norm, weight decay by rule.

Everything is plain optax on the tree of parameters; under an Explicit mesh the moments inherit the parameters' shardings, and
the global norm sums every parameter once, wherever its shards lie.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.config import ConfigError, OptimizerConfig
from moe_jax.train.paths import leaf_names

# (regular expression over the whole name, does it decay). Each parameter must match exactly one rule.
WEIGHT_DECAY_RULES = (
    (r"(.*/)?embed/table_VD", False),
    (r"(.*/)?\w*norm/(scale_(D|N|R|HN|GN)|bias_D)", False),
    (r"(.*/)?b(q_HN|k_GN|v_GN|o_D)", False),
    (r"(.*/)?sink_H", False),
    (r"(.*/)?head/w_DV", True),
    (r"(.*/)?head/b_V", False),
    (r"(.*/)?w[qkv]_D[HG]N", True),
    (r"(.*/)?(wq_down_DR|wq_up_RHN|wkv_down_DR|wk_rope_DN|wk_up_RHN|wv_up_RHN)", True),
    (r"(.*/)?wo_HND", True),
    (r"(.*/)?w_(gate|up)_(DF|EDF)", True),
    (r"(.*/)?w_down_(FD|EFD)", True),
    (r"(.*/)?b_(gate_EF|up_EF|down_ED)", False),
    (r"(.*/)?w_shared_gate_D", True),
    (r"mtp/w_(hidden|embed)_DD", True),
    (r"(.*/)?w_DE", True),
    (r"(.*/)?w_router_\w+", True),
    (r"(.*/)?b_router_\w+", False),
)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of update t = 0 .. steps - 1, as a function of t (int or traced int32); float32.

    The warm-up is linear, (t + 1) / warmup_steps, so that the first update counts and update warmup_steps - 1 has the peak.
    Then the rate

    cosine    falls along half a cosine to final_fraction of the peak, which the last update has
    wsd       stays, and falls over the last decay_fraction of the steps as 1 - sqrt(progress) (Hägele et al., 2405.18392,
              section 3), to final_fraction of the peak
    constant  stays

    Raises:
      ConfigError: the warm-up and the decay of wsd overlap.
    """
    warmup, final = config.warmup_steps, config.final_fraction
    decay = {"cosine": steps - warmup, "wsd": round(config.decay_fraction * steps), "constant": 0}[config.schedule]
    if warmup + decay > steps:
        raise ConfigError(
            f"optimizer.warmup_steps = {warmup} and the last {decay} steps of optimizer.decay_fraction ="
            f" {config.decay_fraction} overlap in train.steps = {steps}; lower one of the two."
        )

    def schedule(step):
        done = jnp.asarray(step, jnp.float32) + 1  # updates including this one
        rising = jnp.minimum(done / max(warmup, 1), 1.0)
        progress = jnp.clip((done - (steps - decay)) / decay, 0.0, 1.0) if decay else 0.0
        shape = 0.5 * (1 + jnp.cos(jnp.pi * progress)) if config.schedule == "cosine" else 1 - jnp.sqrt(progress)
        return config.learning_rate * rising * (final + (1 - final) * shape)

    return schedule


def weight_decay_mask(params: Any) -> Any:
    """The tree of `params` (nested dicts or an nnx.State) with True where weight decay applies.

    Matrices decay, the router's too; the embedding table, norm scales and biases do not.

    Raises:
      ConfigError: a parameter that no rule of `WEIGHT_DECAY_RULES` covers, or more than one.
    """
    return jax.tree.unflatten(jax.tree.structure(params), [_decays(name) for name in leaf_names(params)])


def make_optimizer(config: OptimizerConfig, steps: int, params: Any) -> optax.GradientTransformation:
    """Clip by the global norm (clip_norm 0: no clipping), then AdamW on `learning_rate` with `weight_decay_mask`.

    Weight decay is decoupled (1711.05101) and scaled by the schedule: update = -lr_t * (adam + weight_decay * param).

    Args:
      params: the tree of parameters, arrays or ShapeDtypeStructs; only its structure is used.

    Raises:
      ConfigError: see `learning_rate` and `weight_decay_mask`.
    """
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=weight_decay_mask(params),
    )
    return optax.chain(*clip, adamw)


def updates_made(opt_state: optax.OptState) -> jax.Array:
    """Updates that an optimizer of `make_optimizer` has made, int32: what its learning rate goes by. Skipped steps made none."""
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


def _decays(name: str) -> bool:
    matches = [(rule, decays) for rule, decays in WEIGHT_DECAY_RULES if re.fullmatch(rule, name)]
    if len(matches) == 1:
        return matches[0][1]
    found = f"rules {' and '.join(repr(rule) for rule, _ in matches)}" if matches else "no rule"
    raise ConfigError(
        f"Parameter {name} is covered by {found} of WEIGHT_DECAY_RULES (moe_jax/train/optimizer.py);"
        " say there, exactly once, whether it decays."
    )
