"""The next token of every row of a batch, each by its own settings: temperature, top-k, min-p, nucleus and seed are arrays.

One compiled program serves every mix of settings. A row's draw is a function of its logits, its `Sampling` and how many tokens it
has drawn before: not of its place in the batch, nor of what the other rows ask for.
"""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moe_jax.config import ConfigError
from moe_jax.mesh import lay_out

GREEDY = 0.0


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are drawn.

    Attributes:
      temperature: divides the logits; 0 takes the best token each time, and the rest is without effect.
      top_k: draw from the k best tokens; 0 = all.
      top_p: draw from the smallest set of tokens with this probability (nucleus sampling, 1904.09751); 1 = all.
      min_p: draw from the tokens with at least this fraction of the best one's probability (2407.01082, section 3); 0 = all.
      seed: of the draws, in 32 bits.

    Raises:
      ConfigError: a value out of its range, or of another type.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self):
        self._need("temperature", numbers.Real, lambda value: 0 <= value < math.inf, "0 (greedy) or more, and finite")
        self._need("top_k", numbers.Integral, lambda value: value >= 0, "0 (all tokens) or more")
        self._need("top_p", numbers.Real, lambda value: 0 < value <= 1, "more than 0 and at most 1")
        self._need("min_p", numbers.Real, lambda value: 0 <= value <= 1, "at least 0 (all tokens) and at most 1")
        self._need("seed", numbers.Integral, lambda value: 0 <= value < 2**32, "at least 0 and less than 2**32")

    def _need(self, name, kind, allows, range_):
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, kind):
            wanted = "an integer" if kind is numbers.Integral else "a number"
            raise ConfigError(f"{name} = {value!r} is a {type(value).__name__}; give {wanted}, {range_}.")
        if not allows(value):
            raise ConfigError(f"{name} = {value} must be {range_}.")


@flax.struct.dataclass
class Draws:
    """The settings of a batch's next draw, a row a request.

    Attributes:
      temperature_B, top_p_B, min_p_B: float32, as in `Sampling`.
      top_k_B: int32.
      seed_B: uint32.
      number_B: int32, how many tokens the request has drawn before.
    """

    temperature_B: jax.Array | np.ndarray
    top_k_B: jax.Array | np.ndarray
    top_p_B: jax.Array | np.ndarray
    min_p_B: jax.Array | np.ndarray
    seed_B: jax.Array | np.ndarray
    number_B: jax.Array | np.ndarray

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "Draws":
        """Those of each request's first draw, as NumPy arrays."""

        def column(name, dtype, most):
            return np.array([min(getattr(sampling, name), most) for sampling in samplings], dtype)

        return cls(
            temperature_B=column("temperature", np.float32, np.finfo(np.float32).max),
            top_k_B=column("top_k", np.int32, np.iinfo(np.int32).max),
            top_p_B=column("top_p", np.float32, 1),
            min_p_B=column("min_p", np.float32, 1),
            seed_B=column("seed", np.uint32, np.iinfo(np.uint32).max),
            number_B=np.zeros(len(samplings), np.int32),
        )


def draw(logits_BV: jax.Array, draws: Draws) -> tuple[jax.Array, jax.Array]:
    """Each row's next token, int32 [B], and its log-probability, float32 [B], under the logits as they are (unfiltered).

    The logits are gathered from wherever they lie: every device draws every row. A row of temperature 0 takes the best token, of
    equals the one with the lowest id. Where all rows do, nothing is drawn.
    """
    logits_BV, draws = jax.tree.map(lambda array: lay_out(jnp.asarray(array), P()), (logits_BV, draws))
    logits_BV = logits_BV.astype(jnp.float32)
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    greedy_B = draws.temperature_B == GREEDY
    token_B = jax.lax.cond(
        jnp.all(greedy_B),
        lambda: best_B,
        lambda: jnp.where(greedy_B, best_B, _categorical(filter_logits(logits_BV, draws), draws)),
    )
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def filter_logits(logits_BV: jax.Array, draws: Draws) -> jax.Array:
    """What is drawn from: (logits - their largest) / temperature, float32, and -inf for what is filtered out.

    The filters in turn are top-k, min-p and top-p, and each sees what the one before left, as a distribution of its own: top-p is
    of the probability that top-k and min-p leave. So does vLLM; transformers has top-p before min-p, which is another set where
    both are given. Tokens equal to the last one kept are kept, and the best token always is. It means nothing in a row of
    temperature 0.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    asks_B, vocab_size = draws.temperature_B != GREEDY, logits_BV.shape[-1]
    temperature_B = jnp.maximum(draws.temperature_B, jnp.finfo(jnp.float32).tiny)  # no 0 / 0
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature_B[:, None]

    limited_B = asks_B & (draws.top_k_B > 0) & (draws.top_k_B < vocab_size)
    ones = jnp.ones_like  # to count with in float32, exact up to 2^24 tokens
    logits_BV = _keep_best(logits_BV, ones, jnp.where(limited_B, draws.top_k_B, jnp.inf))
    # 2407.01082, section 3: p < min_p * p_max, where log p - log p_max is the logit itself as the largest is 0.
    logits_BV = jnp.where(logits_BV < jnp.log(draws.min_p_B)[:, None], -jnp.inf, logits_BV)
    limited_B = asks_B & (draws.top_p_B < 1)
    return _keep_best(logits_BV, jax.nn.softmax, jnp.where(limited_B, draws.top_p_B, jnp.inf))


def _keep_best(logits_BV, weigh, needed_B):
    """The fewest best tokens whose weights sum to `needed_B`, one at least, the others -inf; all of a row where that is infinite.

    The vocabulary is not sorted. Logits are 0 at most here, so the better one has the smaller size, and sizes are in the order of
    their bits: 31 steps settle the bits of the largest size kept, the highest first.
    """

    def settle(i, most_B, bits_BV, weight_BV):
        lower_B = most_B ^ jax.lax.shift_right_logical(jnp.int32(1 << 30), i)
        weight_B = jnp.sum(jnp.where(bits_BV <= lower_B[:, None], weight_BV, 0.0), axis=-1)
        return jnp.where(weight_B >= needed_B, lower_B, most_B)

    def keep():
        bits_BV, weight_BV = jax.lax.bitcast_convert_type(jnp.abs(logits_BV), jnp.int32), weigh(logits_BV)
        most_B = jnp.full_like(needed_B, jnp.iinfo(jnp.int32).max, jnp.int32)
        most_B = jax.lax.fori_loop(0, 31, lambda i, most_B: settle(i, most_B, bits_BV, weight_BV), most_B)
        return jnp.where(bits_BV <= most_B[:, None], logits_BV, -jnp.inf)

    return jax.lax.cond(jnp.any(needed_B < jnp.inf), keep, lambda: logits_BV)


def _categorical(logits_BV, draws):
    """Token of each row from its distribution, by the row's own key. Threefry, as other generators do not draw a row alone in a vmap."""

    def one(logits_V, seed, number):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number)
        return jax.random.categorical(key, logits_V).astype(jnp.int32)

    return jax.vmap(one)(logits_BV, draws.seed_B, draws.number_B)
