"""Training from a config to a finished run folder.

Everything a run needs to continue is in a checkpoint: parameters, optimizer, router bias, step (the key of every step's noise is a
function of it) and the position in the data. A run continued from a checkpoint goes on bit for bit as if it had never stopped.
"""

import pathlib
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_jax import processes
from moe_jax.analysis import summary
from moe_jax.analysis.report.write import write_report
from moe_jax.config import Config, ConfigError, to_dict
from moe_jax.convert import initial
from moe_jax.data.corpus import Corpus, load_corpus, save_tokenizer
from moe_jax.data.pipeline import train_iterator
from moe_jax.mesh import data_shards, emulate_devices, make_mesh, process_part, shard_batch
from moe_jax.models.generator import Generator, continue_texts
from moe_jax.models.inference_weights import lay_out_for_inference
from moe_jax.models.sampling import Sampling
from moe_jax.sizes import with_vocabulary
from moe_jax.train import observation, preemption, profile, resuming, run, run_folder, sound
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.clock import Clock
from moe_jax.train.evaluate import evaluate, make_eval_step
from moe_jax.train.expert_weights import expert_weights
from moe_jax.train.guarded import Guarded
from moe_jax.train.guards import Guards
from moe_jax.train.observatory import LoadWindow, Observer, can_observe
from moe_jax.train.observatory import summary as summary_of
from moe_jax.train.progress import Progress
from moe_jax.train.run_info import write_run_info
from moe_jax.train.state import TrainState, create
from moe_jax.train.step import make_train_step
from moe_jax.train.tape import Tape, take_record, train_key
from moe_jax.train.writers import MetricWriter


@dataclass
class _Run:
    """What the steps share."""

    config: Config
    mesh: jax.sharding.Mesh
    corpus: Corpus
    graphdef: nnx.GraphDef
    train_step: Any
    eval_step: Any
    checkpoints: Checkpoints
    iterator: Any
    batches: dict[str, list[dict]]
    identity: dict[str, dict]  # what a checkpoint says of the run
    tape: Tape
    observes: bool  # evaluations, too: the figures of steps go by the config alone
    window: LoadWindow
    guards: Guards
    notice: preemption.Notice


def train(config: Config) -> dict[str, float | np.ndarray]:
    """Runs `config` in its `workdir` to the end, from its last checkpoint where there is one; returns the last evaluation.

    Raises:
      ConfigError, DataError, CheckpointError, RecordError: the config does not fit the devices, the data, the run folder or a
        routing record; nothing has been written then.
      OutputError: the run folder cannot be written; before anything is compiled where it can be told.
      TrainingError: a guard stopped the run (docs/guards.md).
      PreemptedError: the run was told to stop, and its last step is saved.
    """
    run_folder.check(config.workdir)
    config = initial.complete(config)
    run.check(config)
    emulate_devices(config.mesh.emulate)
    mesh = make_mesh(config)
    processes.connect(mesh)
    with preemption.Notice() as notice, run.checkpoints(config) as checkpoints:
        start = _where_to_start(config, checkpoints)
        changed = resuming.check_config(config, start) if start else ""
        corpus = load_corpus(config.data, config.workdir)
        config = with_vocabulary(config, corpus.tokenizer.vocab_size)
        make_mesh(config)  # the vocabulary must divide over the tensor axis too
        if start:
            resuming.check_checkpoint(checkpoints.read_extra(start), config, corpus, start)
        source = initial.open_for(config) if config.init_from and start is None else None
        _agree(config, corpus, start)
        tape = _tape(config, corpus, start or 0)
        processes.say("\n".join(filter(None, (summary.opening(config, mesh, corpus), str(tape), changed))))
        with jax.set_mesh(mesh), run_folder.writing(config.workdir, checkpoints.latest):
            return _train(config, mesh, corpus, checkpoints, start, tape, source, notice)


def _where_to_start(config, checkpoints):
    latest, resume = checkpoints.latest(), config.train.resume
    if resume == "never" and latest is not None:
        raise ConfigError(
            f"train.resume = 'never' and workdir = {config.workdir!r} already has a checkpoint of step {latest};"
            " choose another workdir, or train.resume=auto to continue it."
        )
    if resume == "must" and latest is None:
        raise ConfigError(f"train.resume = 'must' and workdir = {config.workdir!r} has no checkpoint; set train.resume=auto.")
    if latest is not None and latest > config.train.steps:
        raise ConfigError(
            f"train.steps = {config.train.steps} is less than the {latest} steps that workdir = {config.workdir!r} has taken;"
            " raise it, or choose another workdir."
        )
    return latest


