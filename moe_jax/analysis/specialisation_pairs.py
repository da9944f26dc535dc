"""Which experts are chosen together: co-activation (OLMoE, 2409.02060, section 5.2) against choices that do not know of each other."""

from dataclasses import dataclass

import numpy as np

from moe_jax.train.observation import Observation

ITERATIONS = 500


@dataclass(frozen=True, eq=False)
class Coactivation:
    """Pairs of experts, layer by layer.

    Attributes:
      count_LEE: int64, tokens that chose both; the diagonal is the load.
      expected_LEE: the same of a router without preferences among pairs (`coactivation`); 0 on the diagonal.
      conditional_LEE: P(j | i) at [layer, i, j], the part of the tokens of i that chose j too; nan for an expert without tokens.
      lift_LEE: count / expected: 1 without preference, 0 for two that exclude each other; nan on the diagonal and where nothing is
        expected.
    """

    count_LEE: np.ndarray
    expected_LEE: np.ndarray
    conditional_LEE: np.ndarray
    lift_LEE: np.ndarray


@dataclass(frozen=True)
class Pair:
    """Two experts of one layer.

    Attributes:
      layer: place among the MoE layers, from 0.
      experts: their numbers, the smaller first.
      tokens: that chose both.
      expected: tokens, of a router without preferences.
      lift: tokens / expected.
      conditional: P(second | first), P(first | second).
    """

    layer: int
    experts: tuple[int, int]
    tokens: int
    expected: float
    lift: float
    conditional: tuple[float, float]


def coactivation(observation: Observation) -> Coactivation:
    """How often two experts were chosen together, and how often they would be if pairs did not matter.

    Independent experts would meet in load_i * load_j / T tokens. The K choices of a token are different experts, though: an even router
    without preferences is below that by the factor (K - 1) E / (K (E - 1)), 0.57 for 2 of 8, near 1 only for many choices. So the
    expected counts are those of quasi-independence (Goodman 1968): f_ij = a_i a_j off the diagonal, with as many pairs of each expert
    as were seen. For equal loads that is the product times the factor.

    Under K = 1 there are no pairs, and no lift.
    """
    count_LEE = observation.coactivation_LEE
    load_LE, apart_EE = np.diagonal(count_LEE, axis1=1, axis2=2), ~np.eye(count_LEE.shape[1], dtype=bool)
    expected_LEE = _without_preference(np.where(apart_EE, count_LEE, 0).sum(-1).astype(np.float64)) * apart_EE
    return Coactivation(
        count_LEE,
        expected_LEE,
        conditional_LEE=count_LEE / np.where(load_LE > 0, load_LE, np.nan)[:, :, None],
        lift_LEE=count_LEE / np.where(expected_LEE > 0, expected_LEE, np.nan),
    )


def strongest_pairs(together: Coactivation, count: int = 10, least: float = 20.0) -> list[Pair]:
    """The pairs of highest lift over all layers, the highest first.

    Args:
      together: of `coactivation`.
      count: at most so many.
      least: pairs of fewer expected tokens are left out: high lifts come by chance there.
    """
    first, second = np.triu_indices(together.count_LEE.shape[1], 1)
    expected_LP, lift_LP = together.expected_LEE[:, first, second], together.lift_LEE[:, first, second]
    layer_C, pair_C = np.nonzero(expected_LP >= max(least, 1e-9))
    best = np.argsort(-lift_LP[layer_C, pair_C], kind="stable")[:count]
    return [_pair(together, int(layer_C[c]), int(first[pair_C[c]]), int(second[pair_C[c]])) for c in best]


def _pair(together, layer, i, j):
    at = layer, i, j
    conditional = float(together.conditional_LEE[at]), float(together.conditional_LEE[layer, j, i])
    return Pair(
        layer, (i, j), int(together.count_LEE[at]), float(together.expected_LEE[at]), float(together.lift_LEE[at]), conditional
    )


def _without_preference(pairs_LE):
    """f_ij = a_i a_j whose sum over j other than i is `pairs_LE`: iterative proportional fitting, a step the mean of old and new."""
    a_LE = pairs_LE / np.sqrt(np.maximum(pairs_LE.sum(-1, keepdims=True), 1e-30))
    for _ in range(ITERATIONS):
        others_LE = np.maximum(a_LE.sum(-1, keepdims=True) - a_LE, 1e-30)
        a_LE = np.sqrt(a_LE * pairs_LE / others_LE)
    return a_LE[:, :, None] * a_LE[:, None, :]
