"""How the choices of a run settle: router saturation (OLMoE, 2409.02060, section 5.1) over its evaluations."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_jax.config import ConfigError
from moe_jax.train.observation import Observation, overlap


@dataclass(frozen=True, eq=False)
class Saturation:
    """Mean share of a token's experts that it has in another evaluation too; N evaluations, in the order of their steps.

    Attributes:
      steps_N: int64.
      last_NL: share in common with the last evaluation; 1 in the last row.
      previous_NL: with the evaluation before; nan in the first row.
      uniform: K / E, of two routers that have nothing to do with each other and balanced loads.
      chance_NL: of two routers that have nothing to do with each other and the loads of this and the last evaluation,
        sum_e p_e q_e / K with p_e and q_e the parts of the tokens that chose e. A collapsed router has much in common with any other
        that has collapsed onto the same experts: a high `last_NL` means something where it is above this.
    """

    steps_N: np.ndarray
    last_NL: np.ndarray
    previous_NL: np.ndarray
    uniform: float
    chance_NL: np.ndarray


def saturation(observations: Sequence[Observation]) -> Saturation:
    """Saturation over the evaluations of one run, in any order.

    Raises:
      ConfigError: no observation.
      ObservationError: they are of other rows, layers or experts.
    """
    if not observations:
        raise ConfigError("saturation needs an observation, and there is none; evaluate the run with train.observe=True.")
    each = sorted(observations, key=lambda observation: observation.about.step)
    last, chosen = each[-1], [_chosen(observation) for observation in each]
    made_NL = np.stack([chosen_LE.sum(-1) for chosen_LE in chosen])
    with_last_NL = np.stack([chosen_LE * chosen[-1] for chosen_LE in chosen]).sum(-1)
    previous = [overlap(now, before) for before, now in itertools.pairwise(each)]
    return Saturation(
        np.array([observation.about.step for observation in each]),
        last_NL=np.stack([overlap(observation, last) for observation in each]),
        previous_NL=np.stack([np.full(made_NL.shape[1], np.nan), *previous]),
        uniform=last.about.top_k / last.about.num_experts,
        chance_NL=with_last_NL / np.maximum(np.maximum(made_NL, made_NL[-1]), 1e-9),
    )


def _chosen(observation):
    """Part of the sample's tokens that chose each expert, [L, E]."""
    choice_TLM, E = observation.row_choice_RSLM[observation.row_valid_RS], observation.about.num_experts
    counts = [np.bincount(choice_TM.ravel(), minlength=E + 1)[:E] for choice_TM in choice_TLM.swapaxes(0, 1)]
    return np.stack(counts) / max(len(choice_TLM), 1)
