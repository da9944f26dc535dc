"""Routing written down and followed again: exactly in evaluation, live in training, and the same however the batch is split."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
import tiny
from one_step import drawn
from tolerance import assert_close

from moe_jax.config import RouterConfig
from moe_jax.mesh import make_mesh, shard_batch
from moe_jax.routing.record import RECORDED
from moe_jax.train.evaluate import evaluate, make_eval_step
from moe_jax.train.routing_log import RecordError, RoutingLog
from moe_jax.train.step import make_gradient_fn
from moe_jax.train.tape import Tape, describe, eval_key, take_record

DOMAINS = {"code": [tiny.batch(0, rows=8), tiny.batch(1, rows=8)], "prose": [tiny.batch(2, rows=8)]}


class Evaluator:
    """Evaluations of a config's models, with or without a tape."""

    def __init__(self, router, mesh):
        self.config = tiny.config(router, mesh)
        self.mesh = make_mesh(self.config, jax.devices()[: np.prod(self.config.mesh.shape)])
        with jax.set_mesh(self.mesh):
            self.models = [drawn(self.config.model, seed) for seed in (0, 1)]
            graphdef = self.models[0][0]
            self.steps = {
                records: make_eval_step(self.config.model, graphdef, np.ones(tiny.VOCAB, np.int32), record=records)
                for records in (False, True)
            }

    def tape(self, record="", replay="", weights=False):
        return Tape(self.config, str(record), str(replay), replay_weights=weights, training=False, source={})

    def __call__(self, tape=None, seed=0):
        step = self.steps[tape is not None and tape.records]
        with jax.set_mesh(self.mesh):
            return evaluate(step, *self.models[seed][1:], self.mesh, DOMAINS, tape)


evaluator_of = functools.cache(Evaluator)


def same_figures(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize(
    ("router", "mesh"),
    [
        ("mixtral", "one device"),
        ("deepseek", "data 2 expert 4"),
        pytest.param("switch", "fsdp 2 expert 2 tensor 2", marks=pytest.mark.slow),
    ],
)
def test_a_replayed_evaluation_is_the_recorded_one_to_the_bit(tmp_path, router, mesh):
    evaluator = evaluator_of(router, mesh)
    plain = evaluator()
    with evaluator.tape(record=tmp_path / "a.rec") as tape:
        same_figures(evaluator(tape), plain)
    log = RoutingLog(tmp_path / "a.rec")
    assert log.keys == [eval_key("code", 0), eval_key("code", 1), eval_key("prose", 0)]
    for weights in (False, True):
        again = tmp_path / f"{weights}.rec"
        with evaluator.tape(again, tmp_path / "a.rec", weights) as tape:
            same_figures(evaluator(tape), plain)
        assert again.read_bytes() == (tmp_path / "a.rec").read_bytes()


def test_the_record_says_what_the_loads_say(tmp_path):
    """And padding is nowhere, with weight 0."""
    evaluator = evaluator_of("mixtral", "one device")
    with evaluator.tape(record=tmp_path / "a.rec") as tape:
        figures = evaluator(tape)
    log = RoutingLog(tmp_path / "a.rec")
    assert log.header == describe(evaluator.config, False, {}, {})
    assert (log.header.layers, log.header.choices) == ((1, 2), 2)
    load_LE = np.zeros((2, 8), int)
    for domain, members in DOMAINS.items():
        for number, batch in enumerate(members):
            block = log.read(eval_key(domain, number))
            np.testing.assert_array_equal(block.valid_BS, batch["segment_ids"] > 0)
            assert (block.choice_BSLM[~block.valid_BS] == 8).all()
            assert (block.weight_BSLM[~block.valid_BS] == 0).all()
            np.testing.assert_allclose(block.weight_BSLM[block.valid_BS].sum(-1), 1.0, rtol=1e-6)
            for layer in range(2):
                load_LE[layer] += np.bincount(block.choice_BSLM[:, :, layer].ravel(), minlength=9)[:8]
    np.testing.assert_array_equal(load_LE, figures["eval/load"])


def test_somebody_elses_choices_are_followed(tmp_path):
    """The model of seed 1 makes the choices of seed 0's: its own loads and loss give way."""
    evaluator = evaluator_of("mixtral", "one device")
    with evaluator.tape(record=tmp_path / "a.rec") as tape:
        wanted = evaluator(tape)["eval/load"]
    own = evaluator(seed=1)
    losses = {own["eval/loss"]}
    for weights in (False, True):
        with evaluator.tape(replay=tmp_path / "a.rec", weights=weights) as tape:
            told = evaluator(tape, seed=1)
        np.testing.assert_array_equal(told["eval/load"], wanted)
        losses.add(told["eval/loss"])
    assert not np.array_equal(own["eval/load"], wanted)
    assert len(losses) == 3


class Learner:
    """Gradients without auxiliary losses, so that only the language model's loss reaches the router, which has noise."""

    def __init__(self, mesh="one device", accumulation=1):
        off = dict(balance_loss_weight=0.0, z_loss_weight=0.0)
        config = tiny.config("switch", mesh, accumulation=accumulation, model=dict(logit_z_loss_weight=0.0), **off)
        self.config = config
        self.mesh = make_mesh(config, jax.devices()[: np.prod(config.mesh.shape)])
        with jax.set_mesh(self.mesh):
            graphdef = drawn(config.model)[0]
            self._measure = jax.jit(make_gradient_fn(config, graphdef, record=True))

    def model(self, seed):
        with jax.set_mesh(self.mesh):
            return drawn(self.config.model, seed)[1:]

    def __call__(self, model, **told):
        """(gradients, metrics, record) of the tiny batch."""
        with jax.set_mesh(self.mesh):
            batch = shard_batch(self.mesh, tiny.batch() | told)
            gradients, _, metrics = jax.device_get(self._measure(*model, batch, jax.random.key(5)))
        return gradients, *take_record(metrics)


learner = functools.cache(Learner)


def router_of(params):
    (w,) = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "w_router_DE" in jax.tree_util.keystr(path)]
    return w


