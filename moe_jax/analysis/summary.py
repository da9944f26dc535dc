"""What a run says when it starts and when it ends."""

import pathlib

import jax
import numpy as np

from moe_jax.analysis.tables import evaluation_table, load_table
from moe_jax.config import Config
from moe_jax.data.corpus import Corpus
from moe_jax.sizes import flops_per_token, num_params


def opening(config: Config, mesh: jax.sharding.Mesh, corpus: Corpus) -> str:
    """Model, router, mesh, corpus and length of the run, in a few lines."""
    model, moe, count = config.model, config.model.moe, num_params(config.model)
    lines = [
        f"model   {count.total:,} parameters, {count.active:,} active per token ({count.active / count.total:.0%});"
        f" {model.num_layers} layers, width {model.d_model}, {flops_per_token(model, config.data.seq_len) / 1e6:.1f}"
        " MFLOPs per token forward"
    ]
    if model.num_moe_layers:
        lines.append(
            f"experts {moe.num_experts} per layer in {model.num_moe_layers} layers, {moe.router.top_k} per token"
            f" + {moe.num_shared_experts} shared; router {moe.router.name}, dispatch {moe.dispatch}, exchange {moe.exchange}"
        )
    devices = f"{mesh.size} {'emulated ' if config.mesh.emulate else ''}{mesh.devices.flat[0].device_kind} device(s)"
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if axis != "expert_outer" or size > 1)
    batch = f"{config.data.batch_size} x {config.data.seq_len} tokens"
    lines += [
        f"mesh    {axes} on {devices}",
        f"data    {corpus.describe()}",
        *([f"        {corpus.left_out}"] if corpus.left_out else []),
        f"run     {config.train.steps} steps of {batch} in {config.workdir}",
    ]
    return "\n".join(lines)


def closing(config: Config, corpus: Corpus, evaluation: dict, text: str) -> str:
    """Validation loss beside the unigram entropy, expert loads, a sample, where everything is, and what to try next."""
    loss, entropy = evaluation["eval/loss"], corpus.unigram_entropy()[0]
    scalars = {name: value for name, value in evaluation.items() if np.ndim(value) == 0}
    learned = f"{entropy - loss:.3f} nats were learned from context" if loss < entropy else "the model is not below it yet"
    parts = [
        f"Validation\n{evaluation_table(scalars)}",
        f"Validation loss {loss:.3f} nats per token; the unigram entropy, the best a model can do that sees no context, is"
        f" {entropy:.3f}: {learned}.",
    ]
    if "eval/load" in evaluation:
        moe = config.model.moe
        table = load_table(evaluation["eval/load"], moe.first_dense + moe.every - 1, moe.every)
        dropped = f"{evaluation['eval/dropped_fraction']:.2%} of the assignments dropped"
        parts.append(f"Expert load in validation, 1.00 = an equal share (MaxVio = largest - 1), {dropped}\n{table}")
    if text:
        parts.append(f"Sample (temperature 0.7)\n{text}")
    return "\n\n".join(["", *parts, _files(config), _next(config)])


def _files(config):
    folder = pathlib.Path(config.workdir)
    lines = [
        f"Everything is in {folder}/",
        "  checkpoints/   parameters, optimizer, router bias, data position",
        "  metrics.jsonl  every logged step, expert loads included",
        "  config.json    the whole config; versions.json beside it",
    ]
    if config.train.tensorboard:
        lines.append(f"  tensorboard/   tensorboard --logdir={folder}")
    return "\n".join(lines)


def _next(config):
    folder = config.workdir
    emulate = f" --config.mesh.emulate={config.mesh.emulate}" if config.mesh.emulate else ""
    return "\n".join(
        [
            "Try next",
            f"  python -m launch.sample --workdir={folder} --prompt='def main('",
            f"  python -m launch.evaluate --workdir={folder} --mesh=data=1,expert=1,emulate=0   # the same loss on one device",
            "  python -m launch.train --config=configs/quickstart.py --config.workdir=runs/switch"
            f" --config.model.moe.router.name=switch --config.model.moe.router.top_k=1{emulate}",
        ]
    )
