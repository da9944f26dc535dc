"""The rows of the buffers, against all sets of experts that a token can have."""

import itertools
from fractions import Fraction

import pytest

from moe_jax.dispatch import Group
from moe_jax.exchange.room import copies, room


@pytest.mark.parametrize("num_local", [1, 2, 4, 8])
@pytest.mark.parametrize("top_k", [1, 2, 3, 7])
def test_copies_is_the_mean_over_all_sets_of_experts(top_k, num_local):
    sets = list(itertools.combinations(range(8), top_k))
    here = [sum(expert < num_local for expert in chosen) for chosen in sets]
    group = Group(100, top_k, 8)
    assert copies(group, num_local, False) == Fraction(sum(here), len(sets))
    assert copies(group, num_local, True) == Fraction(sum(map(bool, here)), len(sets))


def test_copies_of_a_list_that_is_not_token_choice():
    assert copies(Group(10, Fraction(25, 10), 8), 2, False) == Fraction(25, 40)


@pytest.mark.parametrize(
    ("factor", "want"),
    [(0.0, 20), (1.0, 8), (1.35, 11), (0.01, 1), (100.0, 20)],  # 10 tokens x 3 choices over 4 peers: 7.5 rows
)
def test_room(factor, want):
    assert room(Fraction(15, 2), factor, 20) == want


def test_room_is_exact_arithmetic():
    assert room(Fraction(50), 1.1, 100) == 55  # in floats 1.1 * 50 is 55.00000000000001, which would round up to 56
