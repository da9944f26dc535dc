"""What a step of decoding sends when the experts are spread over eight devices: from its compiled program, which is not run."""

import concurrent.futures
import math
import multiprocessing

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.analysis.bench_comm import QUICK_COMPILE, by_axis
from moe_jax.analysis.bench_inference import Experts, Sizes
from moe_jax.analysis.devices import start_with
from moe_jax.analysis.ledger import ledger
from moe_jax.config import Config, MeshConfig
from moe_jax.mesh import batch_spec, make_mesh
from moe_jax.models.generator import CACHE_DTYPES
from moe_jax.models.inference_weights import decoder_graph, decoder_weights, inference_config
from moe_jax.models.transformer import build

DEVICES = 8


def rows_elsewhere(sizes: Sizes | None = None) -> list[dict]:
    """`rows` in a process of its own, as JAX has one number of devices in a process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(rows, Sizes() if sizes is None else sizes).result()


def rows(sizes: Sizes) -> list[dict]:
    """A row for each MoE, batch that eight devices divide, and kind of collective over the expert axis, those of all layers together.

    Keys: experts, batch, collective, axis, bytes_per_device (sent in a step; buffers have room for the worst case, so that nothing is
    dropped), bytes_per_token, needed_bytes_per_token (of all collectives: `needed_bytes`).
    """
    start_with(DEVICES)
    mesh = make_mesh(Config(model=sizes.model(sizes.moes[0]), mesh=MeshConfig(data=1, expert=DEVICES)), jax.devices()[:DEVICES])
    return [
        {
            "experts": moe.name,
            "batch": batch,
            "collective": kind,
            "axis": "+".join(axes),
            "bytes_per_device": sent,
            "bytes_per_token": sent * DEVICES / batch,
            "needed_bytes_per_token": needed_bytes(moe, sizes),
        }
        for moe in sizes.moes
        for batch in sizes.batches
        if batch % DEVICES == 0
        for (axes, kind), sent in by_axis(ledger(_step(sizes, moe, batch, mesh), mesh)).items()
    ]


def needed_bytes(moe: Experts, sizes: Sizes) -> float:
    """Bytes a token must send and get back in all layers where experts are chosen at random: itself to each other device that has one of
    its experts, and an answer home."""
    elsewhere = moe.experts - moe.experts // DEVICES
    missed = math.comb(elsewhere, moe.top_k) / math.comb(moe.experts, moe.top_k)
    return 2 * sizes.layers * (DEVICES - 1) * (1 - missed) * sizes.d_model * np.dtype(sizes.dtype).itemsize


def _step(sizes, moe, batch, mesh) -> jax.stages.Compiled:
    """A step of decoding, compiled from shapes."""
    model = sizes.model(moe)

    def place(shapes):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.sharding.spec)), shapes
        )

    def row(dtype):
        return jax.ShapeDtypeStruct((batch,), dtype, sharding=NamedSharding(mesh, batch_spec(1)))

    with jax.set_mesh(mesh):
        weights = place(jax.eval_shape(lambda: decoder_weights(model, *build(model, 0)[1:])))
        graph = decoder_graph(inference_config(model, "dropless"), weights[0])

        def step(weights, cache, tokens_B, at_B, live_B):
            logits_BV, load_LE, cache = nnx.merge(graph, *weights).decode(cache, tokens_B, at_B, live_B)
            return jax.sharding.reshard(logits_BV, PartitionSpec()), load_LE, cache

        empty = place(
            jax.eval_shape(lambda weights: nnx.merge(graph, *weights).new_cache(batch, sizes.context, CACHE_DTYPES[0]), weights)
        )
        lowered = jax.jit(step, donate_argnums=1).lower(weights, empty, row(np.int32), row(np.int32), row(bool))
        return lowered.compile(QUICK_COMPILE)