def _agree(config, corpus, start):
    """Refuses processes that would not compute the same run: each sees the disks of its own host."""
    processes.agree({"the last checkpoint": start, **resuming.origin(config, corpus), "the config": to_dict(config)})


def _tape(config, corpus, start):
    """What the steps from `start` on record and replay."""
    train = config.train
    tape = Tape(
        config,
        train.record,
        train.replay,
        replay_weights=train.replay_weights,
        training=True,
        source={"workdir": config.workdir},
        data=resuming.origin(config, corpus),
        after=train_key(start) if start else None,
    )
    for step in range(start + 1, train.steps + 1):
        tape.check(train_key(step))
    return tape


def _train(config, mesh, corpus, checkpoints, start, tape, source, notice):
    part, parts = process_part(mesh)
    iterator = train_iterator(corpus.train, config.data, config.train.seed, process_index=part, process_count=parts)
    weights = _weights(config, mesh, checkpoints, start, source)
    graphdef, optimizer, state = create(config, weights)
    processes.say(profile.state_memory(state))
    observes = config.train.observe and can_observe(config.model)
    shared = _Run(
        config,
        mesh,
        corpus,
        graphdef,
        profile.TracedStep(make_train_step(config, graphdef, optimizer), config, start or 0),
        make_eval_step(config.model, graphdef, corpus.tokenizer.token_bytes(), observe=observes),
        checkpoints,
        iterator,
        run.evaluation_batches(config, corpus, mesh),
        resuming.identity(config, corpus),
        tape,
        observes,
        LoadWindow(),
        Guards(config),
        notice,
    )
    if start:
        state = run.abstract_state(config, mesh)  # frees the fresh state before the saved one is read
        state, extra = sound.restore(checkpoints, start, state)
        iterator.set_state(extra["data"])
        shared.guards.resume(extra.get("guards"))
        if observes:
            shared.window.resume(extra.get("window"))
    if start is not None:
        processes.say(f"continuing from step {start} of {config.workdir}")
    write_run_info(config.workdir, to_dict(config))  # nothing is refused from here on
    if processes.first():
        save_tokenizer(corpus.tokenizer, config.workdir)
    if start == config.train.steps:
        return _finish(shared, state, _evaluate(shared, state, start))
    return _finish(shared, *_steps(shared, state, start or 0))


def _weights(config, mesh, checkpoints, start, source):
    """What to start from in place of random numbers; None where there is nothing, or a whole train state to restore."""
    if start == 0:  # converted: parameters and the router's state, and no optimizer's
        weights, _ = sound.restore(checkpoints, 0, run.abstract_weights(config, mesh), part=True)
        return weights["params"], weights["router_state"]
    return initial.load(source, config, mesh) if source else None


