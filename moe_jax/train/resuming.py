"""What may change between two starts of a run, and what may not: a run goes on as what it was, or is refused in a sentence.

Two things are compared with the config: the run folder's config.json, before anything is read or compiled, and what the checkpoint
says of the run that made it, so that a checkpoint copied in from another run is found too. A field that config.json lacks, as it
is newer than the run, had its default.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_jax.config import Config, ConfigError, from_dict, to_dict
from moe_jax.convert.fields import nested
from moe_jax.data.corpus import Corpus
from moe_jax.routing import default_options, make_router
from moe_jax.train.run_info import read_config_tree
from moe_jax.validation import CheckpointError

# A field, or a group of fields, and why a run may go on with another value. Every other field is refused.
MAY_CHANGE = {
    "workdir": "a folder can be moved",
    "init_from": "read when a run starts, and its checkpoints have all of it",
    "mesh": "no number depends on the layout, and XLA's flags are about time and memory",
    "model.remat": "memory against recomputation",
    "model.scan_unroll": "how the loop over layers is compiled",
    "model.attention.implementation": "which kernel computes the same attention",
    "model.moe.remat_exchange": "memory against another exchange",
    "model.moe.grouped_matmul": "which kernel computes the same products",
    "model.dtype": "what a run that is not finite any more is told to try; the parameters are float32 in either",
    "optimizer.learning_rate": "what a run that is not finite any more is told to try",
    "optimizer.clip_norm": "what a run that is not finite any more is told to try",
    "data.corpus": "the fingerprint of the documents decides",
    "data.paths": "the fingerprint of the documents decides",
    "data.tokenizer": "the run folder's own tokenizer decides",
    "data.bpe_vocab_size": "the run folder's own tokenizer decides",
    "data.val_fraction": "the fingerprint of the documents decides",
    "data.max_megabytes": "the fingerprint of the documents decides",
    "data.bad_records": "the fingerprint of the documents decides",
    "data.cache_dir": "a place",
    "data.prefetch": "how far ahead the same batches are read",
    "train.steps": "a run may be made longer; a cosine or wsd schedule is then that of the longer run from here on",
    "train.log_every": "how often it speaks",
    "train.eval_every": "how often it is measured",
    "train.eval_rows": "how well it is measured",
    "train.checkpoint_every": "how often it saves",
    "train.keep_checkpoints": "how much it keeps",
    "train.resume": "about the start alone",
    "train.sample_tokens": "about the end alone",
    "train.sample_prompt": "about the end alone",
    "train.tensorboard": "a second place for the same figures",
    "train.record": "a record of the same choices",
    "train.replay": "the record's own header decides",
    "train.replay_weights": "belongs to train.replay",
    "train.observe": "more figures of the same steps",
    "train.report": "about the end alone",
    "guards": "what watches the run, and when it speaks",
    "profile": "what is measured of it",
}
# These too, where the result is the same but for the rounding of sums: the condition on the config then and on the config now.
EXACT = {
    "model.moe.dispatch": "drops",
    "model.moe.exchange": "drops",
    "model.moe.exchange_factor": "drops",
    "model.moe.exchange_overflow": "drops",
    "model.moe.exchange_chunks": "drops",
    "model.moe.send_once": "drops",
    "train.accumulation": "microbatches",
}
_BY_FINGERPRINT = ("corpus", "paths", "tokenizer", "bpe_vocab_size", "val_fraction", "max_megabytes", "bad_records")


def origin(config: Config, corpus: Corpus) -> dict[str, str | int]:
    """What decides which rows come in which order, by the name of its field; a run cannot go on with another one."""
    return {
        "the fingerprint of data.corpus": corpus.fingerprint,
        "data.seq_len": config.data.seq_len,
        "data.batch_size": config.data.batch_size,
        "train.seed": config.train.seed,
    }


def identity(config: Config, corpus: Corpus) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of the run that made it, in plain JSON types: the origin of its rows, and every field that may not change."""
    fields = _fields(to_dict(config))
    fixed = {name: value for name, value in fields.items() if not _may_change(name) and name not in EXACT}
    return {"origin": origin(config, corpus), "settings": fixed}


