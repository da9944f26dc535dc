"""Whether the experts of a run are of token ids: what the id that a token is says about where it goes.

Letters are those of `train/observation.py`: N token ids.
"""

from dataclasses import dataclass

import numpy as np

from moe_jax.analysis.specialisation_information import entropy, miller_madow, mutual_information
from moe_jax.config import ConfigError
from moe_jax.train.observation import Observation, ObservationError


@dataclass(frozen=True, eq=False)
class VocabularySpecialisation:
    """Token ids and experts, layer by layer; information in bits per assignment.

    Attributes:
      coverage: share of all tokens read that are of the ids counted; the rest is not in these figures.
      id_entropy_L: entropy of the id of an assignment, which the information cannot exceed.
      information_L: plug-in I(token id; expert).
      corrected_L: the same by Miller and Madow; too high still where most pairs of id and expert were never seen.
      null_information_L: plug-in information of routing that does not depend on the id, mean of the draws.
      top_share_L: share of an id's assignments that go to the K experts it uses most; mean over ids, weighted by assignments. 1 where
        an id alone decides. OLMoE (2409.02060, section 5.4) has the same share of single ids, for the first choice.
      null_top_share_L: of routing that does not depend on the id, mean of the draws: what few tokens an id do to `top_share_L`.
      uniform_share: K / E, `top_share_L` of even routing with endless tokens.
    """

    coverage: float
    id_entropy_L: np.ndarray
    information_L: np.ndarray
    corrected_L: np.ndarray
    null_information_L: np.ndarray
    top_share_L: np.ndarray
    null_top_share_L: np.ndarray
    uniform_share: float


@dataclass(frozen=True)
class Favourite:
    """A token id that an expert gets more often than others do.

    Attributes:
      token: the id.
      tokens: how often it was read.
      share: of these, the part that chose the expert.
      lift: share / part of all tokens that chose the expert.
    """

    token: int
    tokens: int
    share: float
    lift: float


def vocabulary_specialisation(observation: Observation, draws: int = 2, seed: int = 0) -> VocabularySpecialisation:
    """How much a token's id says about its experts. Part of it is the domain, where an id is found in one domain only.

    The null gives each id as many assignments as it has, drawn from the layer's load over these ids (a multinomial). A token's K
    choices are different experts, which a multinomial forgets: its counts vary a little more, so that `null_top_share_L` is slightly
    too high rather than too low (K = 1: exact).

    Args:
      observation: of one evaluation.
      draws: of the null. Sums over all ids vary little: few are enough.
      seed: of the draws.

    Raises:
      ConfigError: no draw.
      ObservationError: no token of the counted ids was read.
    """
    if draws < 1:
        raise ConfigError(f"draws = {draws} leaves nothing to compare with; use at least 1.")
    about, tokens = observation.about, int(observation.vocabulary_tokens_N.sum())
    if not tokens:
        raise ObservationError("the observation counts no token ids; evaluate the run again.")
    load_LNE = observation.vocabulary_load_NLE.swapaxes(0, 1)
    rng = np.random.default_rng(seed)
    null = [_independent(load_LNE, rng) for _ in range(draws)]
    return VocabularySpecialisation(
        tokens / int(observation.tokens_X.sum()),
        id_entropy_L=entropy(load_LNE.sum(-1)),
        information_L=mutual_information(load_LNE),
        corrected_L=miller_madow(load_LNE),
        null_information_L=np.mean([mutual_information(draw) for draw in null], axis=0),
        top_share_L=_top_share(load_LNE, about.top_k),
        null_top_share_L=np.mean([_top_share(draw, about.top_k) for draw in null], axis=0),
        uniform_share=about.top_k / about.num_experts,
    )


def favourites(observation: Observation, layer: int, expert: int, count: int = 10, least: int = 20) -> list[Favourite]:
    """The token ids of highest lift for an expert, the highest first; of equal ones the more frequent.

    Args:
      observation: of one evaluation.
      layer: place among the MoE layers, from 0 (`about.layers[layer]` is its number in the model).
      expert: its number.
      count: at most so many.
      least: an id read less often is left out: with few tokens high lifts come by chance.

    Returns:
      Ids that chose the expert at all; none for an expert without tokens.

    Raises:
      ConfigError: no such layer or expert.
    """
    tokens_N, (_, L, E) = observation.vocabulary_tokens_N, observation.vocabulary_load_NLE.shape
    for name, value, size in (("layer", layer, L), ("expert", expert, E)):
        if not 0 <= value < size:
            raise ConfigError(f"{name} = {value} is not in the observation, which has {size}; choose 0 to {size - 1}.")
    load_N = observation.vocabulary_load_NLE[:, layer, expert]
    overall = observation.load_LE[layer, expert] / observation.tokens_X.sum()
    kept_N = np.flatnonzero((tokens_N >= max(least, 1)) & (load_N > 0))
    share_N = load_N[kept_N] / tokens_N[kept_N]
    best_N = np.lexsort((-tokens_N[kept_N], -share_N))[:count]
    found = zip(observation.vocabulary_N[kept_N[best_N]], tokens_N[kept_N[best_N]], share_N[best_N], strict=True)
    return [Favourite(int(token), int(tokens), float(share), float(share / overall)) for token, tokens, share in found]


def _independent(load_LNE, rng):
    """Counts as many as each id has in each layer, of experts drawn from the layer's load."""
    count_LN, load_LE = load_LNE.sum(-1), load_LNE.sum(1).astype(np.float64)
    share_LE = np.where(load_LE.sum(-1, keepdims=True) > 0, load_LE, 1.0)
    return rng.multinomial(count_LN, (share_LE / share_LE.sum(-1, keepdims=True))[:, None])


def _top_share(load_LNE, top_k):
    top_LN = np.partition(load_LNE, -top_k, axis=-1)[..., -top_k:].sum(-1)
    total_L = load_LNE.sum((1, 2))
    return top_LN.sum(-1) / np.where(total_L > 0, total_L, np.nan)
