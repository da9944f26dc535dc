"""The figures of one finished run, read from its folder."""

import json
import pathlib
from dataclasses import dataclass

import numpy as np

from moe_jax.config import Config, from_dict
from moe_jax.routing.metrics import noise_floor
from moe_jax.sizes import flops_per_token, num_params
from moe_jax.train.run_info import read_config_tree


@dataclass(frozen=True)
class RunFigures:
    """What the ablation table says of a run; None where the model is dense, or where nothing was logged.

    Attributes:
      dense: whether the model has no router.
      loss: of the whole validation set at the end, nats per token.
      step_seconds: median over the logged steps.
      max_violation_global: MaxVio of each layer's loads over the whole validation set, mean over layers (2408.15664, section 3).
      max_violation_batch: MaxVio of each layer's loads in a training step, mean over layers and the last quarter of the steps.
      noise_floor: about the `max_violation_global` of uniform random routing, mean over layers.
      dropped: fraction of the assignments that a full buffer dropped in training, mean over the last quarter of the steps.
      dead: experts, of all layers together, to which no validation token went.
      experts: that a token went to in training, mean over layers and the last quarter of the steps.
      entropy: of the router's probabilities over its largest value, mean over layers and the last quarter of the steps.
      total: parameters.
      active: parameters that a token uses.
      flops: matmul FLOPs of a token's forward pass.
      commit: of the code, "dirty" where files differed from it; "" where not known.
    """

    dense: bool
    loss: float
    step_seconds: float | None
    max_violation_global: float | None
    max_violation_batch: float | None
    noise_floor: float | None
    dropped: float | None
    dead: float | None
    experts: float | None
    entropy: float | None
    total: int
    active: int
    flops: int
    commit: str


def read_run(workdir: str | pathlib.Path) -> RunFigures | None:
    """The figures of the run in `workdir`; None where it has not come to its end."""
    workdir = pathlib.Path(workdir)
    if not (workdir / "config.json").is_file():
        return None
    config = from_dict(read_config_tree(workdir))
    records = _records(workdir / "metrics.jsonl")
    last = records[-1] if records else {}
    if last.get("step") != config.train.steps or last.get("eval/loss") is None:
        return None
    late = [record for record in records if record["step"] > 0.75 * config.train.steps]
    count = num_params(config.model)
    return RunFigures(
        dense=config.model.num_moe_layers == 0,
        loss=last["eval/loss"],
        step_seconds=_step_seconds(records, config),
        **_balance(last),
        max_violation_batch=_late(late, "router/max_violation"),
        dropped=_late(late, "router/dropped_fraction"),
        experts=_late(late, "router/experts_per_token"),
        entropy=_late(late, "router/entropy"),
        total=count.total,
        active=count.active,
        flops=flops_per_token(config.model, config.data.seq_len),
        commit=_commit(workdir / "versions.json"),
    )


def is_finished(workdir: str | pathlib.Path) -> bool:
    """Whether the run in `workdir` has come to its end."""
    return read_run(workdir) is not None


def _records(path):
    """The lines of metrics.jsonl; without the one that a kill cut short."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if lines and not lines[-1].endswith("}"):
        lines.pop()
    return [json.loads(line) for line in lines]


def _step_seconds(records, config: Config):
    tokens = config.data.batch_size * config.data.seq_len
    speeds = [record["train/tokens_per_second"] for record in records if record.get("train/tokens_per_second")]
    return float(np.median([tokens / speed for speed in speeds])) if speeds else None


def _balance(last):
    """From the loads [L, E] of the whole validation set. Layers where nothing was routed are left out of the means."""
    load_LE = np.asarray(last.get("eval/load", np.zeros((0, 0))), np.float64)
    routed_LE = load_LE[load_LE.sum(1) > 0] if load_LE.size else load_LE
    figures = {"max_violation_global": None, "noise_floor": None, "dead": None}
    if load_LE.size:
        figures["dead"] = float(np.sum(load_LE == 0))
    if routed_LE.size:
        mean_L = routed_LE.mean(1)
        figures["max_violation_global"] = float(np.mean(routed_LE.max(1) / mean_L - 1))
        figures["noise_floor"] = float(np.mean([noise_floor(routed_LE.shape[1], mean) for mean in mean_L]))
    return figures


def _late(records, name):
    """Mean over records and layers."""
    values = [np.mean(np.asarray(record[name], np.float64)) for record in records if name in record]
    return float(np.mean(values)) if values else None


def _commit(path):
    git = json.loads(path.read_text(encoding="utf-8")).get("git") if path.is_file() else None
    return f"{git['commit']}{' dirty' * git['dirty']}" if git else ""
