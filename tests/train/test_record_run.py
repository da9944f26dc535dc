"""Whole runs that record their routing and replay it, in miniature."""

import json
import shutil

import numpy as np
import pytest
import tiny_run

from moe_jax.config import ConfigError
from moe_jax.plan import load
from moe_jax.train import loop
from moe_jax.train.routing_log import RecordError, RoutingLog


class PowerCutError(Exception):
    """Ends a run at a moment of the test's choice."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One uninterrupted run that records, in `folder`/straight and `folder`/straight.rec."""
    folder = tmp_path_factory.mktemp("records")
    tiny_run.write_corpus(folder)
    loop.train(recording(folder, "straight"))
    return folder


def recording(folder, workdir, **changes):
    return tiny_run.config(folder, workdir, **{"train__record": str(folder / f"{workdir}.rec")} | changes)


def replaying(folder, workdir, **changes):
    return tiny_run.config(folder, workdir, **{"train__replay": str(folder / "straight.rec")} | changes)


def blocks(path):
    """Everything after the header, which names the run folder."""
    return path.read_bytes().split(b"\n", 2)[2]


def test_every_step_stands_once_with_the_loads_it_had(folder):
    log = RoutingLog(folder / "straight.rec")
    assert log.keys == [f"train/{step}" for step in range(1, 9)]
    assert log.header.source == {"workdir": str(folder / "straight")}
    assert log.header.data["train.seed"] == 0
    for line in tiny_run.metrics(folder / "straight"):
        assert not any(name.startswith("record") for name in line)
        choice_BSLM = log.read(f"train/{line['step']}").choice_BSLM
        load_E = np.bincount(choice_BSLM[:, :, 0].ravel(), minlength=9)[:8]
        np.testing.assert_array_equal([load_E], line["router/load"])


def test_a_plan_reads_the_loads_of_the_run(folder):
    """Whatever the mesh that is planned for, its devices together get the loads that training told."""
    made = tiny_run.config(folder, "straight")
    told = np.array([line["router/load"] for line in tiny_run.metrics(folder / "straight")])
    for sizes in ({"data": 2, "expert": 2}, {"data": 1, "expert": 4}):
        routed = load.from_record(folder / "straight.rec", made, {"expert_outer": 1, "fsdp": 1, "tensor": 1, **sizes})
        by_microbatch_NLE = routed.rows_NLGPE.sum(axis=(2, 3))
        count = made.train.accumulation
        by_step_SLE = by_microbatch_NLE.reshape(-1, count, *by_microbatch_NLE.shape[1:]).sum(axis=1)
        np.testing.assert_array_equal(by_step_SLE[1::2], told)  # every other step is logged


def test_a_replayed_run_is_the_recorded_one_to_the_bit(folder):
    """Its choices told and its weights its own: every figure, the biases and the last checkpoint."""
    loop.train(replaying(folder, "replayed"))
    tiny_run.assert_same_run(folder / "replayed", folder / "straight")


def test_a_record_goes_on_where_its_run_does(folder, monkeypatch):
    """Cut in the fifth step, and from the checkpoint of step 3 in the seventh."""
    shard_batch = loop.shard_batch
    for number in (5, 4, 0):
        calls = []

        def counted(mesh, batch, calls=calls, number=number):
            calls.append(None)
            if len(calls) == number:
                raise PowerCutError
            return shard_batch(mesh, batch)

        monkeypatch.setattr(loop, "shard_batch", counted)
        if number:
            with pytest.raises(PowerCutError):
                loop.train(recording(folder, "cut"))
        else:
            loop.train(recording(folder, "cut"))
        if number == 5:  # step 4 is there, which the checkpoint does not have; and a block that was torn
            assert RoutingLog(folder / "cut.rec").keys == ["train/1", "train/2", "train/3", "train/4"]
            with open(folder / "cut.rec", "ab") as file:
                file.write(blocks(folder / "straight.rec")[:99])
    assert blocks(folder / "cut.rec") == blocks(folder / "straight.rec")
    tiny_run.assert_same_run(folder / "cut", folder / "straight")


def test_a_finished_run_leaves_its_record_alone(folder):
    before = (folder / "straight.rec").read_bytes()
    loop.train(recording(folder, "straight"))
    assert (folder / "straight.rec").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model__moe__num_experts=16), r"its num_experts is 8 and the model's is 16"),
        (dict(model__moe__first_dense=0), r"its layers is \(1,\) and the model's is \(0, 1\)"),
        (dict(model__moe__router__top_k=3), r"its choices is 2 and the model's is 3"),
        (dict(train__steps=9), r"has no train/9: it has train/1 to train/8; record as many"),
        (dict(train__seed=1), r"made of other data: train\.seed was 0 and is 1; set it back"),
        (dict(data__seq_len=8), r"made of other data: data\.seq_len was 16 and is 8"),
        (dict(data__val_fraction=0.5), r"made of other data: the fingerprint of data\.corpus was"),
        (dict(train__replay="{}/nothing.rec"), r"nothing\.rec' is not a file"),
        (dict(train__replay="{}/corpus.jsonl"), r"corpus\.jsonl' is not a routing record"),
        (dict(train__replay="{}/torn.rec"), r"torn\.rec' has no train/8: it has train/1 to train/7, and \d+ bytes of a block"),
        (dict(train__record="{}/straight.rec", train__replay=""), r"holds another routing record: its source is"),
        (dict(train__record="{}/corpus.jsonl"), r"corpus\.jsonl' is not a routing record"),
    ],
    ids=str,
)
def test_a_record_that_does_not_fit_is_refused_before_anything_is_written(folder, monkeypatch, changes, message):
    (folder / "torn.rec").write_bytes((folder / "straight.rec").read_bytes()[:-1])
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    monkeypatch.setattr(loop, "create", None)  # no model is made
    changes = {name: value.format(folder) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(RecordError, match=message) as refusal:
        loop.train(replaying(folder, "refused", **changes))
    assert "\n" not in str(refusal.value)
    assert not (folder / "refused").exists()
    assert {path: path.read_bytes() for path in folder.glob("*.*")} == before


def test_other_tokens_than_the_headers_data_promise_are_refused(folder):
    """A record that does not say what its data were: the tokens themselves are compared."""
    title, header, rest = (folder / "straight.rec").read_bytes().split(b"\n", 2)
    silent = json.dumps(json.loads(header) | {"data": {}}).encode()
    (folder / "silent.rec").write_bytes(b"\n".join((title, silent, rest)))
    with pytest.raises(RecordError, match=r"silent\.rec' was made of other data: the tokens of train/1 are not those"):
        loop.train(replaying(folder, "silent", train__replay=str(folder / "silent.rec"), train__seed=1))


def test_a_record_cannot_begin_again_in_the_middle(folder):
    """A run that goes on from step 8 with the record of its first 7."""
    shutil.copytree(folder / "straight", folder / "gap")
    torn = (folder / "straight.rec").read_bytes()[:-1]
    (folder / "gap.rec").write_bytes(torn)
    with pytest.raises(RecordError, match=r"has no train/8, after which the run goes on; choose another path"):
        loop.train(recording(folder, "gap", train__steps=9))
    assert (folder / "gap.rec").read_bytes() == torn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(train__record="a.rec", model__moe__num_experts=0),
            r"train\.record = 'a\.rec' while model\.moe\.num_experts = 0",
        ),
        (dict(train__record="a.rec", train__replay="a.rec"), r"train\.replay = 'a\.rec' is the file that train\.record writes"),
        (dict(train__replay_weights=True), r"train\.replay_weights = True while train\.replay = ''"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_run.config(tmp_path, **changes)
