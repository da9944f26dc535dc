"""The search: which layouts it tries, and that it keeps the quickest that fit. The plans are made up; only their order is at stake."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import tiny

from configs.published import mixtral_8x7b
from moe_jax.config import ConfigError, MeshConfig, from_dict
from moe_jax.mesh import AXES
from moe_jax.plan import topology
from moe_jax.plan.search import at_rest, layout_flags, meshes, search

V5E = topology.parse("v5e:2x4")


def made_up(fits=lambda config: True, seconds=lambda config: 1.0, total=1):
    """A plan that is nothing but its config, whether it fits and how long it takes."""

    def evaluate(config):
        memory, time = SimpleNamespace(total=total), SimpleNamespace(seconds=seconds(config))
        return SimpleNamespace(config=config, fits=fits(config), time=time, memory=memory)

    return evaluate


def found(evaluate, config=None, keep=3):
    return search(config or tiny.config(), V5E, evaluate, keep, say=lambda line: None)


def test_every_mesh_multiplies_to_the_devices_and_divides_the_model():
    """Eight devices, 8 experts, 2 key/value heads, 32 rows: all factors of 8 but tensor 4 and 8."""
    shapes = [(m.data, m.fsdp, m.expert, m.tensor) for m in meshes(tiny.config(), 8)]
    expected = {
        (d, f, e, t) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) for e in (1, 2, 4, 8) for t in (1, 2) if d * f * e * t == 8
    }
    assert len(shapes) == len(set(shapes))
    assert set(shapes) == expected


def test_no_expert_axis_for_a_dense_model():
    dense = tiny.config(num_experts=0, num_shared_experts=0, first_dense=0, balance_loss_weight=0.0, z_loss_weight=0.0)
    assert {mesh.expert for mesh in meshes(dense, 8)} == {1}


def test_the_quickest_that_fits_wins_and_no_layout_is_asked_twice():
    asked = []

    def seconds(config):
        asked.append(layout_flags(config))
        return {"none": 1.0, "dots": 2.0, "full": 3.0}[config.model.remat] * config.mesh.tensor / config.mesh.expert

    roomy = lambda config: config.mesh.expert < 8 and config.model.remat != "none"  # noqa: E731
    result = found(made_up(roomy, seconds), tiny.config(remat="full"))
    assert len(asked) == len(set(asked)) == result.tried
    best = result.best[0].config
    assert (best.mesh.expert, best.mesh.tensor, best.model.remat) == (4, 1, "dots")
    times = [plan.time.seconds for plan in result.best]
    assert times == sorted(times)
    assert result.too_large > 0


def test_the_second_round_tries_exchanges_remat_and_microbatches_of_the_best_meshes():
    tried = []
    prefers = lambda config: tried.append(config) or (1.0 if config.mesh.expert == 2 else 2.0)  # noqa: E731
    found(made_up(seconds=prefers), keep=1)
    second = [c for c in tried if c.mesh.expert == 2 and c.mesh == tried[-1].mesh]
    assert {c.model.moe.exchange for c in second} >= {"all_to_all", "ragged", "all_gather"}
    assert {(c.model.remat, c.model.moe.remat_exchange) for c in second} >= {("none", False), ("dots", False), ("full", True)}
    assert {c.train.accumulation for c in second} == {1, 2, 4}


def test_a_refusal_is_told_once_and_nothing_that_fits_is_told_with_the_smallest():
    def evaluate(config):
        if config.mesh.tensor > 1:
            raise ConfigError("no tensor here.")
        return made_up(fits=lambda config: False, total=config.mesh.expert)(config)

    result = found(evaluate)
    assert result.refused == ("no tensor here.",)
    assert result.best == ()
    assert result.smallest.config.mesh.expert == 1


def test_a_mesh_whose_state_alone_is_too_large_is_not_traced():
    mixtral = from_dict(mixtral_8x7b.get_config("data.batch_size=64"))
    everywhere, nowhere = MeshConfig(data=1, fsdp=8, expert=8), MeshConfig(data=64)
    total = 46_702_792_704
    assert at_rest(mixtral, nowhere) == 16 * total
    assert at_rest(mixtral, everywhere) == pytest.approx(
        16 * total / 64, rel=0.25
    )  # all but the experts are split over fsdp alone
    tried = []
    v5p = topology.parse("v5p:4x4x4")
    search(mixtral, v5p, made_up(seconds=lambda config: tried.append(config.mesh) or 1.0), say=lambda line: None)
    assert tried
    assert all(at_rest(mixtral, mesh) < v5p.chip.memory for mesh in tried)


def test_the_flags_say_the_layout():
    """Each flag names a field of the config, and all that a search changes is among them."""
    config = tiny.config("mixtral", "data 2 expert 4", remat="dots", remat_exchange=True, exchange="ragged", accumulation=2)
    told = dict(flag.removeprefix("--config.").split("=") for flag in layout_flags(config).split())
    for name, value in told.items():
        field = config
        for part in name.split("."):
            field = getattr(field, part)
        assert str(field) == value
    changed = dataclasses.replace(config, mesh=MeshConfig(data=8))
    assert layout_flags(changed) != layout_flags(config)
    assert math.prod(int(told[f"mesh.{axis}"]) for axis in AXES) == 8
