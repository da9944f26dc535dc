"""Another config, another corpus, another run's checkpoints: what a run goes on with, and what it refuses in which words."""

import dataclasses
import json
import pathlib
import shutil
import types

import jax.numpy as jnp
import pytest
import tiny_run

from moe_jax.config import ConfigError, from_dict, to_dict
from moe_jax.data.documents import DataError
from moe_jax.train import loop, resuming, run
from moe_jax.train.run_info import write_run_info
from moe_jax.validation import CheckpointError

CORPUS = types.SimpleNamespace(fingerprint="a" * 16)


def leaves(tree, path=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def put(tree, path, value):
    *groups, name = path.split(".")
    for group in groups:
        tree = tree[group]
    tree[name] = value


def other(value):
    if isinstance(value, bool):
        return not value
    return {int: lambda: value + 1, float: lambda: value + 0.5, str: lambda: value + "x", list: lambda: ["x"]}[type(value)]()


@pytest.fixture
def config(tmp_path):
    config = tiny_run.config(tmp_path)
    write_run_info(config.workdir, to_dict(config))
    return config


def rewrite(config, **fields):
    """The run folder's config.json with other values; names have __ for a dot."""
    tree = to_dict(config)
    for path, value in fields.items():
        put(tree, path.replace("__", "."), value)
    write_run_info(config.workdir, tree)


FIELDS = dict(leaves(to_dict(tiny_run.config(tiny_run.ROOT))))


def test_the_lists_name_fields_and_reasons():
    groups = {path[: path.index(".")] for path in FIELDS if "." in path}
    assert set(resuming.MAY_CHANGE) - FIELDS.keys() <= groups
    assert set(resuming.EXACT) <= FIELDS.keys()
    assert all(resuming.MAY_CHANGE.values())
    assert not set(resuming.MAY_CHANGE) & set(resuming.EXACT)


@pytest.mark.parametrize("path", [path for path in FIELDS if path not in resuming.EXACT])
def test_every_field_may_change_or_is_refused_by_name(config, path):
    now = FIELDS[path]
    if path in ("workdir", "data.paths", "data.cache_dir"):
        now = dict(leaves(to_dict(config)))[path]
    then = other(now)
    rewrite(config, **{path: then})
    if resuming._may_change(path):
        told = resuming.check_config(config, 8)
        assert (f"{path} = {now!r} (was {then!r})" in told) == (path not in ("workdir", "train.resume"))
    elif path == "model.vocab_size":
        assert resuming.check_config(config, 8) == ""  # 0: the tokenizer's
    else:
        sentence = f"{path} is {now!r} and was {then!r} in the 8 steps that workdir = {config.workdir!r} has taken; set it back"
        with pytest.raises(ConfigError) as refusal:
            resuming.check_config(config, 8)
        assert str(refusal.value).startswith(sentence)


def test_the_same_config_says_nothing(config):
    assert resuming.check_config(config, 8) == ""


EXACT_THEN = {
    "model__moe__dispatch": ("einsum", "dropless"),
    "model__moe__exchange": ("ragged", "all_gather"),
    "model__moe__exchange_chunks": (2, 1),
    "model__moe__send_once": (False, True),
    "train__accumulation": (1, 2),
}


@pytest.mark.parametrize("name", EXACT_THEN)
def test_what_is_exact_may_change_and_what_drops_may_not(tmp_path, name):
    then, now = EXACT_THEN[name]
    exact = tiny_run.config(tmp_path, **{name: now})
    rewrite(exact, **{name: then})
    path = name.replace("__", ".")
    assert resuming.check_config(exact, 8) == f"changed since the last start: {path} = {now!r} (was {then!r})"
    drops = {"model__moe__exchange_factor": 1.0} if name.endswith("dispatch") else {"model__moe__dispatch": "capacity"}
    lossy = tiny_run.config(tmp_path, **{name: now}, **drops)
    rewrite(lossy, **{name: then})
    with pytest.raises(
        ConfigError, match=rf"{path} is {now!r} and was {then!r} .* \(assignments can be dropped, so the result"
    ):
        resuming.check_config(lossy, 8)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            dict(model__moe__balance_loss_weight=0.1, model__moe__balance_loss_scope="microbatch"),
            "the balance loss goes by",
        ),
        (
            dict(model__moe__balance_loss_weight=0.1, model__moe__balance_loss_accumulation="running"),
            "the balance loss goes by",
        ),
        (dict(model__moe__router__name="sinkhorn"), "the router 'sinkhorn' chooses within a microbatch"),
    ],
    ids=str,
)
def test_microbatches_may_not_change_where_something_goes_by_them(tmp_path, changes, reason):
    config = tiny_run.config(tmp_path, **changes)
    rewrite(config, train__accumulation=1)
    with pytest.raises(ConfigError, match=rf"train\.accumulation is 2 and was 1 .*\({reason}"):
        resuming.check_config(config, 8)


