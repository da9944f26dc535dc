"""Evaluates a run on every domain: `python -m launch.evaluate --workdir=runs/quickstart [--step=best] [--mesh=data=8,emulate=8]`.

Prints a table of loss, perplexity and bits per byte, and the expert loads; writes them to WORKDIR/evaluation-STEP.json. --record=FILE
writes down which token went to which expert, and --replay=FILE makes recorded choices again (docs/routing_record.md). --observe=FILE
writes what the experts did (docs/observatory.md).
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np
from absl import flags

from launch import cli
from moe_jax.analysis.tables import evaluation_table, load_table
from moe_jax.config import ConfigError
from moe_jax.data.corpus import load_corpus
from moe_jax.train import run
from moe_jax.train.evaluate import evaluate, make_eval_step
from moe_jax.train.expert_weights import expert_weights
from moe_jax.train.files import write_atomic
from moe_jax.train.observatory import Observer, can_observe
from moe_jax.train.tape import Tape, eval_key

WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of launch.train.", required=True)
STEP = flags.DEFINE_string("step", "latest", "Checkpoint: latest, best or a step.")
MESH = flags.DEFINE_string("mesh", "", "Mesh other than the run's, e.g. data=2,expert=4,emulate=8.")
ROWS = flags.DEFINE_integer("rows", 0, "Validation rows per domain; 0 = as in the run.", lower_bound=0)
RECORD = flags.DEFINE_string("record", "", "File to write every batch's routing to.")
REPLAY = flags.DEFINE_string("replay", "", "Such a file, whose choices are made again in place of the router's own.")
OBSERVE = flags.DEFINE_string("observe", "", "File to write what the experts did to (docs/observatory.md).")
REPLAY_WEIGHTS = flags.DEFINE_bool("replay_weights", False, "Replay the recorded weights too, in place of the router's own.")


def main():
    model = run.restore(WORKDIR.value, STEP.value, cli.parse_mesh(MESH.value))
    config = model.config
    if ROWS.value:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_rows=ROWS.value))
    corpus = load_corpus(config.data, config.workdir)
    with jax.set_mesh(model.mesh):
        batches = run.evaluation_batches(config, corpus, model.mesh)
        tape = _tape(model, config, batches)
        observer = _observer(config, corpus, batches)
        steps = {"record": tape.records, "observe": observer is not None}
        eval_step = make_eval_step(config.model, model.graphdef, corpus.tokenizer.token_bytes(), **steps)
        with tape:
            metrics = evaluate(eval_step, model.params, model.router_state, model.mesh, batches, tape, observer)
        if observer is not None:
            weights = expert_weights(model.params)
            observer.finish(model.step, model.router_state, weights, corpus.tokenizer.kind).save(OBSERVE.value)
    print(f"step {model.step} of {WORKDIR.value} on {dict(model.mesh.shape)}")
    if str(tape):
        print(tape)
    print(evaluation_table(metrics))
    if "eval/load" in metrics:
        moe = config.model.moe
        print(load_table(metrics["eval/load"], moe.first_dense + moe.every - 1, moe.every))
    plain = {name: np.asarray(value).tolist() for name, value in metrics.items()}
    write_atomic(pathlib.Path(WORKDIR.value) / f"evaluation-{model.step}.json", json.dumps(plain, indent=2) + "\n")


def _observer(config, corpus, batches):
    """What --observe asks for; None when it does not."""
    if not OBSERVE.value:
        return None
    if not can_observe(config.model):
        raise ConfigError(
            f"--observe={OBSERVE.value!r} but the model of {WORKDIR.value!r} has no router that chooses; leave it out."
        )
    return Observer(config, tuple(batches), corpus.validation.counts())


def _tape(model, config, batches):
    """What the flags ask to be recorded and replayed."""
    if REPLAY_WEIGHTS.value and not REPLAY.value:
        raise ConfigError("--replay_weights is given without --replay; name the record to take the weights from.")
    source = {"workdir": WORKDIR.value, "step": model.step}
    tape = Tape(config, RECORD.value, REPLAY.value, replay_weights=REPLAY_WEIGHTS.value, training=False, source=source)
    for domain, members in batches.items():
        for number, batch in enumerate(members):
            tape.check(eval_key(domain, number), batch)
    return tape


if __name__ == "__main__":
    cli.run(main)