def check_config(config: Config, step: int) -> str:
    """Compares a config with the run folder's config.json.

    Args:
      config: of the run that is to go on, before the vocabulary is filled in.
      step: of its checkpoint, 1 or more.

    Returns: one line on the fields that changed and may, "" where none did.

    Raises:
      ConfigError: no config.json, a damaged one, or a field that may not change.
    """
    where = f"workdir = {config.workdir!r}"
    if not (Path(config.workdir) / "config.json").is_file():
        raise ConfigError(
            f"{where} has a checkpoint of step {step} and no config.json, so that nothing says what it was trained with; put the run's"
            " config.json back, or choose another workdir."
        )
    then, now = _fields(read_config_tree(config.workdir)), _fields(to_dict(config))
    changed = [name for name in now if name in then and not _same(name, then[name], now[name])]
    for name in changed:
        if _may_change(name):
            continue
        if EXACT.get(name) and not (reason := _inexact(EXACT[name], config, then)):
            continue
        why = f" ({reason}, so the result would change)" if name in EXACT else ""
        raise ConfigError(
            f"{name} is {now[name]!r} and was {then[name]!r} in the {step} steps that {where} has taken{why}; set it back to continue"
            " that run, or choose another workdir."
        )
    told = [f"{name} = {now[name]!r} (was {then[name]!r})" for name in changed if name not in ("workdir", "train.resume")]
    return f"changed since the last start: {', '.join(told)}" if told else ""


def check_checkpoint(extra: Mapping[str, Any], config: Config, corpus: Corpus, step: int) -> None:
    """Compares a checkpoint with the run that is to go on from it.

    Args:
      extra: the checkpoint's, as `Checkpoints.read_extra` gives it.
      config, corpus: of the run.
      step: of the checkpoint, 1 or more.

    Raises:
      CheckpointError: it is another run's.
      ConfigError: the data are not those that the steps so far were trained on.
    """
    where = f"workdir = {config.workdir!r}"
    now = identity(config, corpus)
    if not extra.get("origin"):
        raise CheckpointError(
            f"the checkpoint of step {step} in {where} does not say which data it was trained on, so it is no checkpoint of a run of"
            " ours; choose another workdir."
        )
    then = extra.get("settings", {})
    for name, value in now["settings"].items():
        if name in then and not _same(name, then[name], value):
            raise CheckpointError(
                f"the checkpoint of step {step} in {where} is another run's: {name} was {then[name]!r} when it was made and is {value!r}"
                " in this run's config.json; put this run's own checkpoints back, or choose another workdir."
            )
    for name, value in now["origin"].items():
        if value != extra["origin"].get(name):
            raise ConfigError(
                f"{name} is {value!r} and was {extra['origin'].get(name)!r} in the {step} steps that {where} has"
                f" taken{_changed_data(config, name)}; set it back to continue that run, or choose another workdir."
            )


def _changed_data(config, name):
    """Why the fingerprint is another one: fields that changed, or else the files did."""
    if "fingerprint" not in name:
        return ""
    then, now = _fields(read_config_tree(config.workdir)), _fields(to_dict(config))
    fields = [f"data.{field}" for field in _BY_FINGERPRINT]
    changed = [f"{field} is {now[field]!r} and was {then[field]!r}" for field in fields if then.get(field) != now[field]]
    return f" ({', '.join(changed) or 'the documents have changed'})"


def _fields(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted path: value} of a config in plain JSON types, with the defaults of what it lacks."""
    return _with_defaults(dict(_flatten(tree, "")))


def _with_defaults(fields):
    name = fields.get("model.moe.router.name", "")
    options = {f"model.moe.router.{name}.{option}": value for option, value in default_options().get(name, {}).items()}
    defaults = dict(_flatten(to_dict(Config()), ""))
    return {path: value for path, value in defaults.items() if not _is_option(path)} | options | fields


def _is_option(path):
    return path.count(".") > 3 and path.startswith("model.moe.router.")


def _flatten(tree, path):
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _may_change(path: str) -> bool:
    groups = path.split(".")
    return any(".".join(groups[: n + 1]) in MAY_CHANGE for n in range(len(groups)))


def _same(path, then, now):
    """A vocabulary of 0 tokens is the tokenizer's, which is the run's own."""
    if path == "model.vocab_size" and 0 in (then, now):
        return True
    if isinstance(then, float) and isinstance(now, float) and math.isnan(then) and math.isnan(now):
        return True
    return then == now


def _inexact(kind, config, then_fields) -> str:
    """Why another value of a field of `EXACT` would change the result; "" where it would not."""
    then = from_dict(nested(then_fields))
    check: Callable[[Config], str] = {"drops": _drops, "microbatches": _by_microbatch}[kind]
    return check(then) or check(config)


def _drops(config):
    return "assignments can be dropped" if config.model.num_moe_layers and config.model.moe.may_drop else ""


def _by_microbatch(config):
    moe = config.model.moe
    if not config.model.num_moe_layers:
        return ""
    router = make_router(moe.router, moe.num_experts)
    running = moe.balance_loss_accumulation == "running" and (moe.balance_loss_weight or router.has_loss)
    if running or (moe.balance_loss_weight and moe.balance_loss_scope == "microbatch"):
        return "the balance loss goes by microbatches"
    if not (router.causal and router.causal_in_training and router.by_token):
        return f"the router {moe.router.name!r} chooses within a microbatch"
    return _drops(config)