def test_a_run_older_than_a_field_has_its_default(config):
    tree = to_dict(config)
    for path in ("data.bad_records", "model.post_norms", "model.moe.router.deepseek.scale", "train.report"):
        *groups, name = path.split(".")
        node = tree
        for group in groups:
            node = node[group]
        del node[name]
    tree["model"]["of_long_ago"] = 3
    write_run_info(config.workdir, tree)
    assert resuming.check_config(config, 8) == ""
    newer = dataclasses.replace(config, model=dataclasses.replace(config.model, post_norms=True))
    with pytest.raises(ConfigError, match=r"model\.post_norms is True and was False in the 8 steps"):
        resuming.check_config(newer, 8)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": 3}', "[" * 100_000, "\x00"], ids=len)
def test_a_damaged_config_is_refused_for_training_and_for_reading(config, text):
    (pathlib.Path(config.workdir) / "config.json").write_text(text)
    for use in (lambda: resuming.check_config(config, 8), lambda: run.read_config(config.workdir)):
        with pytest.raises(ConfigError, match=r"run/config\.json is no config of a run: .*; put the run's own back"):
            use()


def extra_of(config, **changes):
    identity = json.loads(json.dumps(resuming.identity(config, CORPUS)))
    identity["settings"] |= changes
    return identity


def test_a_checkpoint_is_compared_with_the_run_itself(config):
    resuming.check_checkpoint(extra_of(config), config, CORPUS, 8)
    with pytest.raises(
        CheckpointError, match=r"step 8 in workdir = .* is another run's: optimizer\.b2 was 0\.9 when .* is 0\.95"
    ):
        resuming.check_checkpoint(extra_of(config, **{"optimizer.b2": 0.9}), config, CORPUS, 8)
    with pytest.raises(CheckpointError, match="does not say which data it was trained on"):
        resuming.check_checkpoint({"data": None, "origin": None}, config, CORPUS, 8)
    of_an_older_version = {"origin": resuming.origin(config, CORPUS)}
    resuming.check_checkpoint(of_an_older_version, config, CORPUS, 8)


def test_another_corpus_is_told_from_another_field(config):
    then = extra_of(config)
    now = types.SimpleNamespace(fingerprint="b" * 16)
    with pytest.raises(
        ConfigError, match=r"the fingerprint of data\.corpus is 'b+' and was 'a+' .* \(the documents have changed\)"
    ):
        resuming.check_checkpoint(then, config, now, 8)
    rewrite(config, data__max_megabytes=3.0)
    with pytest.raises(ConfigError, match=r"\(data\.max_megabytes is 0\.5 and was 3\.0\); set it back"):
        resuming.check_checkpoint(then, config, now, 8)


def test_checkpoints_without_a_config_or_of_another_run_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    """Through the front door; the checkpoints hold nothing that could be restored."""
    tiny_run.write_corpus(tmp_path)
    config, stranger = (tiny_run.config(tmp_path, name) for name in ("run", "stranger"))
    stranger = dataclasses.replace(stranger, optimizer=dataclasses.replace(stranger.optimizer, weight_decay=0.5))
    corpus = loop.load_corpus(config.data)
    for one in (config, stranger):
        with run.checkpoints(one) as checkpoints:
            checkpoints.save(3, {"w": jnp.ones(3)}, {"data": None, "metrics": {}} | resuming.identity(one, corpus))
    with pytest.raises(ConfigError, match=r"has a checkpoint of step 3 and no config\.json"):
        loop.train(config)
    for one in (config, stranger):
        write_run_info(one.workdir, to_dict(one))
    shutil.rmtree(f"{config.workdir}/checkpoints")
    shutil.copytree(f"{stranger.workdir}/checkpoints", f"{config.workdir}/checkpoints")
    with pytest.raises(CheckpointError, match=r"is another run's: optimizer\.weight_decay was 0\.5 .* and is 0\.1 in this"):
        loop.train(config)
    with pytest.raises(ConfigError, match=r"optimizer\.weight_decay is 0\.1 and was 0\.5 in the 3 steps"):
        loop.train(dataclasses.replace(config, workdir=stranger.workdir))
    (tmp_path / "corpus.jsonl").write_text((tmp_path / "corpus.jsonl").read_text() + '{"text": "one more"}\n')
    with pytest.raises(ConfigError, match=r"the documents have changed"):
        loop.train(stranger)
    with pytest.raises(DataError, match="matches no file"):
        loop.train(dataclasses.replace(stranger, data=dataclasses.replace(stranger.data, paths=("gone",))))


def test_the_comparison_survives_json(config):
    tree = json.loads(json.dumps(to_dict(config)))
    assert resuming._fields(tree) == resuming._fields(to_dict(from_dict(tree)))