@pytest.mark.slow
def test_the_router_learns_through_choices_that_are_not_its_own():
    learn = learner()
    choice, weight = learn(learn.model(0))[2].values()
    model = learn.model(1)
    own = learn(model)[2]["choice"]
    assert np.mean(own != choice) > 0.5
    gradients, metrics, again = learn(model, choice=choice)
    np.testing.assert_array_equal(again["choice"], choice)
    assert not np.array_equal(again["choice_weight"], weight)
    g_LDE = router_of(gradients)
    assert (np.abs(g_LDE).max(axis=(1, 2)) > 1e-5).all()

    def loss(by):  # at the router's weights moved along their own gradient; the choices stay, so that nothing jumps
        move = lambda path, p: p + by * g_LDE if "w_router_DE" in jax.tree_util.keystr(path) else p  # noqa: E731
        moved = jax.tree_util.tree_map_with_path(move, model[0])
        return float(learn((moved, model[1]), choice=choice)[1]["train/loss"])

    step = 0.05 / np.linalg.norm(g_LDE)
    slope = (loss(step) - loss(-step)) / (2 * step)
    assert slope == pytest.approx(float(np.sum(g_LDE**2)), rel=1e-2)
    assert math.isfinite(metrics["train/loss"])


def test_recorded_weights_leave_the_router_nothing_to_learn():
    learn = learner()
    record = learn(learn.model(0))[2]
    gradients, _, again = learn(learn.model(1), **record)
    for name in RECORDED:
        np.testing.assert_array_equal(again[name], record[name])
    np.testing.assert_array_equal(router_of(gradients), 0.0)


