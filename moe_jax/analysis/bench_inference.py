"""Inference of a mixture of experts beside two dense models: one of its active parameters, one of all of them.

A step of decoding is `Generator.step` as a server runs it, the tokens fetched by the host; prefill is `Generator.admit` of one prompt.
All models of a batch size are held at once and timed in turn, in one process on one device, and with them what the machine can do:
a sum over an array far larger than any cache, and a square product in the models' dtype. Tokens are drawn at temperature 1: greedy
texts of random weights soon run into each other, and then choose the same experts.
"""

import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.program_bytes import program_bytes
from moe_jax.analysis.timing import interleaved, ratio
from moe_jax.config import AttentionConfig, Config, MeshConfig, ModelConfig, MoEConfig, RouterConfig
from moe_jax.mesh import make_mesh, target_platform
from moe_jax.models.generator import Generator, expert_path
from moe_jax.models.inference_weights import InferenceModel, lay_out_for_inference
from moe_jax.models.sampling import Sampling
from moe_jax.models.transformer import build
from moe_jax.ops.separate_experts import block_rows
from moe_jax.sizes import cache_size, flops_per_token, num_params

ADMITTED = 16  # rows that get their first token together
WARMUP = 2  # rounds before the timed ones
SECONDS = 0.25  # a timed call has as many steps as take about so long


class Experts(NamedTuple):
    """The experts of a model: how many, how many a token, and their width."""

    experts: int
    top_k: int
    d_ff: int

    @property
    def name(self) -> str:
        """ "8x2" """
        return f"{self.experts}x{self.top_k}"


class Sizes(NamedTuple):
    """What is measured. The models differ in their feed-forward networks alone."""

    moes: tuple[Experts, ...] = (Experts(8, 2, 2816), Experts(64, 8, 704))
    batches: tuple[int, ...] = (1, 4, 16, 64, 256)
    prompt: int = 512  # tokens that prefill reads
    context: int = 256  # tokens that a row has room for while it is decoded, all of which every step looks at
    d_model: int = 1024
    layers: int = 4
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64
    vocabulary: int = 4096
    dtype: str = "float32"
    stream_megabytes: int = 512  # of the sum that tells the memory's bandwidth
    matmul: int = 2048  # width of the product that tells the peak
    most_steps: int = 16  # of a timed call

    def model(self, of: Experts | int) -> ModelConfig:
        """The model with these experts, or the dense one of this width."""
        moe = MoEConfig(num_experts=0, num_shared_experts=0)
        if isinstance(of, Experts):
            moe = MoEConfig(of.experts, of.d_ff, num_shared_experts=0, router=RouterConfig("mixtral", of.top_k))
        return ModelConfig(
            vocab_size=self.vocabulary,
            d_model=self.d_model,
            num_layers=self.layers,
            d_ff=of.d_ff if isinstance(of, Experts) else of,
            dtype=self.dtype,
            remat="none",
            attention=AttentionConfig(self.heads, self.kv_heads, self.head_dim),
            moe=moe,
        )


SIZES = {
    "cpu": Sizes(),
    # 6 billion parameters in all, Mixtral's width and experts (2401.04088) and fewer layers: every model is held twice while it is laid out
    "gpu": Sizes(
        (Experts(8, 2, 14336), Experts(64, 8, 1792)),
        prompt=2048,
        d_model=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocabulary=32000,
        dtype="bfloat16",
        stream_megabytes=8192,
        matmul=8192,
    ),
}


class Machine(NamedTuple):
    """What the machine did beside the models: bytes and FLOPs a second, medians."""

    bandwidth: float
    peak: float


class Timed(NamedTuple):
    """A model in one phase, and what a call of it was: `tokens` more, or read, `steps` times.

    Attributes:
      seconds: of each step, a repeat each.
      load_SLE: int64, assignments of each step to each layer's experts.
      text: the compiled program's.
    """

    model: ModelConfig
    tokens: int
    seconds: list[float]
    load_SLE: np.ndarray
    text: str


