"""How many devices a measurement runs on."""

import jax
from jax.extend.backend import clear_backends

from moe_jax.mesh import emulate_devices


def start_with(count: int) -> None:
    """Starts JAX's CPU backend anew where it does not have `count` devices; arrays of before are gone.

    What runs on one device is to be measured with one: with more, XLA:CPU has as many threads for its products, however few cores the
    machine has, and one large product alone can take several times longer.
    """
    jax.config.update("jax_platforms", "cpu")
    if jax.device_count() != count:
        jax.clear_caches()
        clear_backends()
        emulate_devices(count)
