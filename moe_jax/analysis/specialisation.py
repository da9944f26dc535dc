"""Whether the experts of a run are of a domain: the information of a token's domain about its experts, against a permutation null.

Documents are the unit of the null. Tokens of one document share a topic and go to like experts, so that a shuffle of tokens would call
every set of documents specialised. What a finite sample of documents does:

- Two halves of one domain have different documents, and so some information about the experts: the mean of the null says how much.
- p is at least 1 / (1 + permutations), and no less than about one over the number of different labellings of the documents: three
  documents each in two domains have 20, and no experts whatever can give p below about 0.1 (the two domains may be swapped).
- The null is that a document's length and loads do not depend on its domain. Where only the lengths do, p is too small: of made-up
  topics that the domain does not matter to, 3 to 6 in 100 had p <= 0.05 with documents of like lengths, and 7 to 16 in 100 with some
  long ones in one domain and many short ones in another (p <= 0.01: 1 to 4 in 100). Keeping each domain's weight while permuting
  would err far more on the other side, and miss what is there.
- Layers are tested one by one: of 100 layers without specialisation one is above the 99th percentile of its null.

Beyond the package's letters those of `train/observation.py`; N is permutations here.
"""

from dataclasses import dataclass

import numpy as np

from moe_jax.analysis.specialisation_information import entropy, miller_madow, mutual_information
from moe_jax.config import ConfigError
from moe_jax.train.observation import Observation, ObservationError

CELLS = 1 << 23  # of permuted tables held at a time
QUANTILE = 0.99
ROUNDING = 1e-9  # bits; labellings that are the same but for the names of the domains are ties


@dataclass(frozen=True, eq=False)
class Specialisation:
    """Domains and experts, layer by layer; information in bits per assignment.

    Attributes:
      domains: names, the order of X.
      documents_X: int64, documents that were read.
      share_XLE: each domain's distribution over experts (OLMoE, 2409.02060, section 5.3, over K); nan for a domain without assignments.
      lift_XLE: share / share over all domains: 1 where the domain does not matter; nan for an expert without assignments.
      z_XLE: (share - mean of the null's) / their standard deviation; nan where the null does not vary.
      domain_entropy_L: entropy of the domain of an assignment, which the information cannot exceed.
      information_L: plug-in I(domain; expert).
      corrected_L: the same by Miller and Madow (`specialisation_information.miller_madow`): right for independent assignments,
        still too high for documents.
      excess_L: information_L - null_mean_L, the one to read: both are plug-in estimates from as many documents, and their biases cancel.
      null_NL: plug-in information with the documents' domains permuted.
      null_mean_L, null_high_L: its mean and 99th percentile.
      p_L: (1 + permutations with at least the observed information) / (1 + permutations) (Phipson and Smyth 2010).
      above_null_L: bool, information above `null_high_L`.
    """

    domains: tuple[str, ...]
    documents_X: np.ndarray
    share_XLE: np.ndarray
    lift_XLE: np.ndarray
    z_XLE: np.ndarray
    domain_entropy_L: np.ndarray
    information_L: np.ndarray
    corrected_L: np.ndarray
    excess_L: np.ndarray
    null_NL: np.ndarray
    null_mean_L: np.ndarray
    null_high_L: np.ndarray
    p_L: np.ndarray
    above_null_L: np.ndarray


def specialisation(observation: Observation, permutations: int = 200, seed: int = 0) -> Specialisation:
    """How much the domain of a token says about its experts.

    The information is that of the tokens that were read: a domain counts by its tokens. With one domain it is 0, and p is 1.

    Args:
      observation: of one evaluation.
      permutations: of the documents' domains.
      seed: of the permutations; the same seed, documents and NumPy give the same null.

    Raises:
      ConfigError: fewer than one permutation.
      ObservationError: no document was read, or the documents' loads are not those of the domains.
    """
    if permutations < 1:
        raise ConfigError(f"permutations = {permutations} leaves nothing to compare with; use at least 1.")
    load_XLE, domain_U, X = observation.load_XLE, observation.document_domain_U, len(observation.about.domains)
    _check(observation)
    count_LXE = load_XLE.swapaxes(0, 1)
    information_L = mutual_information(count_LXE)
    order_NU = np.argsort(np.random.default_rng(seed).random((permutations, len(domain_U))), axis=1)
    null_NL, mean_XLE, deviation_XLE = _null(observation.document_load_ULE, domain_U[order_NU], X)
    share_XLE, share_LE = _shares(load_XLE), _shares(load_XLE.sum(0))
    null_high_L = np.quantile(null_NL, QUANTILE, axis=0)
    return Specialisation(
        observation.about.domains,
        np.bincount(domain_U, minlength=X),
        share_XLE,
        lift_XLE=share_XLE / np.where(share_LE > 0, share_LE, np.nan),
        z_XLE=(share_XLE - mean_XLE) / np.where(deviation_XLE > ROUNDING, deviation_XLE, np.nan),
        domain_entropy_L=entropy(count_LXE.sum(-1)),
        information_L=information_L,
        corrected_L=miller_madow(count_LXE),
        excess_L=information_L - null_NL.mean(0),
        null_NL=null_NL,
        null_mean_L=null_NL.mean(0),
        null_high_L=null_high_L,
        p_L=(1 + (null_NL >= information_L - ROUNDING).sum(0)) / (1 + permutations),
        above_null_L=information_L > null_high_L + ROUNDING,
    )


def _check(observation):
    if not len(observation.document_domain_U):
        raise ObservationError(
            "the observation has no documents to permute; evaluate the run on a validation split with documents."
        )
    sum_XLE = np.zeros_like(observation.load_XLE)
    np.add.at(sum_XLE, observation.document_domain_U, observation.document_load_ULE)
    if not np.array_equal(sum_XLE, observation.load_XLE):
        raise ObservationError("document_load_ULE of the observation does not add up to its load_XLE; evaluate the run again.")


def _null(load_ULE, domain_NU, X):
    """(information [N, L], mean and standard deviation of the shares [X, L, E]) under these domains of the documents."""
    U, L, E = load_ULE.shape
    load_UC = load_ULE.reshape(U, -1).astype(np.float64)  # counts far below 2^53: the sums are exact
    step = max(CELLS // (X * load_UC.shape[1]), 1)
    information, sum_XLE, squares_XLE = [], 0.0, 0.0
    for begin in range(0, len(domain_NU), step):
        label_NXU = (domain_NU[begin : begin + step, None] == np.arange(X)[:, None]).astype(np.float64)
        count_NXLE = (label_NXU.reshape(-1, U) @ load_UC).reshape(-1, X, L, E)
        information.append(mutual_information(count_NXLE.swapaxes(1, 2)))
        share_NXLE = _shares(count_NXLE)
        sum_XLE, squares_XLE = sum_XLE + share_NXLE.sum(0), squares_XLE + (share_NXLE**2).sum(0)
    mean_XLE = sum_XLE / len(domain_NU)
    return np.concatenate(information), mean_XLE, np.sqrt(np.maximum(squares_XLE / len(domain_NU) - mean_XLE**2, 0.0))


def _shares(count_E):
    """Over the last axis; nan where there is nothing to share."""
    total = count_E.sum(-1, keepdims=True)
    return count_E / np.where(total > 0, total, np.nan)
