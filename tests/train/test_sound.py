"""A checkpoint with a number that is none is refused for training, evaluation and sampling, by the name of the array."""

import re

import jax
import jax.numpy as jnp
import pytest
import tiny_run
from saved_run import save, with_nan

from moe_jax.config import RouterConfig
from moe_jax.routing import ROUTERS, make_router
from moe_jax.train import loop, run
from moe_jax.train.finite import not_finite
from moe_jax.validation import CheckpointError


def test_arrays_that_are_not_finite_are_found_by_name():
    tree = {
        "good": jnp.ones((2, 3)),
        "nan": jnp.array([1.0, jnp.nan]),
        "infinite": {"half": jnp.array([jnp.inf], jnp.bfloat16)},
        "count": jnp.array([2**31 - 1]),
        "key": jax.random.key(0),
        "empty": jnp.zeros((0, 4)),
    }
    assert sorted(not_finite(tree)) == ["infinite/half", "nan"]
    assert not_finite({}) == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Steps 2 and 3 are good in one run; in `weights` step 3 has a NaN in a parameter, in `moments` in Adam's, in `all` every step."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_run.write_corpus(folder)
    table = lambda state: (state.params["embed"], "table_VD")  # noqa: E731
    moment = lambda state: (_moments(state.opt_state), "table_VD")  # noqa: E731
    poisons = {
        "weights": lambda step, state: with_nan(state, table) if step == 3 else state,
        "moments": lambda step, state: with_nan(state, moment) if step == 3 else state,
        "all": lambda step, state: with_nan(state, table),
    }
    for name, poison in poisons.items():
        save(tiny_run.config(folder, name), (2, 3), poison)
    return folder


def _moments(opt_state):
    """The dict of the embedding's first moments, wherever optax has it."""
    found = [part.mu for part in jax.tree.leaves(opt_state, is_leaf=lambda part: hasattr(part, "mu")) if hasattr(part, "mu")]
    return next(mu["embed"] for mu in found if "embed" in mu and "table_VD" in mu["embed"])


def test_training_refuses_it_and_names_the_last_good_one(runs):
    where = re.escape(str(runs / "weights" / "checkpoints" / "3"))
    sentence = rf"params/embed/table_VD in the checkpoint {where} holds NaN or infinity; the last good checkpoint is that of step 2: move"
    with pytest.raises(CheckpointError, match=sentence):
        loop.train(tiny_run.config(runs, "weights"))


def test_the_optimizer_s_numbers_count_for_training_alone(runs):
    with pytest.raises(CheckpointError, match=r"opt_state/.*/mu/embed/table_VD in the checkpoint .* of step 2"):
        loop.train(tiny_run.config(runs, "moments"))
    assert run.restore(str(runs / "moments")).step == 3


def test_evaluation_and_sampling_refuse_it_too(runs):
    with pytest.raises(CheckpointError, match=r"params/embed/table_VD in the checkpoint .*/3 holds NaN or infinity"):
        run.restore(str(runs / "weights"))
    assert run.restore(str(runs / "weights"), "2").step == 2


def test_where_no_checkpoint_is_good_it_says_so(runs):
    with pytest.raises(CheckpointError, match=r"holds NaN or infinity; no earlier checkpoint is good: train again"):
        run.restore(str(runs / "all"))


@pytest.mark.parametrize("name", ROUTERS)
def test_no_router_starts_with_a_state_that_would_be_refused(name):
    router = make_router(RouterConfig(name, {"all_experts": 8, "switch": 1, "base": 1}.get(name, 2)), 8)
    assert not_finite(router.init_state()) == []
