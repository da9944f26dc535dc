"""Every sweep file: its points build, are different runs, have the parameters that it says; every family is in `PUBLISHED`."""

import importlib
import pathlib

import pytest

from configs import base, routers
from configs.ablations import small
from moe_jax.analysis import ablation_points
from moe_jax.config import ConfigError, from_dict
from moe_jax.routing import ROUTERS, make_router
from moe_jax.sizes import num_params

FOLDER = pathlib.Path(small.__file__).parent
SWEEPS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "small"))


def configs(name, arg="model.vocab_size=384"):
    module = importlib.import_module(f"configs.ablations.{name}")
    return ablation_points.point_configs(module.get_config(arg).to_dict(), ablation_points.read_points(module.sweep))


def counts(name):
    return {point: num_params(config.model) for point, config in configs(name).items()}


def assert_equal(counts, what, within=0.02):
    """Equal but for the routers' own parameters, which grow with the number of experts."""
    values = [getattr(count, what) - count.router for count in counts]
    assert max(values) <= min(values) * (1 + within), values


def test_there_are_the_sweeps():
    assert {"routers", "num_experts", "granularity", "capacity", "balance", "bias_speed", "shared", "baselines"} <= set(SWEEPS)


@pytest.mark.parametrize("name", SWEEPS)
def test_every_point_builds_and_is_a_run_of_its_own(name):
    points = configs(name)
    assert len(points) >= 3
    tokens = {config.train.steps * config.data.batch_size * config.data.seq_len for config in points.values()}
    assert len(tokens) == 1
    assert max(tokens) < 2.1e6  # of a minute


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_takes_the_base_configs_arguments(name):
    assert all(config.train.steps == 7 for config in configs(name, "train.steps=7,optimizer.warmup_steps=1").values())


@pytest.mark.parametrize("name", ["granularity", "shared", "capacity", "balance", "bias_speed"])
def test_points_of_equal_total_and_active_parameters(name):
    assert_equal(counts(name).values(), "total")
    assert_equal(counts(name).values(), "active")


def test_granularity_splits_the_same_weights():
    exact = {(count.experts, count.active_experts) for count in counts("granularity").values()}
    assert len(exact) == 1
    assert [config.model.moe.router.top_k for config in configs("granularity").values()] == [2, 4, 8]


def test_num_experts_adds_total_and_not_active_parameters():
    found = counts("num_experts")
    assert_equal(found.values(), "active")
    assert [round(found[name].experts / found["1_expert"].experts) for name in list(found)[1:]] == [1, 2, 4, 8]
    assert found["dense"].dense == found["1_expert"].experts


def test_baselines_are_dense_of_equal_active_and_of_equal_total():
    found = counts("baselines")
    assert_equal([found[name] for name in ("dense_active", "hash", "learned")], "active")
    assert_equal([found[name] for name in ("dense_total", "hash", "learned")], "total")
    assert found["hash"].router == 0 < found["learned"].router


def test_routers_have_equal_parameters_but_for_those_that_say_so():
    found = counts("routers")
    fewer = {"moe_plus_plus", "mixture_of_depths"}
    assert_equal([count for name, count in found.items() if name not in fewer], "active")
    assert all(found[name].active < found["mixtral"].active for name in fewer)
    smaller = {"mixture_of_depths", "dense_mixture"}
    assert_equal([count for name, count in found.items() if name not in smaller], "total")


def test_routers_are_all_that_may_train_a_language_model():
    causal = [
        name
        for name in routers.PUBLISHED
        if make_router((moe := from_dict(routers.get_config(name)).model.moe).router, moe.num_experts).causal
    ]
    assert list(configs("routers")) == causal
    assert "soft_moe" not in causal


def test_a_point_of_the_routers_has_the_published_losses_and_no_others():
    points = configs("routers")
    for name, config in points.items():
        published, moe = from_dict(routers.get_config(name)).model.moe, config.model.moe
        for field in ("router", "balance_loss_weight", "balance_loss_scope", "z_loss_weight", "dispatch", "capacity_factor"):
            assert getattr(moe, field) == getattr(published, field), (name, field)
        assert moe.num_shared_experts == published.num_shared_experts


def test_balance_points_differ_in_balance_alone():
    points = configs("balance")
    allowed = ("model.moe.balance_loss", "model.moe.router.")
    first = ablation_points.flatten(ablation_points.to_dict(points["global_0.01"]))
    for config in points.values():
        other = ablation_points.flatten(ablation_points.to_dict(config))
        assert all(name.startswith(allowed) for name in first.keys() ^ other.keys())
        assert all(name.startswith(allowed) for name in first.keys() & other.keys() if first[name] != other[name])


def test_every_family_is_published():
    used = {from_dict(routers.get_config(name)).model.moe.router.name for name in routers.PUBLISHED}
    assert used == set(ROUTERS)


@pytest.mark.parametrize("name", routers.PUBLISHED)
def test_a_published_router_builds_and_changes_nothing_needlessly(name):
    paper, changes = routers.PUBLISHED[name]
    moe = from_dict(routers.get_config(name)).model.moe
    make_router(moe.router, moe.num_experts)
    assert paper
    plain = ablation_points.flatten(base.get_config().to_dict())
    assert [field for field, value in changes.items() if plain[field] == value] == []
    of_family = [field for field in changes if field.count(".") == 4]
    assert all(field.split(".")[3] == moe.router.name for field in of_family)


def test_published_settings_by_their_papers_figures():
    def moe(name):
        return from_dict(routers.get_config(name)).model.moe

    switch, olmoe, v3 = moe("switch"), moe("olmoe"), moe("deepseek_v3")
    assert (switch.router.top_k, switch.dispatch, switch.capacity_factor) == (1, "capacity", 1.25)
    assert switch.balance_loss_weight == 0.01  # Switch, section 2.2
    assert (olmoe.router.options["normalize"], olmoe.balance_loss_weight, olmoe.z_loss_weight) == ("before", 0.01, 0.001)
    assert (moe("qwen3").router.options["normalize"], moe("qwen3").num_shared_experts) == ("after", 0)
    assert (v3.balance_loss_weight, v3.balance_loss_scope, v3.router.options["bias_speed"]) == (0.0001, "sequence", 0.001)
    assert (v3.router.options["score"], v3.router.options["scale"], v3.num_shared_experts) == ("sigmoid", 2.5, 1)


def test_a_name_and_further_changes():
    config = from_dict(routers.get_config("remoe,train.steps=70,model.moe.router.remoe.l1_start=1e-6"))
    assert (config.model.moe.router.name, config.train.steps) == ("remoe", 70)
    assert config.model.moe.router.options["l1_start"] == 1e-6


@pytest.mark.parametrize("arg", ["", "remo", "train.steps=5"])
def test_no_such_published_router(arg):
    with pytest.raises(ConfigError, match=r"names no published router; choose one of mixtral, olmoe"):
        routers.get_config(arg)
