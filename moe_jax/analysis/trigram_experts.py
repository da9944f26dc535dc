"""How well a token's experts tell its domain: the figure of a router to hold against that of the last three bytes (`trigram.py`).

Comparable: both see one place, know nothing of the rest of the document, have every domain as likely as every other beforehand, are
fitted on some documents and scored on others, and are given as accuracy and as bits of log2 X; both are lower bounds, of
I(domain; experts of the token) and of I(domain; last three bytes).

Not comparable: from the second layer on a router sees the context through attention, and it may know its domain from a page before.
That is what is to be found, but for a model that learnt nothing it is also more than three bytes. A token of several bytes shows a
router more than three bytes at once, so that only with a tokenizer of bytes the places are the same. Three bytes have millions of
values and are told apart by megabytes of training text; experts are few, and some thousand tokens fit them. Naive Bayes takes the K
experts of a token, and those of different layers, for independent: what they say only together it does not hear. So bits above the
trigram's show that experts know more than letters; bits below it show nothing.
"""

from dataclasses import dataclass

import numpy as np
from scipy import optimize

from moe_jax.train.observation import Observation, ObservationError

LARGEST = 10.0  # scale of the evidence


@dataclass(frozen=True, eq=False)
class ExpertScore:
    """How well experts tell the domain; each domain counts the same, whatever its tokens.

    Attributes:
      accuracy_L: from the experts of one layer: part of the tokens whose most probable domain is theirs, mean over domains.
      information_L: bits per token, `entropy_bits` less the mean of -log2 of the probability given to the true domain; a lower bound
        of I(domain; experts of the token in the layer) but for chance. Below 0 where they say nothing and documents are few.
      accuracy, information_bits: from the experts of all layers together.
      majority: 1 / X.
      entropy_bits: log2 X.
      tokens_X: int64, tokens of each domain that were scored.
    """

    accuracy_L: np.ndarray
    information_L: np.ndarray
    accuracy: float
    information_bits: float
    majority: float
    entropy_bits: float
    tokens_X: np.ndarray


def expert_classifier(observation: Observation) -> ExpertScore:
    """Naive Bayes from a token's chosen experts to its domain, fitted on half of each domain's rows and scored on the other half.

    The halves are the first and the last rows, because neighbouring rows share a document: at most one document of a domain is in
    both. Each half is scored once, and the figures are means over both. With c(x, e) choices of expert e in domain x,

        log p(x | experts) = s sum_k log p(e_k | x) + constant,    p(e | x) = (c(x, e) + 1) / (sum_e c(x, e) + E)

    The scale s makes up for experts that are not independent, each saying again what another said: it is the one with which the
    fitting half, itself cut in two halves, tells its own domains best. It changes the bits, not the accuracy.

    Raises:
      ObservationError: a domain has fewer than two rows in the sample.
    """
    folds = _halves(observation)
    results = [_fit_and_score(observation, fitted, scored) for fitted, scored in (folds, folds[::-1])]
    right_QX, surprise_QX = (np.mean([result[i] for result in results], axis=0) for i in range(2))
    X = len(observation.about.domains)
    entropy_bits = float(np.log2(X))
    accuracy_Q, information_Q = right_QX.mean(1), entropy_bits - surprise_QX.mean(1)
    return ExpertScore(
        accuracy_Q[:-1],
        information_Q[:-1],
        float(accuracy_Q[-1]),
        float(information_Q[-1]),
        1 / X,
        entropy_bits,
        sum(np.bincount(domain_T, minlength=X) for _, domain_T in folds),
    )


