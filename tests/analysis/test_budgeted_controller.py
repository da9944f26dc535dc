"""The controller of a budget: its gradient, its budget, the bound above it, and what it learns."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.analysis import budgeted_controller as bc
from moe_jax.config import ConfigError

TASKS = bc.Tasks()
TINY = bc.Tasks(num_tasks=2, difficulties=2, most=2, guess=0.3, first=0.8, decay=0.4, step_error=0.2, tool_cost=2)
FIXED = {solver: bc.always(TASKS, solver) for solver in bc.SOLVERS}
RULES = FIXED | {"random": bc.at_random(TASKS), "fair share": bc.fair_share(TASKS)}


def some_params(tasks, seed, hidden=4):
    """A policy that is not even."""
    params = bc.init_policy(jax.random.key(seed), tasks, hidden)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(tree, [x + jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def all_episodes(params, tasks, difficulty_I, budget):
    """(Episodes [N, I], probability [N]) of all that can happen on these tasks."""
    policy_IJUM, found, chances = np.asarray(bc.tabulate(params, tasks)), [], []
    for choice_I in itertools.product(range(len(bc.SOLVERS)), repeat=tasks.num_tasks):
        cost_I = tasks.cost_JM[difficulty_I, choice_I]
        budget_I = budget - np.cumsum(cost_I) + cost_I
        if np.sum(cost_I) > budget:
            continue
        pi = np.prod(policy_IJUM[np.arange(tasks.num_tasks), difficulty_I, budget_I, choice_I])
        for right_I in itertools.product((0.0, 1.0), repeat=tasks.num_tasks):
            p_I = tasks.right_JM[difficulty_I, choice_I]
            chance = pi * np.prod(np.where(right_I, p_I, 1 - p_I))
            if chance > 0:
                found.append((difficulty_I, budget_I, choice_I, np.float32(right_I)))
                chances.append(chance)
    return bc.Episodes(*(np.stack(column) for column in zip(*found, strict=True))), np.array(chances)


def test_the_estimator_is_the_policy_gradient_in_expectation():
    """All pairs of episodes of a group of two, weighted by their probability, against the derivative of the exact value."""
    params, pairs, weights = some_params(TINY, seed=3), [], []
    for difficulty_I in itertools.product(range(TINY.difficulties), repeat=TINY.num_tasks):
        seen, chance = all_episodes(params, TINY, difficulty_I, TINY.most)
        assert chance.sum() == pytest.approx(1, abs=1e-5)
        first, second = (index.ravel() for index in np.indices((len(chance), len(chance))))
        pairs.append(jax.tree.map(lambda x: np.stack([x[first], x[second]], axis=1)[:, None], seen))  # noqa: B023
        weights.append(chance[first] * chance[second] / TINY.difficulties**TINY.num_tasks)
    pairs, weights = jax.tree.map(lambda *parts: np.concatenate(parts), *pairs), np.concatenate(weights)
    mean = lambda p: jnp.dot(weights, jax.vmap(lambda pair: bc.surrogate(p, TINY, pair))(pairs))  # noqa: E731
    total = jax.jit(jax.grad(mean))(params)
    exact = jax.grad(lambda p: bc.value(TINY, bc.tabulate(p, TINY))[TINY.most])(params)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(exact)) > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), total, exact)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_episode_spends_more_than_its_budget(seed):
    seen = bc.rollouts(some_params(TASKS, seed), TASKS, jax.random.key(seed), groups=64, episodes=8)
    cost_GRI = TASKS.cost_JM[np.asarray(seen.difficulty), np.asarray(seen.choice)]
    start_GR = np.asarray(seen.budget)[:, :, 0]
    assert (cost_GRI.sum(-1) <= start_GR).all()
    np.testing.assert_array_equal(np.asarray(seen.budget), start_GR[..., None] - np.cumsum(cost_GRI, -1) + cost_GRI)
    assert (cost_GRI.sum(-1) == start_GR).any()  # and some are spent to the last unit


def test_rollouts_are_worth_what_the_exact_value_says():
    """Played episodes against the exact expectation, in units of its standard error."""
    params, budget = some_params(TASKS, 5), 30
    of_tasks, of_play = jax.random.split(jax.random.key(0))
    difficulty_RI = jax.random.randint(of_tasks, (4000, TASKS.num_tasks), 0, TASKS.difficulties)
    play = jax.jit(jax.vmap(lambda key, d_I: bc.rollout(params, TASKS, key, d_I, jnp.int32(budget))))
    share_R = np.asarray(play(jax.random.split(of_play, 4000), difficulty_RI).right).mean(-1)
    exact = float(bc.value(TASKS, bc.tabulate(params, TASKS))[budget])
    assert abs(share_R.mean() - exact) < 4 * share_R.std() / np.sqrt(len(share_R))


@pytest.mark.parametrize("name", [*RULES, "some policy"])
def test_the_oracle_is_at_least_every_policy(name):
    policy_IJUM = RULES[name] if name in RULES else bc.tabulate(some_params(TASKS, 7), TASKS)
    np.testing.assert_allclose(policy_IJUM.sum(-1), 1, atol=1e-5)
    assert (np.asarray(policy_IJUM)[:, ~TASKS.payable_JUM] == 0).all()
    best_U, value_U = bc.value(TASKS, bc.oracle(TASKS)), bc.value(TASKS, policy_IJUM)
    assert (best_U >= value_U - 1e-5).all()
    assert float(best_U[30] - value_U[30]) > 0.01


def test_the_oracle_reaches_the_best_of_all_deterministic_policies():
    """One task: every table of choices tried out."""
    tasks = bc.Tasks(num_tasks=1, difficulties=2, most=2, tool_cost=2)
    best = max(
        np.mean([tasks.right_JM[j, m] for j, m in enumerate(choices)])
        for choices in itertools.product(range(4), repeat=2)
        if all(tasks.cost_JM[j, m] <= 2 for j, m in enumerate(choices))
    )
    assert float(bc.value(tasks, bc.oracle(tasks))[2]) == pytest.approx(best)


def test_values_worked_out_by_hand():
    right_J = TASKS.right_JM.mean(0)
    np.testing.assert_allclose(bc.value(TASKS, FIXED["guess"]), 0.1, atol=1e-6)
    assert float(bc.value(TASKS, FIXED["heuristic"])[12]) == pytest.approx(right_J[1])
    assert float(bc.value(TASKS, FIXED["tool"])[30]) == pytest.approx((5 + 7 * 0.1) / 12)  # 30 units pay the tool five times


def test_shares_of_the_solvers_give_the_value_and_keep_the_budget():
    policy_IJUM = bc.tabulate(some_params(TASKS, 9), TASKS)
    share_JM = bc.choices_by_difficulty(TASKS, policy_IJUM, 30)
    np.testing.assert_allclose(share_JM.sum(-1), 1, atol=1e-5)
    assert float((share_JM * TASKS.right_JM).sum(-1).mean()) == pytest.approx(float(bc.value(TASKS, policy_IJUM)[30]), abs=1e-5)
    assert float((share_JM * TASKS.cost_JM).sum(-1).mean()) * TASKS.num_tasks <= 30


def test_the_learned_policy_beats_each_solver_alone():
    params, value_NU = bc.train(TASKS, jax.random.key(0), steps=200, groups=16, episodes=8)
    learned_U = bc.value(TASKS, bc.tabulate(params, TASKS))
    assert float(learned_U.mean()) > float(value_NU[0].mean()) + 0.15
    for name, policy_IJUM in FIXED.items():
        value_U = bc.value(TASKS, policy_IJUM)
        for budget in (18, 24, 30, 36, 48):
            assert learned_U[budget] > value_U[budget] + 0.01, (name, budget)


def test_refusals():
    with pytest.raises(ConfigError, match=r"Tasks.step_error = 1.5 must be between 0 and 1"):
        bc.Tasks(step_error=1.5)
    with pytest.raises(ConfigError, match=r"Tasks.num_tasks = 0 must be 1 or more"):
        bc.Tasks(num_tasks=0)
    with pytest.raises(ConfigError, match=r"episodes = 1 leaves no other episode"):
        bc.train(TASKS, jax.random.key(0), episodes=1)
    with pytest.raises(ConfigError, match=r"steps = 15 must be a multiple"):
        bc.train(TASKS, jax.random.key(0), steps=15)
    with pytest.raises(ConfigError, match=r"budget = 73 must be between 0 and Tasks.most = 72"):
        bc.choices_by_difficulty(TASKS, RULES["random"], 73)
