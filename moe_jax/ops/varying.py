"""Device-varying types: bringing arrays that meet in a loop or a custom gradient to the same mesh axes.

Inside `jax.shard_map` (check_vma=True) every array's type says over which mesh axes its value differs. Loop carries and the arguments
of a custom gradient must agree on them. The cast is free in the forward pass and sums gradients (psum) in the backward pass, which
is why it must stand outside a custom gradient, where JAX differentiates it.
"""

import jax


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """The mesh axes over which any of `arrays` varies; empty outside `shard_map`."""
    return frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))


def vary_over(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """`array` typed as varying over `axes` too."""
    missing = tuple(sorted(axes - jax.typeof(array).manual_axis_type.varying))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """All of `arrays`, typed as varying over the union of their axes."""
    axes = varying_axes(*arrays)
    return tuple(vary_over(array, axes) for array in arrays)
