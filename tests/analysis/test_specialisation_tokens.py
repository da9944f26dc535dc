"""Token ids, time and pairs: what is told of routings whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest
from specialisation_cases import distinct, observe

from moe_jax.analysis.specialisation_pairs import coactivation, strongest_pairs
from moe_jax.analysis.specialisation_saturation import saturation
from moe_jax.analysis.specialisation_vocabulary import Favourite, favourites, vocabulary_specialisation
from moe_jax.config import ConfigError
from moe_jax.train.observation import ObservationError


def one_domain(choice_TLM, experts, **more):
    return observe(choice_TLM, np.zeros(len(choice_TLM), np.int64), experts=experts, **more)


def test_ids_that_decide_and_ids_that_do_not():
    """Layer 0: expert = id modulo 4. Layer 1: at random. 8 ids of 200 tokens."""
    rng, token_T = np.random.default_rng(0), np.arange(1600) % 8
    choice_TLM = np.stack([token_T % 4, rng.integers(0, 4, 1600)], axis=1)[..., None]
    found = vocabulary_specialisation(one_domain(choice_TLM, 4, token_T=token_T), draws=20)
    bias = 7 * 3 / (2 * 1600 * np.log(2))
    assert found.coverage == 1
    assert found.id_entropy_L == pytest.approx([3, 3])
    assert found.information_L[0] == pytest.approx(2)
    assert found.corrected_L[0] == pytest.approx(2, abs=0.01)
    assert abs(found.corrected_L[1]) < bias
    assert found.null_information_L == pytest.approx([bias, bias], rel=0.2)
    assert found.top_share_L[0] == pytest.approx(1)
    assert found.top_share_L[1] == pytest.approx(found.null_top_share_L[1], abs=0.02)
    assert found.uniform_share == 0.25


def test_a_share_by_hand():
    """Id 5 goes 3 times to expert 0 and once to 2; id 9 twice to 1 and 2 each: (3 + 2) / 8."""
    choices, tokens = [0, 0, 0, 2, 1, 1, 2, 2], [5, 5, 5, 5, 9, 9, 9, 9]
    observed = one_domain(np.array(choices)[:, None, None], 3, token_T=tokens)
    assert vocabulary_specialisation(observed).top_share_L == pytest.approx([5 / 8])
    missing = replace(observed, tokens_X=observed.tokens_X * 2)
    assert vocabulary_specialisation(missing).coverage == 0.5


@pytest.mark.parametrize("choices", [1, 3])
def test_the_share_of_chance_is_not_flattering(choices):
    """Uneven experts that do not read the token, 25 tokens an id: by chance an id has favourites, as many as the null says or fewer."""
    rng, weight_E = np.random.default_rng(1), np.linspace(1, 3, 12)
    token_T = np.arange(2500) % 100
    expert_TK = distinct(rng, np.tile(weight_E, (2500, 1)), choices)
    found = vocabulary_specialisation(one_domain(expert_TK[:, None], 12, token_T=token_T), draws=20)
    assert found.top_share_L[0] > found.uniform_share + 0.05
    assert -0.005 < found.null_top_share_L[0] - found.top_share_L[0] < 0.02
    assert abs(found.corrected_L[0]) < 0.3 * found.null_information_L[0]


def test_the_favourites_of_an_expert():
    """Expert 0 gets id 3 always, id 7 half the time, id 1 never; id 4 always, of which there are too few."""
    tokens = [3] * 40 + [7] * 40 + [1] * 40 + [4] * 5
    choices = [0] * 40 + [0, 1] * 20 + [1] * 40 + [0] * 5
    observed = one_domain(np.array(choices)[:, None, None], 3, token_T=tokens)
    overall = 65 / 125
    best = [Favourite(3, 40, 1.0, 1 / overall), Favourite(7, 40, 0.5, 0.5 / overall)]
    assert favourites(observed, 0, 0) == best
    assert favourites(observed, 0, 0, count=1) == best[:1]
    assert [favourite.token for favourite in favourites(observed, 0, 0, least=5)] == [3, 4, 7]
    assert favourites(observed, 0, 2) == []
    for place in ((1, 0), (0, 3), (-1, 0)):
        with pytest.raises(ConfigError, match="is not in the observation"):
            favourites(observed, *place)


def test_a_vocabulary_that_was_not_counted_is_refused():
    observed = one_domain(np.zeros((4, 1, 1), np.int64), 2)
    with pytest.raises(ConfigError, match="draws = 0"):
        vocabulary_specialisation(observed, draws=0)
    with pytest.raises(ObservationError, match="no token ids"):
        vocabulary_specialisation(replace(observed, vocabulary_tokens_N=np.zeros(1, np.int64)))


def test_saturation_by_hand():
    """Two tokens of two experts each: at step 20 as at 30, at step 10 half and none in common with 20."""
    at = {10: [[0, 1], [2, 3]], 20: [[1, 2], [0, 1]], 30: [[2, 1], [1, 0]]}
    observed = {step: one_domain(np.array(choice)[:, None], 4, step=step) for step, choice in at.items()}
    found = saturation([observed[30], observed[10], observed[20]])
    assert found.steps_N.tolist() == [10, 20, 30]
    assert found.last_NL[:, 0] == pytest.approx([0.25, 1, 1])
    assert found.previous_NL[:, 0] == pytest.approx([np.nan, 0.25, 1], nan_ok=True)
    assert found.uniform == 0.5
    assert found.chance_NL[:, 0] == pytest.approx([0.5 * (0.5 + 1 + 0.5) / 2, *[(0.25 + 1 + 0.25) / 2] * 2])


def test_the_saturation_of_chance():
    """Two routers that do not read the token, both fond of the same experts, meet far more often than K / E: as `chance_NL` says."""
    rng, weight_E = np.random.default_rng(2), np.array([20.0, 10, 5, 1, 1, 1, 1, 1])
    observed = [one_domain(distinct(rng, np.tile(weight_E, (4000, 1)), 2)[:, None], 8, step=step) for step in (1, 2)]
    found = saturation(observed)
    assert found.uniform == 0.25
    assert found.chance_NL[0, 0] > 0.5
    assert found.last_NL[0] == pytest.approx(found.chance_NL[0], abs=0.02)


def test_saturation_of_nothing_and_of_different_runs_is_refused():
    with pytest.raises(ConfigError, match="needs an observation"):
        saturation([])
    tokens = [one_domain(np.zeros((4, 1, 1), np.int64), 2, token_T=[t] * 3 + [9], step=t) for t in (0, 1)]
    other = replace(tokens[1], row_tokens_RS=tokens[1].row_tokens_RS + 1)
    with pytest.raises(ObservationError, match="other rows"):
        saturation([tokens[0], other])


def test_pairs_by_hand():
    """Three tokens choose 0 and 1, one 0 and 2: of the 4 tokens of expert 0 three chose 1 too, and all of 1's chose 0."""
    choice = np.array([[0, 1], [1, 0], [0, 1], [2, 0]])
    together = coactivation(one_domain(choice[:, None], 4))
    assert together.count_LEE[0, 0].tolist() == [4, 3, 1, 0]
    expected = [[1, 3 / 4, 1 / 4, 0], [1, 1, 0, 0], [1, 0, 1, 0], [np.nan] * 4]
    assert together.conditional_LEE[0] == pytest.approx(np.array(expected), nan_ok=True)
    assert together.expected_LEE[0].sum(-1) == pytest.approx([4, 3, 1, 0], rel=0.01)
    pair = strongest_pairs(together, least=2)[0]
    assert (pair.layer, pair.experts, pair.tokens) == (0, (0, 1), 3)
    assert pair.conditional == pytest.approx((3 / 4, 1))
    assert pair.lift == pytest.approx(pair.tokens / pair.expected)