def rows(sizes: Sizes | None = None, repeats: int = 7) -> list[dict]:
    """Three rows for each MoE, batch and phase: `model` "moe", "dense_active" (of equal active parameters) and "dense_total".

    Keys: experts ("8x2"), model, batch, phase ("decode": a token for each of `batch` texts; "prefill": `batch` texts of `prompt` tokens),
    tokens_per_second, ratio_to_dense_active and ratio_to_dense_total (of the times of a step: less than 1 is faster than that model;
    medians over repeats in which all are timed in turn, and `_min`, `_max`), bytes_per_token (moved by the compiled program,
    `program_bytes`), needed_bytes_per_token (`needed_bytes`), flops_per_token (`sizes.flops_per_token`: of what is
    chosen, not of what is masked), milliseconds of a step (median, `_min`, `_max`), gigabytes_per_second (the program's bytes by the
    median), ratio_to_roofline (the least time that the machine would need by its bandwidth for the needed bytes or by its peak for the
    FLOPs, whichever is longer, over the time that it took: 1 is all that can be had), distinct_experts (a layer and step, measured) and
    distinct_expected (E (1 - (1 - K / E)^tokens)), parameters, active, bandwidth and peak (GB/s, GFLOP/s, measured beside the rows).
    """
    sizes = SIZES["cpu" if target_platform() == "cpu" else "gpu"] if sizes is None else sizes
    sizes = sizes._replace(context=max(sizes.context, repeats + 8))
    config = Config(model=sizes.model(sizes.moes[0]), mesh=MeshConfig(data=1))
    mesh = make_mesh(config, jax.devices()[:1])
    contenders = {of: sizes.model(of) for moe in sizes.moes for of in (moe, *rivals(moe))}
    weights = {of: _weights(model, mesh) for of, model in contenders.items()}
    machine, results = _machine_calls(sizes), []
    for phase, batch in [("prefill", 1), *(("decode", batch) for batch in sizes.batches)]:
        measure = _prefill if phase == "prefill" else _decode
        timed, limits = measure(contenders, weights, mesh, machine, sizes, batch, repeats)
        for moe in sizes.moes:
            family = dict(zip(("moe", "dense_active", "dense_total"), (timed[of] for of in (moe, *rivals(moe))), strict=True))
            results += [_row(moe, name, phase, batch, family, sizes, limits) for name in family]
    order = {moe.name: i for i, moe in enumerate(sizes.moes)}
    return sorted(results, key=lambda row: (order[row["experts"]], row["phase"]))


def rivals(moe: Experts) -> tuple[int, int]:
    """Widths of the dense models of equal active and of equal total parameters; the router's weights, E x D a layer, are their saving."""
    return moe.top_k * moe.d_ff, moe.experts * moe.d_ff


def expected_distinct(moe: Experts, tokens: int) -> float:
    """Experts that so many tokens choose between them, each K of E at random: E (1 - (1 - K / E)^tokens)."""
    return moe.experts * (1 - (1 - moe.top_k / moe.experts) ** tokens)


def needed_bytes(model: ModelConfig, distinct: float, cache_rows: int, context: int) -> float:
    """Bytes that a step cannot do without: each weight once, of experts those of `distinct` a layer, and the caches of `cache_rows` texts.

    The embedding's rows and the activations are left out; norms and routers count as the compute dtype.
    """
    count = num_params(model)
    experts = count.experts * distinct / max(model.moe.num_experts, 1)
    numbers = count.total - count.embedding - count.experts + experts + cache_rows * cache_size(model).values(context)
    return numbers * jnp.dtype(model.dtype).itemsize


