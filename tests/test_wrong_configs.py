"""Wrong configs by the hundred: each is refused in one sentence that names a field, or trains; none ends in a traceback."""

import shutil

import pytest
import tiny_run
from hypothesis import HealthCheck, Phase, given, settings
from wrong_configs import changes_of, read, refusal, trace_only, wrong_configs

from moe_jax.train import loop

PARTS = 8
NO_FIELD = "the config has no field"
# What it takes to be refused, from what was found: (flags, what the sentence says).
ONCE_FOUND = [
    ({"train.seed": 2**63}, "train.seed = 9223372036854775808 does not fit in 32 bits"),
    ({"model.attention.window": 2**63}, "model.attention.window = 9223372036854775808 does not fit in 32 bits"),
    ({"model.norm_eps": float("inf")}, "model.norm_eps = inf is not a finite number"),
    ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate = nan is not a finite number"),
    ({"data.bad_records.x": "1"}, f"{NO_FIELD} 'data.bad_records.x'"),
    ({"data.batch_size.x": "1"}, f"{NO_FIELD} 'data.batch_size.x'"),
    ({"model.d-model": "1"}, f"{NO_FIELD} 'model.d-model'"),
    ({"train.steps[3]": "1"}, f"{NO_FIELD} 'train.steps[3]'"),
    ({"train.replay": "os"}, "'os' is not a file; make one with train.record"),
    ({"train.record": "\0"}, "train.record = '\\x00' has a NUL byte"),
    ({"train.record": "x" * 300}, "cannot be a file (File name too long); choose another path"),
    ({"train.record": "/proc/self/status/x"}, "cannot be a file (Not a directory); choose another path"),
    ({"mesh.emulate": 4}, "mesh.emulate = 4 came too late"),
    ({"data.bad_records": "skp"}, "data.bad_records = 'skp' is unknown; did you mean 'skip'?"),
    ({"profile.steps": "2:1"}, "profile.steps = '2:1' is not within the run"),
]
ACCEPTED = [{}, {"model.moe.exchange": "all_gather", "model.remat": "full"}]


@pytest.fixture
def folder(tmp_path):
    tiny_run.write_corpus(tmp_path)
    return tmp_path


def outcome(folder, changes, number=0):
    """The sentence of a refusal, "" where it trains; the run folder is removed."""
    try:
        return refusal(lambda: loop.train(read(folder, f"run{number}", changes)))
    finally:
        shutil.rmtree(folder / f"run{number}", ignore_errors=True)


@pytest.mark.parametrize(("changes", "sentence"), ONCE_FOUND, ids=str)
def test_what_once_ended_in_a_traceback_is_refused(folder, monkeypatch, changes, sentence):
    trace_only(monkeypatch)
    assert sentence in outcome(folder, changes)


@pytest.mark.parametrize("changes", ACCEPTED, ids=str)
def test_a_right_config_is_traced(folder, monkeypatch, changes):
    trace_only(monkeypatch)
    assert outcome(folder, changes) == ""


def test_a_fault_is_no_refusal(folder, monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        outcome(folder, {})


def test_the_changes_differ_from_one_another():
    every = [changes_of(seed) for seed in range(200)]
    assert len({path for changes in every for path in changes}) > 100
    assert len({str(changes) for changes in every}) > 190


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
def test_two_hundred_generated_configs_are_refused_by_name_or_train_a_step(folder, part, record_property):
    """The whole way, to the evaluation after the only step; in parts, for as many workers."""
    seen = []

    @settings(
        max_examples=200 // PARTS,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(wrong_configs(part))
    def every_one(changes):
        sentence = outcome(folder, changes, len(seen))
        seen.append(bool(sentence))
        assert "\n" not in sentence
        if sentence:
            assert names_a_field(sentence, changes), (changes, sentence)

    every_one()
    assert len(seen) == 200 // PARTS
    assert 0 < sum(seen) < len(seen), "all alike, and so for another reason than their own"
    record_property("figures", f"{sum(seen)} of {len(seen)} generated configs were refused, the others trained")


def names_a_field(sentence, changes):
    """One of those that were changed; or that with which a change does not go together, by its dotted path."""
    own = [part for path in changes for part in path.replace("[", ".").split(".")]
    return any(part in sentence for part in own) or any(f"{group}." in sentence for group in ("model", "data", "train", "mesh"))
