"""Peak memory of the layer, forward and backward: linear in the tokens, and no [T, E, C] or [E, T, D] array in the compiled program.

Only the compiler's own account is read (`memory_analysis`, the optimised HLO); nothing runs. XLA:CPU plans the same buffers at any
optimisation level of its backend.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from meshes import mesh_of

from moe_jax.config import MoEConfig, RouterConfig
from moe_jax.layers.moe import MoE
from moe_jax.mesh import batch_spec

E, D, F, K, S = 64, 16, 16, 2, 64
TOKENS = 512  # a device; then E*T*D and T*E*C are more than anything that a fast path has a use for
CAPACITY_FACTOR = 1.25

SLOW, MATRIX = pytest.mark.slow, pytest.mark.matrix
PATHS = [
    pytest.param(1, {}, id="one device", marks=MATRIX),
    pytest.param(8, {"exchange": "all_to_all", "exchange_factor": 2.0}, id="all_to_all with a factor"),
    pytest.param(8, {"exchange": "all_to_all"}, id="all_to_all", marks=MATRIX),
    pytest.param(8, {"exchange": "ragged", "exchange_factor": 2.0}, id="ragged with a factor", marks=SLOW),
    pytest.param(8, {"exchange": "all_gather"}, id="all_gather", marks=MATRIX),
    pytest.param(8, {"exchange": "all_to_all", "exchange_factor": 2.0, "dispatch": "capacity"}, id="capacity", marks=SLOW),
]


def compiled(devices, tokens, changes):
    """The gradient of the layer, with `tokens` a device, as compiled for one of them."""
    router = RouterConfig("mixtral", K)
    moe = MoEConfig(num_experts=E, d_ff=F, num_shared_experts=0, router=router, capacity_factor=CAPACITY_FACTOR, **changes)
    mesh = mesh_of(expert=devices)
    with jax.set_mesh(mesh):
        graphdef, params, rest = nnx.split(nnx.eval_shape(lambda: MoE.standalone(D, moe, rngs=nnx.Rngs(0))), nnx.Param, ...)
        sharding = jax.NamedSharding(mesh, batch_spec(3))
        x_BSD = jax.ShapeDtypeStruct((devices * tokens // S, S, D), jnp.float32, sharding=sharding)

        def loss(params, x_BSD, rest):
            y_BSD, aux = nnx.merge(graphdef, params, rest)(x_BSD)
            return jnp.sum(y_BSD**2) + aux.balance_loss() + aux.z_loss()

        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x_BSD, rest).compile()


def growth(devices, changes, scales):
    """Bytes of temporaries, per device, with that many times `TOKENS`."""
    programs = [compiled(devices, scale * TOKENS, changes) for scale in scales]
    for scale, program in zip(scales, programs, strict=True):
        assert largest_array(program) > scale * TOKENS * D  # the text is read: x itself is in it, and more
    return [program.memory_analysis().temp_size_in_bytes for program in programs], programs


def largest_array(program):
    """Elements of the largest array of any type that the optimised program mentions."""
    shapes = re.findall(r"\b[a-z]+\d+(?:e\d+m\d+\w*)?\[([\d,]+)\]", program.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in set(shapes))


def smallest_forbidden(tokens):
    """Elements of [T, E, C] or of [E, T, D], whichever is less."""
    capacity = math.ceil(CAPACITY_FACTOR * tokens * K / E)
    return tokens * E * min(capacity, D)


@pytest.mark.parametrize(("devices", "changes"), PATHS)
def test_memory_is_linear_in_the_tokens(devices, changes):
    (once, twice, four_times), programs = growth(devices, changes, (1, 2, 4))
    assert 0 < once < twice
    assert 0.9 <= (four_times - twice) / (2 * (twice - once)) <= 1.02
    for scale, program in zip((1, 2, 4), programs, strict=True):
        assert largest_array(program) < smallest_forbidden(scale * TOKENS)


def test_the_oracle_is_what_the_fast_paths_are_not():
    (once, twice), programs = growth(1, {"dispatch": "einsum"}, (1, 2))
    assert twice - once > 2.5 * once
    for scale, program in zip((1, 2), programs, strict=True):
        assert largest_array(program) >= smallest_forbidden(scale * TOKENS)