@pytest.mark.parametrize("weights", [np.ones(8), np.linspace(1, 4, 8)], ids=["even", "uneven"])
def test_a_router_without_preferences_has_lift_one(weights):
    """Where the product of the loads, the expectation of independent experts, is 1.75 times too high."""
    rng = np.random.default_rng(3)
    observed = one_domain(distinct(rng, np.tile(weights, (20000, 1)), 2)[:, None], 8)
    together, apart = coactivation(observed), ~np.eye(8, dtype=bool)
    load_E, pairs_EE = observed.load_LE[0], together.count_LEE[0]
    assert together.lift_LEE[0][apart] == pytest.approx(1, abs=0.15)
    assert np.median(together.lift_LEE[0][apart]) == pytest.approx(1, abs=0.02)
    assert np.isnan(together.lift_LEE[0][~apart]).all()
    assert together.expected_LEE[0].sum(-1) == pytest.approx((pairs_EE * apart).sum(-1))
    product_EE = np.outer(load_E, load_E) / 20000
    assert np.median((pairs_EE / product_EE)[apart]) == pytest.approx(8 / (2 * 7), abs=0.03)
    if weights[0] == weights[-1]:
        assert together.expected_LEE[0][apart] == pytest.approx((product_EE * 8 / (2 * 7))[apart], rel=0.01)


def test_the_strongest_pair_is_the_planted_one():
    """In layer 1 half of the tokens of expert 5 take 2 as well."""
    rng = np.random.default_rng(4)
    choice_TLK = np.stack([distinct(rng, np.ones((3000, 8)), 2) for _ in range(2)], axis=1)
    planted = (choice_TLK[:, 1] == 5).any(1) & (rng.random(3000) < 0.5)
    choice_TLK[planted, 1] = [5, 2]
    together = coactivation(one_domain(choice_TLK, 8))
    best = strongest_pairs(together, count=3)
    assert (best[0].layer, best[0].experts) == (1, (2, 5))
    assert best[0].lift > 2
    assert [pair.lift for pair in best] == sorted((pair.lift for pair in best), reverse=True)
    assert strongest_pairs(together, least=1e6) == []


def test_one_choice_has_no_pairs():
    together = coactivation(one_domain(np.array([0, 1, 1])[:, None, None], 2))
    assert np.isnan(together.lift_LEE).all()
    assert strongest_pairs(together, least=0) == []
    assert together.conditional_LEE[0].tolist() == [[1, 0], [0, 1]]
