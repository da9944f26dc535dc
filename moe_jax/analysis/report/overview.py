"""What was trained, on what, how fast, and what a dense model of its size would cost."""

import dataclasses
import math

import numpy as np

from moe_jax.analysis.report.markup import Html, paragraph, table
from moe_jax.analysis.report.runs import Run
from moe_jax.config import Config, MoEConfig
from moe_jax.mesh import AXES
from moe_jax.sizes import flops_per_token, num_params
from moe_jax.validation import RefusalError, check_devices


def overview(run: Run) -> list[Html]:
    """A table of facts, and one of costs beside dense models."""
    config, count = run.config, num_params(run.config.model)
    rows = [
        ("run folder", run.workdir),
        ("model", _model(config)),
        ("router", _router(config)),
        ("experts", _experts(config)),
        ("parameters", f"{count.total:,} in all, {count.active:,} active for a token ({count.active / count.total:.1%})"),
        ("text", f"{config.data.corpus}, tokenizer {config.data.tokenizer}, rows of {config.data.seq_len:,} tokens"),
        ("trained", _trained(run)),
        ("computation", _computation(run)),
        ("speed", _speed(run)),
        ("mesh", _mesh(run)),
        ("made with", _versions(run.versions)),
    ]
    parts = [table("The run", ("", ""), [(name, value) for name, value in rows if value])]
    return [*parts, *_costs(run)] if config.model.num_moe_layers else parts


def lead(run: Run) -> str:
    """The run in two sentences."""
    config, count = run.config, num_params(run.config.model)
    router = f"Router {_router(config)}" if config.model.num_moe_layers else "A dense model"
    active = f", {count.active:,} active for a token" if config.model.num_moe_layers else ""
    tokens = steps_done(run) * config.data.batch_size * config.data.seq_len
    loss_N, bits_N = run.series("eval/loss")[1], run.series("eval/bits_per_byte")[1]
    bits = f" ({bits_N[-1]:.3f} bits per byte)" if len(bits_N) else ""
    loss = f" Validation loss {loss_N[-1]:.3f} nats per token{bits}." if len(loss_N) else ""
    return f"{router}; {count.total:,} parameters{active}; {steps_done(run):,} steps, {tokens:,} tokens.{loss}"


def steps_done(run: Run) -> int:
    """The last step that was logged."""
    return int(run.records[-1]["step"])


def dense_equivalent(config: Config, params: int) -> Config | None:
    """The config with a dense FFN in every layer, as wide as gives about `params` parameters; None where no width does.

    Attention, width and depth stay the same, so that only the FFN differs.
    """
    model = dataclasses.replace(config.model, moe=MoEConfig(num_experts=0))
    narrow, wide = (num_params(dataclasses.replace(model, d_ff=width)).total for width in (1, 2))
    width = round((params - narrow) / (wide - narrow)) + 1
    return dataclasses.replace(config, model=dataclasses.replace(model, d_ff=width)) if width > 0 else None


def short_number(number: float) -> str:
    """1.23 M, 4.5 G, to set before a unit; below 10,000 plain, and a space."""
    if abs(number) < 1e4:
        return f"{number:,.0f} "
    power = min(int(math.log10(abs(number)) // 3), 7)
    return f"{number / 1000**power:.3g} {' kMGTPEZ'[power]}"


def duration(seconds: float) -> str:
    """3 min 20 s; hours and days where there are any."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    return f"{int(hours)} h {int(minutes % 60)} min" if hours < 48 else f"{days:.1f} days"


def _model(config):
    model = config.model
    moe = f", {model.num_moe_layers} of them with experts" if model.num_moe_layers else ", all of them dense"
    return f"{model.num_layers} layers of width {model.d_model:,}{moe}; vocabulary {model.vocab_size:,}"


def _router(config):
    moe = config.model.moe
    return f"{moe.router.name}, {moe.router.top_k} of {moe.num_experts} experts a token" if config.model.num_moe_layers else ""


def _experts(config):
    moe = config.model.moe
    if not config.model.num_moe_layers:
        return ""
    shared = f", and {moe.num_shared_experts} that every token uses" if moe.num_shared_experts else ""
    own = f"{moe.num_experts} of hidden width {moe.d_ff:,} in each MoE layer{shared}"
    ways = f"dispatch {moe.dispatch}, exchange {moe.exchange}"
    return f"{own}; {ways}; balance loss weight {moe.balance_loss_weight:g}, router z-loss weight {moe.z_loss_weight:g}"


def _trained(run):
    data, steps = run.config.data, steps_done(run)
    unfinished = f" of {run.config.train.steps:,}" if steps < run.config.train.steps else ""
    tokens = steps * data.batch_size * data.seq_len
    return f"{steps:,}{unfinished} steps of {data.batch_size} x {data.seq_len:,} tokens, {tokens:,} tokens"


def _computation(run):
    data = run.config.data
    tokens = steps_done(run) * data.batch_size * data.seq_len
    each = flops_per_token(run.config.model, data.seq_len)
    return f"{short_number(3 * each * tokens)}FLOPs in matrix products: 3 x {short_number(each)}FLOPs forward x tokens"


def _speed(run):
    speed_N = run.series("train/tokens_per_second")[1]
    speed_N = speed_N[np.isfinite(speed_N) & (speed_N > 0)]  # a run of one step, which is compilation, has none
    if not len(speed_N):
        return ""
    data, speed = run.config.data, float(np.median(speed_N))
    seconds = steps_done(run) * data.batch_size * data.seq_len / speed
    flops = 3 * flops_per_token(run.config.model, data.seq_len) * speed
    rate = f"{speed:,.0f} tokens/s (median of the records), {short_number(flops)}FLOP/s"
    return f"{rate}; all steps at that speed take {duration(seconds)}"


def _mesh(run):
    config, versions = run.config, run.versions
    shape, count = config.mesh.shape, versions.get("device_count")
    if count:
        try:
            shape = check_devices(config, count)
        except RefusalError:
            count = None
    axes = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True) if size != 1) or "one device"
    if not count:
        return axes
    emulated = "emulated " if config.mesh.emulate else ""
    return f"{axes} on {count} {emulated}{versions.get('device_kind', '')} device{'s' * (count != 1)}"


def _versions(versions):
    named = [f"{name} {versions[name]}" for name in ("moe_jax", "jax", "flax", "python", "backend") if versions.get(name)]
    git = versions.get("git")
    commit = f"commit {git['commit'][:12]}{' with changes' * bool(git.get('dirty'))}" if git else ""
    return ", ".join([*named, *filter(None, [commit])])


def _costs(run):
    """FLOPs a token of the model and of dense models with as many parameters."""
    config, count, length = run.config, num_params(run.config.model), run.config.data.seq_len
    own, rows = flops_per_token(config.model, length), []
    cases = [("this model", config), ("dense, as many parameters as are active", dense_equivalent(config, count.active))]
    cases.append(("dense, as many parameters in all", dense_equivalent(config, count.total)))
    for name, case in cases:
        if case is not None:
            flops = flops_per_token(case.model, length)
            width = "" if case is config else f"{case.model.d_ff:,}"
            rows.append((name, f"{num_params(case.model).total:,}", width, f"{flops:,}", f"{flops / own:.2f}"))
    caption = f"Cost of a token forward, in rows of {length:,} tokens"
    costs = table(caption, ("", "parameters", "width of each FFN", "FLOPs", "FLOPs / this model's"), rows)
    return [
        costs,
        paragraph(
            "The dense models have the same width, depth and attention; their FFNs are as wide as makes the number of"
            " parameters equal."
        ),
    ]