def _halves(observation):
    """Twice (choice_TLM, domain_T): each domain's first rows and its last."""
    domain_R, valid_RS = observation.row_domain_R, observation.row_valid_RS
    halves = [], []
    for x, domain in enumerate(observation.about.domains):
        rows = np.flatnonzero(domain_R == x)
        if len(rows) < 2:
            raise ObservationError(
                f"domain {domain!r} has {len(rows)} rows in the observation's sample, and its two halves need 2; evaluate more rows"
                " (train.eval_rows), or shorter ones (data.seq_len)."
            )
        for half, chosen in zip(halves, np.array_split(rows, 2), strict=True):
            choice_TLM = observation.row_choice_RSLM[chosen][valid_RS[chosen]]
            half.append((choice_TLM, np.full(len(choice_TLM), x)))
    return tuple(tuple(np.concatenate(parts) for parts in zip(*half, strict=True)) for half in halves)


def _fit_and_score(observation, fitted, scored):
    """(accuracy, mean -log2 probability of the truth), each [Q, X]: Q the layers and, last, all of them together."""
    X, E = len(observation.about.domains), observation.about.num_experts
    (choice_TLM, domain_T), (scored_TLM, truth_T) = fitted, scored
    inner_T = _second_half(domain_T, X)
    evidence, inner = [], []
    for layer in range(choice_TLM.shape[1]):
        there_TE = _there(choice_TLM[:, layer], E)
        evidence.append(_there(scored_TLM[:, layer], E) @ _log_share(there_TE, domain_T, X).T)
        parts = [there_TE[here_T] @ _log_share(there_TE[~here_T], domain_T[~here_T], X).T for here_T in (inner_T, ~inner_T)]
        inner.append(np.concatenate(parts))
    inner_truth_T = np.concatenate([domain_T[inner_T], domain_T[~inner_T]])
    evidence, inner = [*evidence, sum(evidence)], [*inner, sum(inner)]
    right, surprise = [], []
    for evidence_TX, inner_TX in zip(evidence, inner, strict=True):
        scale = _scale(inner_TX, inner_truth_T)
        right.append(_by_domain(evidence_TX.argmax(1) == truth_T, truth_T, X))
        surprise.append(_by_domain(_surprise(scale * evidence_TX, truth_T), truth_T, X))
    return np.stack(right), np.stack(surprise)


def _second_half(domain_T, X):
    """bool: the later half of each domain's tokens; the tokens of a domain stand together."""
    count_X = np.bincount(domain_T, minlength=X)
    place_T = np.arange(len(domain_T)) - np.repeat(np.cumsum(count_X) - count_X, count_X)
    return 2 * place_T >= count_X[domain_T]


def _there(choice_TM, E):
    """float64 [T, E]: 1 where the token goes to the expert; what goes nowhere is left out."""
    there_TE = np.zeros((len(choice_TM), E + 1))
    np.put_along_axis(there_TE, choice_TM.astype(np.int64), 1.0, axis=1)
    return there_TE[:, :-1]


def _log_share(there_TE, domain_T, X):
    """log p(e | x), [X, E], each choice counted one more."""
    count_XE = np.stack([there_TE[domain_T == x].sum(0) for x in range(X)]) + 1.0
    return np.log(count_XE / count_XE.sum(1, keepdims=True))


def _scale(evidence_TX, truth_T):
    """The factor on the evidence at which the truth surprises least, each domain counted the same: a convex function of one number."""
    X = evidence_TX.shape[1]

    def cost(scale):
        return _by_domain(_surprise(scale * evidence_TX, truth_T), truth_T, X).mean()

    return optimize.minimize_scalar(cost, bounds=(0.0, LARGEST), method="bounded", options={"xatol": 0.01}).x


def _surprise(evidence_TX, truth_T):
    """-log2 of the probability of the truth under equal priors."""
    above_TX = evidence_TX - evidence_TX.max(1, keepdims=True)
    return np.log2(np.exp(above_TX).sum(1)) - above_TX[np.arange(len(truth_T)), truth_T] / np.log(2)


def _by_domain(value_T, truth_T, X):
    return np.bincount(truth_T, weights=value_T, minlength=X) / np.maximum(np.bincount(truth_T, minlength=X), 1)