def _steps(shared: _Run, state: TrainState, start: int):
    """Steps start + 1 to the end. A step's metrics are looked at after the next step is dispatched, so the devices never wait."""
    config = shared.config.train
    key = jax.random.key(config.seed)
    tokens = shared.config.data.batch_size * shared.config.data.seq_len
    evaluation, pending, clock = {}, None, Clock(tokens, start)
    with (
        MetricWriter(shared.config.workdir, config.tensorboard, start or None) as writer,
        Progress(config.steps, tokens, start) as progress,
        shared.tape,
        shared.train_step,
        Guarded(shared.config, shared.guards, shared.checkpoints, writer, progress.message, start or None) as guarded,
    ):
        for done in range(start + 1, config.steps + 1):
            with clock.part("data"):
                batch = next(shared.iterator)
                batch = {name: batch[name] for name in run.BATCH_FIELDS}
                told = shard_batch(shared.mesh, shared.tape.tell(train_key(done), batch))
            with clock.part("compile" if done == start + 1 else "step"):
                state, metrics = shared.train_step(state, told, key)
                metrics, recorded = take_record(metrics)
                if pending is not None:
                    _look(shared, guarded, *pending)
                pending = (done, metrics, batch, recorded)
                if done == start + 1:
                    jax.block_until_ready(metrics)
            last = done == config.steps
            logs, evaluates, saves = (
                last or done % every == 0 for every in (config.log_every, config.eval_every, config.checkpoint_every)
            )
            if done == start + 1:
                clock.restart(done)
                shared.notice.hold()  # what came earlier has ended the run
            stops = shared.notice.asked(done)
            saves |= stops
            if not (logs or evaluates or saves):
                continue
            with clock.part("step"):
                _look(shared, guarded, *pending)
            pending, record = None, {}
            if logs:
                speed = clock.tokens_per_second(done)
                record = jax.device_get(metrics) | {"train/tokens_per_second": speed} | shared.window.close()
                progress.update(done, float(record["train/loss"]), speed)
            if evaluates:
                with clock.part("evaluate"), guarded.patient("an evaluation"):
                    evaluation = _evaluate(shared, state, done)
                record |= evaluation
                progress.message(f"step {done} validation loss {evaluation['eval/loss']:.4f}")
            if record:
                writer.write(done, record | (clock.seconds() if logs else {}))
            if saves:
                shared.tape.sync()  # a record has every step that a checkpoint has, and so have the metrics
                writer.sync()
                figures = {name: value for name, value in evaluation.items() if np.ndim(value) == 0} if evaluates else {}
                extra = {"data": shared.iterator.get_state(), "metrics": figures}
                extra |= {"window": shared.window.state(), "guards": shared.guards.state()}
                with clock.part("checkpoint"), guarded.patient("a checkpoint"):
                    if guarded.may_save(done, state):
                        shared.checkpoints.save(done, state, extra | shared.identity)
                if stops:
                    shared.notice.stop(done, shared.config.workdir, shared.checkpoints.latest())
            if evaluates or saves:
                clock.restart(done)
        shared.notice.release(config.steps, shared.config.workdir, shared.checkpoints.latest())
    processes.say(clock.breakdown(config.steps - start))
    return state, evaluation


def _look(shared, guarded, step, metrics, batch, recorded):
    """What is done with every step once it is computed."""
    figures, taken = guarded.look(step, metrics)
    if shared.observes and taken:
        shared.window.add(figures["router/load"])
    shared.tape.write(train_key(step), batch, recorded)


def _evaluate(shared, state, step):
    """The metrics of an evaluation, whose observation is written."""
    config, corpus, observer = shared.config, shared.corpus, None
    if shared.observes:
        observer = Observer(config, tuple(shared.batches), corpus.validation.counts())
    metrics = evaluate(shared.eval_step, state.params, state.router_state, shared.mesh, shared.batches, observer=observer)
    if observer is None:
        return metrics
    now = observer.finish(step, state.router_state, expert_weights(state.params), corpus.tokenizer.kind)
    before = observation.latest(config.workdir, step)
    if processes.first():
        now.save(observation.path_of(config.workdir, step))
    return metrics | summary_of(now, before if before and observation.comparable(now, before) else None)


def _finish(shared: _Run, state: TrainState, evaluation):
    text = _sample(shared, state)
    processes.say(summary.closing(shared.config, shared.corpus, evaluation, text))
    if text and processes.first():
        (pathlib.Path(shared.config.workdir) / "sample.txt").write_text(text, encoding="utf-8")
    if shared.config.train.report and processes.first():
        _report(shared.config.workdir)
    return evaluation


def _report(workdir):
    """The run's page, and where it is; a sentence where it cannot be drawn."""
    try:
        processes.say(
            f"\nReport: what the run learned and what its experts did, to open in a browser\n  {write_report([workdir])}"
        )
    except ConfigError as refusal:
        processes.say(f"\nno report: {refusal}")


def _sample(shared, state):
    """The prompt and its continuation; "" when none is asked for."""
    config, tokenizer = shared.config, shared.corpus.tokenizer
    if not config.train.sample_tokens:
        return ""
    prompt = np.concatenate([[tokenizer.eot], tokenizer.encode(config.train.sample_prompt)]).astype(np.int32)
    sizes = {"rows": data_shards(shared.mesh), "max_length": len(prompt) + config.train.sample_tokens}
    try:
        laid_out = lay_out_for_inference(config.model, state.params, state.router_state, shared.mesh)
        generator = Generator(laid_out, vocab_size=tokenizer.vocab_size, **sizes)
    except ConfigError as refusal:
        processes.say(f"no sample: {refusal}")
        return ""
    sampling = Sampling(temperature=0.7, top_p=0.95, seed=config.train.seed)
    (tokens,) = continue_texts(generator, [prompt], [sampling], config.train.sample_tokens, {tokenizer.eot})
    return config.train.sample_prompt + tokenizer.decode(tokens)