@pytest.mark.slow
def test_neither_devices_nor_microbatches_change_the_record():
    """With the noise of a training step; and what one device recorded is replayed on eight, in microbatches."""
    one, eight = learner(), learner("data 2 expert 4", 2)
    _, _, expected = one(one.model(0))
    _, _, record = eight(eight.model(0))
    np.testing.assert_array_equal(record["choice"], expected["choice"])
    assert_close(record["choice_weight"], expected["choice_weight"])
    (_, a, told), (_, b, same) = (learn(learn.model(1), choice=expected["choice"]) for learn in (eight, one))
    for name in RECORDED:
        assert_close(told[name], same[name], "float32")
    for name in ("train/loss", "train/gradient_norm"):
        assert_close(a[name], b[name])


def record_of(tmp_path, config, **changes):
    """A record of `DOMAINS` for the model of `config`, of zeros but for `changes` of single choices."""
    path = tmp_path / "a.rec"
    header = describe(config, False, {}, {})
    with Tape(config, str(path), training=False, source={}) as tape:
        for domain, members in DOMAINS.items():
            for number, batch in enumerate(members):
                choice = np.zeros((*batch["tokens"].shape, len(header.layers), header.choices), np.int32)
                choice[0, 0] = changes.get("choice", 0)
                tape.write(eval_key(domain, number), batch, {"choice": choice, "choice_weight": choice.astype(np.float32)})
    return str(path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (tiny.config("mixtral", num_experts=16), r"its num_experts is 8 and the model's is 16; change model\.moe\.num_experts"),
        (
            tiny.config("mixtral", first_dense=2),
            r"its layers is \(1, 2\) and the model's is \(2,\); change model\.moe\.first_dense",
        ),
        (tiny.config("deepseek"), r"its choices is 2 and the model's is 3; change model\.moe\.router"),
    ],
)
def test_a_record_of_another_model_is_refused(tmp_path, model, message):
    path = record_of(tmp_path, tiny.config("mixtral"))
    with pytest.raises(RecordError, match=message):
        Tape(model, replay=path, training=False, source={})


def test_other_data_are_refused(tmp_path):
    config = tiny.config("mixtral")
    tape = Tape(config, replay=record_of(tmp_path, config), training=False, source={})
    tape.check(eval_key("prose", 0), DOMAINS["prose"][0])
    for use in (tape.check, tape.tell):
        with pytest.raises(RecordError, match="made of other data: the tokens of eval/prose/0"):
            use(eval_key("prose", 0), DOMAINS["code"][0])
        with pytest.raises(RecordError, match="has no eval/prose/1: it has eval/code/0 to eval/prose/0"):
            use(eval_key("prose", 1), DOMAINS["prose"][0])


def test_choices_beyond_the_experts_are_for_their_own_router(tmp_path):
    config = tiny.config("mixtral")
    path = record_of(tmp_path, config, choice=9)
    key, batch = eval_key("code", 0), DOMAINS["code"][0]
    assert Tape(config, replay=path, training=False, source={}).tell(key, batch)["choice"].max() == 9
    deepseek = tiny.config("deepseek").model
    moe = dataclasses.replace(deepseek.moe, router=RouterConfig("deepseek", 2))
    other = dataclasses.replace(config, model=dataclasses.replace(deepseek, moe=moe))
    with pytest.raises(RecordError, match="choices beyond its 8 experts, which mean something to the router 'mixtral' alone"):
        Tape(other, replay=path, training=False, source={}).tell(key, batch)


def test_one_process_records_and_replays(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(RecordError, match="recorded and replayed by one process, and there are 2"):
        Tape(tiny.config(), str(tmp_path / "a.rec"), training=True, source={})
    assert not Tape(tiny.config(), training=True, source={}).records


def test_one_file_is_not_read_and_written(tmp_path):
    config = tiny.config("mixtral")
    path = record_of(tmp_path, config)
    with pytest.raises(RecordError, match="is to be read and to be written"):
        Tape(config, f"{tmp_path}/../{tmp_path.name}/a.rec", path, training=False, source={})


def test_a_dense_model_is_refused(tmp_path):
    with pytest.raises(RecordError, match="is a dense model, which has no routing"):
        Tape(tiny.config(num_experts=0, first_dense=0), str(tmp_path / "a.rec"), training=False, source={})
