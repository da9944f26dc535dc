"""Cross-entropy of next-token prediction, whole or with the vocabulary sharded."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of each target, and the z-loss that keeps the softmax's normaliser near 1.

    The target's logit is picked by comparing with an iota instead of indexing, so a vocabulary axis that is sharded (Explicit mesh)
    stays where it is and only per-token sums cross devices.

    Args:
      logits: [T, V] or [B, S, V], any float dtype; the arithmetic is float32.
      targets: int32 in [0, V), the shape of logits less its last axis.

    Returns:
      nll: float32 nats of each token.
      z: float32, log(Z)^2 of each token (PaLM, 2204.02311, section 5, weighs it 1e-4). Nothing is reduced or masked.
    """
    x = logits.astype(jnp.float32)
    shift = jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
    log_z = jnp.log(jnp.sum(jnp.exp(x - shift), axis=-1)) + shift[..., 0]
    entry = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1, out_sharding=jax.typeof(logits).sharding)
    target_logit = jnp.sum(jnp.where(entry == targets[..., None], x, 0.0), axis=-1)
    return log_z - target_logit, jnp.square(log_z)
