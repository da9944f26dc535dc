"""How large the experts' weights are and how alike: one matrix of inner products a layer, whatever the mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P


def expert_weights(params: dict) -> tuple[np.ndarray, np.ndarray]:
    """Norm of each expert's weights, float32 [L, E], and cosine of each two experts', [L, E, E]; all weights and biases end to end.

    Args:
      params: of a model with experts: nested dict of arrays, on the ambient mesh. The layer of `model.mtp_layers` is left out.
    """
    experts = params["groups"]["moe"]["moe"]["experts"]
    gram_LEE = np.asarray(_gram(experts), np.float64)
    norm_LE = np.sqrt(np.maximum(np.diagonal(gram_LEE, axis1=1, axis2=2), 0))
    scale_LEE = np.maximum(norm_LE[:, :, None] * norm_LE[:, None, :], np.finfo(np.float32).tiny)
    return norm_LE.astype(np.float32), (gram_LEE / scale_LEE).astype(np.float32)


@jax.jit
def _gram(experts):
    """Inner products [L, E, E], float32, summed over all weights."""
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, out_sharding=P(None, None, None))
    total = 0
    for array in experts.values():
        array = array.astype(jnp.float32)
        if array.ndim == 4:
            total += product("LEab,LGab->LEG", array, array)
        else:
            total += product("LEa,LGa->LEG", array, array)
    return total
