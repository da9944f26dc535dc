"""Mutual information of a table of counts, in bits, and what a finite sample adds to it.

The last two axes are the table: `count_XE[x, e]` is how often x and e were seen together.
"""

import numpy as np
from scipy import special


def mutual_information(count_XE: np.ndarray) -> np.ndarray:
    """The plug-in estimate: the information of the observed frequencies themselves, in bits, [...].

    0 for a table without counts. Its expectation is above the truth: with few counts a cell it finds information where there is none.
    """
    total = count_XE.sum((-2, -1))
    marginals = _sum_xlogx(count_XE.sum(-1)) + _sum_xlogx(count_XE.sum(-2))
    nats = special.xlogy(total, total) + special.xlogy(count_XE, count_XE).sum((-2, -1)) - marginals
    return np.maximum(nats, 0.0) / np.maximum(total, 1) / np.log(2)


def entropy(count_X: np.ndarray) -> np.ndarray:
    """Of the frequencies on the last axis, in bits, [...]; 0 without counts."""
    total = np.maximum(count_X.sum(-1), 1)
    return np.maximum(np.log(total) - _sum_xlogx(count_X) / total, 0.0) / np.log(2)


def miller_madow(count_XE: np.ndarray) -> np.ndarray:
    """`mutual_information` less its first-order bias, in bits, [...].

    An entropy of n independent draws is estimated too low by (m - 1) / 2n nats, m its occupied cells (Miller 1955, Note on the bias
    of information estimates; Paninski 2003, Estimation of entropy and mutual information, section 4). With I = H(x) + H(e) - H(x, e):

        I_corrected = I + (m_X + m_E - m_XE - 1) / (2 n ln 2)

    which is I - (X - 1)(E - 1) / (2 n ln 2) when every cell is occupied. It can fall a little below 0, and is not cut there: its mean
    over samples is what is near the truth. Draws that depend on each other, such as tokens of one document, leave a bias.
    """
    total = count_XE.sum((-2, -1))
    occupied_X, occupied_E = ((count_XE.sum(axis) > 0).sum(-1) for axis in (-1, -2))
    cells = (count_XE > 0).sum((-2, -1))
    correction = (occupied_X + occupied_E - cells - 1) / (2 * np.maximum(total, 1) * np.log(2))
    return mutual_information(count_XE) + np.where(total > 0, correction, 0.0)


def _sum_xlogx(count_X):
    return special.xlogy(count_X, count_X).sum(-1)
