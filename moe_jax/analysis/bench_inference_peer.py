"""Decoding speed beside transformers' `generate` on the same checkpoint, in turn, each side in a process of its own.

Both continue the same prompts greedily by as many tokens in float32, the peer with its own cache and at the fastest of its ways to run
experts (`EXPERTS`), found anew for each shape and batch and named in the row. A call is whole: the short prompts are read in it too.
"""

import functools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.analysis import timing
from moe_jax.analysis.bench_peer import import_peer
from moe_jax.analysis.contender import Contender
from moe_jax.analysis.devices import start_with
from moe_jax.config import Config, MeshConfig
from moe_jax.convert import initial
from moe_jax.heap import keep_freed_memory
from moe_jax.mesh import make_mesh
from moe_jax.models.generator import Generator, continue_texts
from moe_jax.models.inference_weights import lay_out_for_inference
from moe_jax.models.sampling import Sampling

EXPERTS = ("eager", "grouped_mm", "batched_mm")
WARMUP = 2


class Shape(NamedTuple):
    """A model, as a class of transformers and what that calls its sizes, and what is asked of it."""

    family: str
    sizes: tuple[tuple[str, Any], ...]
    hidden_size: int = 512
    heads: int = 8
    kv_heads: int = 2
    layers: int = 4
    vocabulary: int = 4096
    prompt: int = 16
    new_tokens: int = 64

    @property
    def settings(self) -> dict[str, Any]:
        """Of the config's class."""
        return dict(self.sizes) | dict(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden_size // self.heads,
            max_position_embeddings=self.prompt + self.new_tokens,
            initializer_range=0.05,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )


SHAPES = (
    Shape(
        "Mixtral", (("num_local_experts", 8), ("num_experts_per_tok", 2), ("intermediate_size", 1408), ("sliding_window", None))
    ),
    Shape(
        "Qwen3Moe", (("num_experts", 64), ("num_experts_per_tok", 8), ("moe_intermediate_size", 352), ("norm_topk_prob", True))
    ),
)
BATCHES = (1, 16)


def rows(repeats: int, shapes: Sequence[Shape] = SHAPES, batches: Sequence[int] = BATCHES) -> list[dict]:
    """A row for each shape and batch: model, batch, our and the peer's tokens per second (medians), ratio (of the speeds, ours to the
    peer's, median over repeats in which both run in turn, `_min`, `_max`) and the peer's way to run experts.

    Raises:
      ConfigError: torch or transformers is missing.
    """
    import_peer()
    results = []
    for shape in shapes:
        with tempfile.TemporaryDirectory(prefix="peer-") as folder:
            with Contender(write_checkpoint, shape, folder):
                pass
            results += [_row(shape, folder, batch, repeats) for batch in batches]
    return results


def prompts(shape: Shape, batch: int) -> np.ndarray:
    """int32 [batch, prompt]."""
    return np.random.default_rng(0).integers(0, shape.vocabulary, (batch, shape.prompt)).astype(np.int32)


def _row(shape, folder, batch, repeats):
    def trial(experts):
        with Contender(peer_call, shape, folder, batch, experts) as call:
            return statistics.median(timing.interleaved({"peer": call}, repeats=2, warmup=1)["peer"])

    chosen = min(EXPERTS, key=trial)
    with Contender(our_call, shape, folder, batch) as ours, Contender(peer_call, shape, folder, batch, chosen) as peer:
        seconds = timing.interleaved({"ours": ours, "peer": peer}, repeats, WARMUP)
    tokens, (median, least, greatest) = batch * shape.new_tokens, timing.ratio(seconds["peer"], seconds["ours"])
    return {
        "model": f"{shape.family} {shape.sizes[0][1]}x{shape.sizes[1][1]}",
        "batch": batch,
        "phase": "decode",
        "tokens_per_second": tokens / statistics.median(seconds["ours"]),
        "peer_tokens_per_second": tokens / statistics.median(seconds["peer"]),
        "ratio": median,
        "ratio_min": least,
        "ratio_max": greatest,
        "peer_experts": chosen,
    }


def write_checkpoint(shape, folder) -> Callable[[], None]:
    """Writes a checkpoint of random weights."""
    torch, transformers = import_peer()
    torch.manual_seed(0)
    config = getattr(transformers, f"{shape.family}Config")(**shape.settings)
    getattr(transformers, f"{shape.family}ForCausalLM")(config).save_pretrained(folder)
    return lambda: None


def our_call(shape: Shape, folder: str, batch: int) -> Callable[[], np.ndarray]:
    """`make_call` for a process of its own, which it starts with one device."""
    start_with(1)
    keep_freed_memory()
    return make_call(shape, folder, batch)


def make_call(shape: Shape, folder: str, batch: int) -> Callable[[], np.ndarray]:
    """A call that gives the new tokens, [batch, new_tokens]."""
    config = initial.complete(Config(init_from=f"hf:{folder}", mesh=MeshConfig(data=1)))
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        weights = initial.load(initial.open_for(config), config, mesh)
    length = shape.prompt + shape.new_tokens
    generator = Generator(
        lay_out_for_inference(config.model, *weights, mesh), vocab_size=shape.vocabulary, rows=batch, max_length=length
    )
    greedy, texts = [Sampling(temperature=0.0)] * batch, list(prompts(shape, batch))
    return lambda: np.stack(continue_texts(generator, texts, greedy, shape.new_tokens))


def peer_call(shape: Shape, folder: str, batch: int, experts: str) -> Callable[[], np.ndarray]:
    """The same of transformers."""
    keep_freed_memory()
    torch, transformers = import_peer()
    model = getattr(transformers, f"{shape.family}ForCausalLM").from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
    )
    ids = torch.from_numpy(prompts(shape, batch)).long()
    options = dict(do_sample=False, max_new_tokens=shape.new_tokens, min_new_tokens=shape.new_tokens)
    generate = functools.partial(model.eval().generate, ids, attention_mask=torch.ones_like(ids), **options)
    return lambda: generate()[:, shape.prompt :].numpy()
