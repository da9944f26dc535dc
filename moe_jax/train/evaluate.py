"""Evaluation on every domain: loss, perplexity, bits per byte, and where the tokens went."""

import math
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.mesh import shard_batch
from moe_jax.models.transformer import token_ids
from moe_jax.routing.record import RECORDED
from moe_jax.train import objective as obj
from moe_jax.train.observatory import Observer, hand_out, take_observed
from moe_jax.train.tape import Tape, eval_key, take_record


def make_eval_step(
    config: ModelConfig, graphdef: nnx.GraphDef, token_bytes_V: np.ndarray, *, record: bool = False, observe: bool = False
) -> Callable[..., dict[str, jax.Array]]:
    """The jitted `(params, router_state, batch) -> sums`: nll, targets, bytes of the targets, and loads [L, E] for an MoE.

    `token_bytes_V` is the number of text bytes of each token, padded to the model's vocabulary with zeros.
    With `record` the sums have the routing's `record/choice` and `record/choice_weight`, [B, S, L, M], beside them; with `observe`
    what the observatory counts (`train.observatory.hand_out`), and the batch has `document_ids`.
    """
    token_bytes_V = np.pad(token_bytes_V, (0, config.vocab_size - len(token_bytes_V))).astype(np.float32)

    def eval_step(params, router_state, batch):
        batch = batch | {"token_id": token_ids(batch["tokens"])}
        settings = {"graphdef": graphdef, "config": config, "record": record or observe}
        _, (sums, recorded) = obj.objective(params, router_state, batch, None, obj.count(batch), **settings)
        bytes_BS = jnp.asarray(token_bytes_V).at[batch["targets"]].get(out_sharding=jax.typeof(batch["targets"]).sharding)
        counted = batch["loss_weights"]
        result = {"nll": sums.nll, "targets": jnp.sum(counted), "bytes": jnp.sum(bytes_BS * counted)}
        if sums.stats is not None:
            stats = sums.stats
            dropped_L = stats.dropped_capacity + stats.dropped_sender + stats.dropped_receiver
            result |= {"load": stats.load_E, "dropped": jnp.sum(dropped_L)}
        if record:
            result |= {f"record/{name}": recorded[name] for name in RECORDED}
        return result | (hand_out(config, batch, sums, recorded) if observe else {})

    return jax.jit(eval_step)


def evaluate(
    eval_step: Callable[..., dict[str, jax.Array]],
    params: dict,
    router_state: dict,
    mesh: jax.sharding.Mesh,
    batches_by_domain: Mapping[str, Iterable[dict[str, np.ndarray]]],
    tape: Tape | None = None,
    observer: Observer | None = None,
) -> dict[str, float | np.ndarray]:
    """Flat metrics: `eval/<domain>/loss` (nats per token), `/perplexity`, `/bits_per_byte`, the same for `eval/` over all domains
    together, and `eval/load` [L, E] and `eval/dropped_fraction` (both by domain too). Router noise is off.

    With a `tape` the routing is recorded (by an `eval_step` that records) or replayed; an `observer` is given what an `eval_step` that
    observes hands out.
    """
    metrics, totals = {}, None
    for domain, batches in batches_by_domain.items():
        sums = None
        for number, batch in enumerate(batches):
            key = eval_key(domain, number)
            told = batch if tape is None else tape.tell(key, batch)
            new, recorded = take_record(eval_step(params, router_state, shard_batch(mesh, told)))
            new, observed = take_observed(new)
            if observer is not None:
                observer.add(domain, observed)
            if tape is not None:
                tape.write(key, batch, recorded)
            new = jax.tree.map(_widen, jax.device_get(new))
            sums = new if sums is None else jax.tree.map(np.add, sums, new)
        metrics |= _figures(f"eval/{domain}/", sums)
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    return metrics | _figures("eval/", totals)


def _widen(x):
    """Counts and sums of many batches: int64 and float64 on the host."""
    return x.astype(np.int64 if x.dtype.kind == "i" else np.float64)


def _figures(prefix, sums):
    nll = float(sums["nll"]) / max(float(sums["targets"]), 1.0)
    figures = {f"{prefix}loss": nll, f"{prefix}perplexity": math.exp(min(nll, 700.0))}
    if sums["bytes"] > 0:
        figures[f"{prefix}bits_per_byte"] = float(sums["nll"]) / math.log(2) / float(sums["bytes"])
    if "load" in sums:
        figures |= {
            f"{prefix}load": sums["load"],
            f"{prefix}dropped_fraction": float(sums["dropped"]) / max(float(np.sum(sums["load"])), 1.0),
        }
    return figures
