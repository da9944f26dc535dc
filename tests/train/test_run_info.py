"""config.json and versions.json, and the commit of a checkout."""

import json
import subprocess

import jax

import moe_jax
from moe_jax.config import Config, from_dict, to_dict
from moe_jax.train.run_info import git_commit, read_config_tree, write_run_info


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True)


def test_files_say_what_the_run_was_made_with(tmp_path):
    config = Config()
    write_run_info(tmp_path / "run", to_dict(config))
    write_run_info(tmp_path / "run", to_dict(config))  # a resumed run writes them again
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "versions.json"]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == to_dict(config)
    versions = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert versions["jax"] == jax.__version__
    assert versions["moe_jax"] == moe_jax.__version__
    assert versions["device_count"] == 8
    assert {"python", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"} <= versions.keys()
    assert {"platform", "device_kind", "git"} <= versions.keys()


def test_the_commit_and_whether_tracked_files_changed(tmp_path):
    assert git_commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "first")
    (tmp_path / "untracked").write_text("2")
    clean = git_commit(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == clean | {"dirty": True}


def test_the_config_of_an_older_run_is_read_in_todays_fields(tmp_path):
    """Of before `attention.rope` was a group and `qk_norm` had three values."""
    tree = to_dict(Config())
    del tree["model"]["attention"]["rope"]
    tree["model"]["attention"] |= {"rope_theta": 500.0, "qk_norm": True}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    attention = from_dict(read_config_tree(tmp_path)).model.attention
    assert (attention.rope.theta, attention.qk_norm) == (500.0, "head")
    tree["model"]["attention"]["qk_norm"] = False
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert from_dict(read_config_tree(tmp_path)).model.attention.qk_norm == "none"
    (tmp_path / "config.json").write_text(json.dumps(to_dict(Config())))
    assert from_dict(read_config_tree(tmp_path)) == Config()
