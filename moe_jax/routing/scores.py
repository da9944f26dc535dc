"""The arithmetic that routers share: logits in float32, noise that knows no layout, the choice, the chosen scores."""

import jax
import jax.numpy as jnp


def router_logits(
    x_TD: jax.Array,
    w_DE: jax.Array,
    num_experts: int,
    *,
    jitter: float = 0.0,
    noise_key: jax.Array | None = None,
    token_id_T: jax.Array | None = None,
) -> jax.Array:
    """Logits [T, E] in float32, whatever the dtype of the tokens (the "selective precision" of 2101.03961, section 2.4).

    `Precision.HIGHEST` keeps the product, forward and backward, in float32 where the default would round its inputs: to
    bfloat16 on a TPU, to TF32 on a GPU. With `jitter` > 0 and a `noise_key` the tokens are first multiplied by `input_jitter`.

    Raises:
      ValueError: `w_DE` is not for `num_experts` experts, or noise is asked for without token ids.
    """
    if w_DE.shape != (x_TD.shape[-1], num_experts):
        raise ValueError(f"w_DE has shape {w_DE.shape}; this router needs [D, E] = {(x_TD.shape[-1], num_experts)}.")
    x_TD = x_TD.astype(jnp.float32)
    if jitter > 0 and noise_key is not None:
        if token_id_T is None:
            raise ValueError("token_id_T = None with a noise_key; give each token's place in the global batch.")
        x_TD = x_TD * input_jitter(noise_key, token_id_T, x_TD.shape[-1], jitter)
    return jnp.einsum("TD,DE->TE", x_TD, w_DE.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def input_jitter(noise_key: jax.Array, token_id_T: jax.Array, width: int, jitter: float) -> jax.Array:
    """Noise [T, D], uniform in [1 - jitter, 1 + jitter), a function of (key, token id) alone: no layout changes it."""

    def one_token(token_id):
        key = jax.random.fold_in(noise_key, token_id)
        return jax.random.uniform(key, (width,), jnp.float32, 1.0 - jitter, 1.0 + jitter)

    return jax.vmap(one_token)(token_id_T)


def choose(scores_TE: jax.Array, choices: int) -> jax.Array:
    """The experts [T, K] int32 with the highest scores, best first. On a tie the lowest index wins."""
    return jax.lax.top_k(jax.lax.stop_gradient(scores_TE), choices)[1]


def chosen(scores_TE: jax.Array, expert_TK: jax.Array) -> jax.Array:
    """The scores [T, K] of the chosen experts, differentiable."""
    return jnp.take_along_axis(scores_TE, expert_TK, axis=-1)
