"""Domains, token ids, time and pairs against counts worked by hand, oracles and routings of which the answer is known."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from specialisation_cases import observe

from moe_jax.analysis import specialisation as module
from moe_jax.analysis.specialisation import specialisation
from moe_jax.analysis.specialisation_information import entropy, miller_madow, mutual_information
from moe_jax.config import ConfigError
from moe_jax.train.observation import ObservationError


def test_a_table_of_two_by_two_by_hand():
    count_XE = np.array([[3, 1], [1, 3]])
    bits = 2 * 3 / 8 * np.log2((3 / 8) / (1 / 4)) + 2 * 1 / 8 * np.log2((1 / 8) / (1 / 4))
    assert mutual_information(count_XE) == pytest.approx(bits)
    assert bits == pytest.approx(0.188722, abs=1e-6)
    assert miller_madow(count_XE) == pytest.approx(bits - 1 / (16 * np.log(2)))


def test_information_is_the_divergence_from_independence():
    count_LXE = np.random.default_rng(0).integers(0, 9, (5, 3, 4))
    for count_XE, bits in zip(count_LXE, mutual_information(count_LXE), strict=True):
        joint = count_XE / count_XE.sum()
        apart = joint.sum(1, keepdims=True) * joint.sum(0)
        assert bits == pytest.approx(stats.entropy(joint.ravel(), apart.ravel(), base=2))
    assert entropy(count_LXE.sum(-1)) == pytest.approx(stats.entropy(count_LXE.sum(-1), axis=-1, base=2))


def test_information_of_equal_and_of_unrelated_variables():
    assert mutual_information(np.diag([5, 3, 2])) == pytest.approx(entropy(np.array([5, 3, 2])))
    assert mutual_information(np.outer([1, 2, 5], [3, 1])) == pytest.approx(0, abs=1e-12)
    assert mutual_information(np.zeros((2, 3))) == 0
    assert miller_madow(np.zeros((2, 3))) == 0


def test_the_correction_takes_the_bias_away():
    """300 tables of 200 independent draws: the plug-in estimate is (X - 1)(E - 1) / 2 n ln 2 too high, the corrected one is right."""
    rng = np.random.default_rng(1)
    p_XE = np.outer([0.5, 0.3, 0.2], np.full(8, 1 / 8))
    count_NXE = rng.multinomial(200, p_XE.ravel(), size=300).reshape(300, 3, 8)
    bias = 2 * 7 / (2 * 200 * np.log(2))
    assert mutual_information(count_NXE).mean() == pytest.approx(bias, rel=0.1)
    assert abs(miller_madow(count_NXE).mean()) < 0.1 * bias
    full = count_NXE + 1
    assert miller_madow(full) == pytest.approx(mutual_information(full) - 2 * 7 / (2 * full.sum((1, 2)) * np.log(2)))


def documents(rng, lengths_X, *, experts=6, layers=2, topic=1.0, domain=0.0):
    """Documents whose words go to experts by the topic of their document, with a part `domain` by the domain: K = 1."""
    choice, domain_T, document_T = [], [], []
    for x, lengths in enumerate(lengths_X):
        for length in lengths:
            share_LE = rng.dirichlet(np.full(experts, 1 / topic), layers)
            own_LE = np.eye(experts)[np.full(layers, x % experts)]
            share_LE = (1 - domain) * share_LE + domain * own_LE
            choice.append(np.stack([rng.choice(experts, length, p=share_E) for share_E in share_LE], axis=1))
            document_T += [len(choice)] * length
            domain_T += [x] * length
    return observe(np.concatenate(choice)[..., None], domain_T, document_T=document_T, experts=experts)


def test_planted_specialisation_is_found():
    """Layer 0: a domain, an expert. Layer 1: experts in turn, whatever the domain."""
    domain_T = np.repeat([0, 1, 2], 40)
    choice_TLM = np.stack([domain_T, np.arange(120) % 4], axis=1)[..., None]
    found = specialisation(observe(choice_TLM, domain_T, document_T=np.arange(120) // 8, experts=4))
    assert found.documents_X.tolist() == [5, 5, 5]
    assert found.information_L == pytest.approx([np.log2(3), 0], abs=1e-12)
    assert found.corrected_L - found.information_L == pytest.approx(np.array([2, -6]) / (2 * 120 * np.log(2)))
    assert found.domain_entropy_L == pytest.approx(np.log2(3))
    assert found.p_L == pytest.approx([1 / 201, 1])
    assert found.above_null_L.tolist() == [True, False]
    assert found.excess_L == pytest.approx(found.information_L - found.null_NL.mean(0))
    assert found.share_XLE[:, 0] == pytest.approx(np.eye(3, 4))
    assert found.lift_XLE[:, 0, :3] == pytest.approx(3 * np.eye(3))
    assert np.isnan(found.lift_XLE[:, 0, 3]).all()
    assert found.lift_XLE[:, 1] == pytest.approx(1)
    assert (found.z_XLE[:, 0, :3][np.eye(3, dtype=bool)] > 2).all()
    assert np.isnan(found.z_XLE[:, 1]).all()


def test_a_weak_effect_is_found_among_enough_documents():
    rng = np.random.default_rng(2)
    lengths = [[20] * 30] * 2
    with_effect = specialisation(documents(rng, lengths, domain=0.4))
    assert with_effect.above_null_L.all()
    assert (with_effect.excess_L > 0).all()
    assert (with_effect.z_XLE[[0, 1], :, [0, 1]] > 3).all()


def test_p_is_uniform_where_domains_do_not_matter():
    """Documents have topics and domains have none: p-values of 120 layers."""
    rng = np.random.default_rng(3)
    p = np.concatenate([specialisation(documents(rng, [[12] * 8] * 2, layers=4), 99, seed).p_L for seed in range(30)])
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert (p <= 0.05).mean() < 0.12


def test_lengths_that_differ_by_domain_are_a_small_sin():
    """3 long documents against 15 short ones: small p are too many, as the module says, and not many times too many."""
    rng = np.random.default_rng(3)
    p = np.concatenate([specialisation(documents(rng, [[60, 20, 40], [8] * 15], layers=8), 99, seed).p_L for seed in range(30)])
    assert 0.03 < (p <= 0.05).mean() < 0.25
    assert (p <= 0.01).mean() < 0.08


def test_documents_are_the_unit():
    """The same counts with every token a document of its own: what their topics do is taken for the domains' doing."""
    rng = np.random.default_rng(4)
    observed = documents(rng, [[80] * 4] * 2, layers=8, topic=3.0)
    choice_TLM = observed.row_choice_RSLM[observed.row_valid_RS]
    domain_T = np.repeat([0, 1], 320)
    loose = specialisation(observe(choice_TLM, domain_T, experts=6))
    tight = specialisation(observed)
    assert loose.information_L == pytest.approx(tight.information_L)
    assert (loose.p_L <= 0.01).mean() > 0.8
    assert (tight.p_L <= 0.05).mean() < 0.4


