"""For how many tokens the experts are better run one by one over all tokens ("touched") than over sorted rows ("dropless").

What `models.generator.expert_path` goes by on a CPU is read off this table (docs/inference.md).
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.timing import interleaved, ratio
from moe_jax.config import MoEConfig
from moe_jax.dispatch import make_dispatch
from moe_jax.layers.separate_experts import make_separate_fn
from moe_jax.routing.contract import Tokens, token_choice


class Shape(NamedTuple):
    """The experts of one layer."""

    experts: int
    top_k: int
    d_model: int
    d_ff: int


SHAPES = (Shape(8, 2, 512, 1408), Shape(64, 8, 512, 352), Shape(64, 2, 512, 352))
TOKENS = (1, 4, 8, 16, 24, 32, 48, 64, 128)


def rows(shapes: Sequence[Shape] = SHAPES, tokens: Sequence[int] = TOKENS, repeats: int = 9) -> list[dict]:
    """One dict for each shape and number of tokens: medians in milliseconds, and touched over dropless (median of repeats, and spread).

    A call is the experts of `LAYERS` layers one after the other, so that no cache holds the weights of one call for the next.
    """
    return [_measure(shape, count, repeats) for shape in shapes for count in tokens]


LAYERS = 6


def _measure(shape, num_tokens, repeats):
    calls = {dispatch: make_call(shape, num_tokens, dispatch) for dispatch in ("touched", "dropless")}
    seconds = interleaved(calls, repeats)
    middle, least, most = ratio(seconds["touched"], seconds["dropless"])
    return {
        **shape._asdict(),
        "tokens": num_tokens,
        "tokens_k_by_experts": num_tokens * shape.top_k / shape.experts,
        **{f"{name}_milliseconds": 1e3 * statistics.median(values) for name, values in seconds.items()},
        "touched_to_dropless": middle,
        "touched_to_dropless_min": least,
        "touched_to_dropless_max": most,
    }


def make_call(shape: Shape, num_tokens: int, dispatch: str) -> Callable[[], jax.Array]:
    """A call that runs every layer's experts on the same tokens, each with choices and weights of its own."""
    weights, expert_LTK = _weights(shape), _choices(shape, num_tokens)
    x_TD = jax.random.normal(jax.random.key(1), (num_tokens, shape.d_model))
    run = make_dispatch(MoEConfig(dispatch=dispatch))

    @jax.jit
    def call(weights, x_TD, expert_LTK):
        for of_layer, expert_TK in zip(weights, expert_LTK, strict=True):
            probs_TE = jnp.full((num_tokens, shape.experts), 1 / shape.experts)
            tokens = Tokens(x_TD, jnp.ones(num_tokens, bool))
            routing = token_choice(expert_TK, jnp.full(expert_TK.shape, 1 / shape.top_k), probs_TE, probs_TE, tokens)
            x_TD = x_TD + run(x_TD, routing, make_separate_fn(of_layer, "swiglu", "auto"))[0]
        return x_TD

    return functools.partial(call, weights, x_TD, expert_LTK)


@functools.lru_cache(1)
def _weights(shape):
    """float32 arrays of `SeparateExperts` of one device, a dict a layer."""
    E, _, D, F = shape

    @jax.jit
    def layer(key):
        keys = jax.random.split(key, (E, 2))
        w_in = {f"w_in{e}_EDF": 0.02 * jax.random.normal(keys[e, 0], (1, D, 2 * F)) for e in range(E)}
        return w_in | {f"w_down{e}_EFD": 0.02 * jax.random.normal(keys[e, 1], (1, F, D)) for e in range(E)}

    return [layer(key) for key in jax.random.split(jax.random.key(0), LAYERS)]


def _choices(shape, num_tokens):
    """K different experts of each token at random, int32 [L, T, K]."""
    scores = np.random.default_rng(0).random((LAYERS, num_tokens, shape.experts))
    return np.argsort(scores, axis=-1)[..., : shape.top_k].astype(np.int32)