def _weights(model, mesh) -> Callable[[], InferenceModel]:
    """The model laid out for inference when called; kept on a CPU, made anew where room is dear."""

    def narrowed(array):
        return array.astype(model.dtype) if array.ndim > 2 else array

    with jax.set_mesh(mesh):
        make = jax.jit(lambda: jax.tree.map(narrowed, build(model, 0)[1:]))

    def call():
        with jax.set_mesh(mesh):
            laid_out = lay_out_for_inference(model, *make(), mesh)
        jax.block_until_ready(laid_out.weights)
        return laid_out

    return functools.cache(call) if target_platform() == "cpu" else call


def _generator(model, weights, mesh, rows, length):
    cache_dtype = "bfloat16" if model.dtype == "bfloat16" else "float32"
    sizes = dict(vocab_size=model.vocab_size, rows=rows, max_length=length, cache_dtype=cache_dtype)
    return Generator(weights(), **sizes)


def _machine_calls(sizes):
    """Calls that show bandwidth and peak, "stream" and "matmul"."""
    stream = jnp.ones((sizes.stream_megabytes * 2**20 // 4 // 4096, 4096), jnp.float32)
    square = jnp.ones((sizes.matmul, sizes.matmul), sizes.dtype)
    total, product = jax.jit(lambda x: jnp.sum(x, axis=1)), jax.jit(lambda x: x @ x)
    return {"stream": lambda: total(stream), "matmul": lambda: product(square)}


def _measure(calls, steps, machine, sizes, repeats):
    """(seconds of a step by name, what the machine did)."""
    seconds = interleaved(calls | machine, repeats, WARMUP)
    stream, matmul = (statistics.median(seconds.pop(name)) for name in machine)
    limits = Machine(sizes.stream_megabytes * 2**20 / stream, 2 * sizes.matmul**3 / matmul)
    return {name: [s / steps[name] for s in each] for name, each in seconds.items()}, limits


def _prefill(contenders, weights, mesh, machine, sizes, batch, repeats):
    prompts = np.random.default_rng(0).integers(0, sizes.vocabulary, (batch, sizes.prompt)).astype(np.int32)
    generators = {of: _generator(model, weights[of], mesh, batch, sizes.prompt + 1) for of, model in contenders.items()}
    loads = {of: [] for of in contenders}

    def read(of):
        before = generators[of].expert_load.copy()
        generators[of].admit(dict(enumerate(prompts)), {row: Sampling(seed=row) for row in range(batch)})
        for row in range(batch):
            generators[of].release(row)
        loads[of].append(generators[of].expert_load - before)

    calls = {of: functools.partial(read, of) for of in contenders}
    seconds, limits = _measure(calls, dict.fromkeys(calls, 1), machine, sizes, repeats)
    texts, tokens = {of: prefill_text(generator, prompts) for of, generator in generators.items()}, prompts.size
    return {of: Timed(m, tokens, seconds[of], np.stack(loads[of]), texts[of]) for of, m in contenders.items()}, limits


def _decode(contenders, weights, mesh, machine, sizes, batch, repeats):
    generators = {of: _generator(model, weights[of], mesh, batch, sizes.context) for of, model in contenders.items()}
    loads, steps = {of: [] for of in contenders}, dict.fromkeys(contenders, 1)

    def several(of):
        for _ in range(steps[of]):
            before = generators[of].expert_load.copy()
            generators[of].step()
            loads[of].append(generators[of].expert_load - before)

    calls = {of: functools.partial(several, of) for of in contenders}
    most = min(
        sizes.most_steps, (sizes.context - 4) // (repeats + WARMUP)
    )  # a text begins with one token, and two steps come before
    for of, generator in generators.items():
        start(generator, sizes.vocabulary)
        (once,) = interleaved({of: calls[of]}, repeats=1, warmup=1)[of]
        steps[of] = max(1, min(most, round(SECONDS / once)))
    seconds, limits = _measure(calls, steps, machine, sizes, repeats)
    texts = {of: step_text(generator) for of, generator in generators.items()}
    return {of: Timed(m, batch, seconds[of], np.stack(loads[of]), texts[of]) for of, m in contenders.items()}, limits


def start(generator: Generator, vocabulary: int) -> None:
    """Gives every row a text of one random token, at temperature 1; a second token is drawn."""
    tokens = np.random.default_rng(1).integers(0, vocabulary, (generator.rows, 1)).astype(np.int32)
    for first in range(0, generator.rows, ADMITTED):
        some = range(first, min(first + ADMITTED, generator.rows))
        generator.admit({row: tokens[row] for row in some}, {row: Sampling(seed=row) for row in some})


def step_text(generator: Generator) -> str:
    """The optimised program of the generator's step, which is compiled already."""
    return generator.lower_step().compile().as_text()


def prefill_text(generator: Generator, prompts: np.ndarray) -> str:
    """The same of reading prompts [P, S] of a bucket's own shape (powers of two)."""
    return generator.lower_prefill(*prompts.shape).compile().as_text()


def distinct_experts(load_SLE: np.ndarray) -> float:
    """Experts that got a token, mean over steps and layers."""
    return float((load_SLE > 0).sum(-1).mean()) if load_SLE.size else 0.0


def moved_bytes(of: Timed) -> float:
    """Bytes of a step by its program, whose loop over experts turns once for each that is chosen, or once for each block of its rows."""
    if not of.model.num_moe_layers:
        return program_bytes(of.text)
    moe, distinct = of.model.moe, distinct_experts(of.load_SLE)
    size = block_rows(of.tokens * moe.router.top_k, moe.num_experts)
    blocks = float((-(-of.load_SLE // size)).sum(-1).mean())
    trips = distinct if expert_path(of.tokens, moe) == "touched" else blocks
    return program_bytes(of.text, loop_trips=trips, stack_share=(moe.num_experts, distinct / moe.num_experts))


def _row(moe, name, phase, batch, family, sizes, limits):
    of, count = family[name], num_params(family[name].model)
    seconds, ratios = statistics.median(of.seconds), {}
    for rival in ("dense_active", "dense_total"):
        ends = zip(("", "_min", "_max"), ratio(of.seconds, family[rival].seconds), strict=True)
        ratios |= {f"ratio_to_{rival}{end}": value for end, value in ends}
    is_moe, prompt = of.model.num_moe_layers > 0, phase == "prefill"
    distinct, moved = distinct_experts(of.load_SLE), moved_bytes(of)
    flops = flops_per_token(of.model, sizes.prompt if prompt else 2 * sizes.context - 1)  # its mean context is half of that
    needed = needed_bytes(of.model, distinct, 0 if prompt else batch, sizes.context)
    floor = max(needed / limits.bandwidth, flops * of.tokens / limits.peak)
    return {
        "experts": moe.name,
        "model": name,
        "batch": batch,
        "phase": phase,
        "tokens_per_second": of.tokens / seconds,
        "ratio_to_dense_active": ratios["ratio_to_dense_active"],
        "ratio_to_dense_total": ratios["ratio_to_dense_total"],
        "bytes_per_token": moved / of.tokens,
        "needed_bytes_per_token": needed / of.tokens,
        "flops_per_token": flops,
        "milliseconds": 1e3 * seconds,
        "milliseconds_min": 1e3 * min(of.seconds),
        "milliseconds_max": 1e3 * max(of.seconds),
        "gigabytes_per_second": 1e-9 * moved / seconds,
        "ratio_to_roofline": floor / seconds,
        "distinct_experts": distinct if is_moe else None,
        "distinct_expected": expected_distinct(moe, of.tokens) if is_moe else None,
        **{key: value for key, value in ratios.items() if key.endswith(("_min", "_max"))},
        "parameters": count.total,
        "active": count.active,
        "bandwidth": 1e-9 * limits.bandwidth,
        "peak": 1e-9 * limits.peak,
    }