def test_the_null_is_that_of_all_labellings():
    """Of 4 documents in 2 domains there are 6 labellings: every permuted value is one of theirs, in the same proportions."""
    rng = np.random.default_rng(5)
    observed = documents(rng, [[5, 9], [7, 12]], layers=1)
    load_UE = observed.document_load_ULE[:, 0]
    values, shares = [], []
    for first in itertools.combinations(range(4), 2):
        rest = [u for u in range(4) if u not in first]
        table = np.stack([load_UE[list(first)].sum(0), load_UE[rest].sum(0)])
        joint = table / table.sum()
        values.append(stats.entropy(joint.ravel(), (joint.sum(1, keepdims=True) * joint.sum(0)).ravel(), base=2))
        shares.append(table / table.sum(1, keepdims=True))
    found = specialisation(observed, permutations=3000)
    counts = np.isclose(found.null_NL, values).sum(0)
    assert np.isclose(found.null_NL, values).any(1).all()
    assert counts == pytest.approx(1000, abs=110)  # each labelling has the value of its mirror image too
    assert found.null_mean_L == pytest.approx(np.mean(values), rel=0.03)
    assert found.null_high_L == pytest.approx(np.max(values))
    z_XE = (shares[0] - np.mean(shares, 0)) / np.std(shares, axis=0)
    assert found.z_XLE[:, 0] == pytest.approx(z_XE, abs=0.1)
    assert found.p_L == pytest.approx((np.array(values) >= values[0] - 1e-9).mean(), abs=0.04)


def test_names_and_pieces_do_not_matter(monkeypatch):
    observed = documents(np.random.default_rng(6), [[9] * 4] * 3)
    found, order_E = specialisation(observed, 50), np.array([3, 0, 5, 1, 4, 2])
    renamed = replace(
        observed, load_XLE=observed.load_XLE[..., order_E], document_load_ULE=observed.document_load_ULE[..., order_E]
    )
    monkeypatch.setattr(module, "CELLS", 100)  # two permutations at a time
    other = specialisation(renamed, 50)
    for name in ("information_L", "corrected_L", "null_NL", "p_L", "domain_entropy_L"):
        assert getattr(other, name) == pytest.approx(getattr(found, name)), name
    for name in ("share_XLE", "lift_XLE", "z_XLE"):
        assert getattr(other, name) == pytest.approx(getattr(found, name)[..., order_E], nan_ok=True), name
    assert np.array_equal(specialisation(observed, 50).null_NL, found.null_NL)
    assert not np.array_equal(specialisation(observed, 50, seed=1).null_NL, found.null_NL)


def test_one_domain_says_nothing():
    found = specialisation(documents(np.random.default_rng(7), [[9] * 4]))
    assert found.information_L == pytest.approx([0, 0], abs=1e-12)
    assert found.p_L.tolist() == [1, 1]
    assert not found.above_null_L.any()
    assert found.lift_XLE[found.share_XLE > 0] == pytest.approx(1)


def test_too_few_documents_prove_nothing():
    """A document a domain, an expert a domain: every labelling is the same but for names."""
    domain_T = np.repeat([0, 1], 10)
    found = specialisation(observe(domain_T[:, None, None], domain_T, document_T=domain_T, experts=2))
    assert found.information_L == pytest.approx(1)
    assert found.p_L.tolist() == [1]
    assert not found.above_null_L.any()


def test_what_has_no_assignments_has_no_share():
    """A domain without tokens, and a layer that sends everything nowhere."""
    choice_TLM = np.stack([np.arange(8) % 2, np.full(8, 2)], axis=1)[..., None]
    found = specialisation(observe(choice_TLM, np.repeat([0, 1], 4), experts=2, domains=3), 20)
    assert np.isnan(found.share_XLE[2]).all()
    assert np.isnan(found.share_XLE[:, 1]).all()
    assert found.documents_X.tolist() == [4, 4, 0]
    assert found.information_L == pytest.approx([0, 0], abs=1e-12)
    assert found.p_L[1] == 1


def test_what_cannot_be_compared_is_refused():
    observed = documents(np.random.default_rng(8), [[5]] * 2)
    with pytest.raises(ConfigError, match="permutations = 0"):
        specialisation(observed, permutations=0)
    with pytest.raises(ObservationError, match="does not add up"):
        specialisation(replace(observed, load_XLE=observed.load_XLE + 1))
    with pytest.raises(ObservationError, match="no documents"):
        specialisation(replace(observed, document_domain_U=np.zeros(0, np.int32)))
