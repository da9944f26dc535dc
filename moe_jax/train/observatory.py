"""The routing observatory in evaluation: what every token chose, counted on the host (`train/observation.py` has the file).

The evaluation step hands out the choices of a batch, whole on every device, so that all processes count alike and no mesh changes a
number. Beyond the package's letters: those of `train/observation.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moe_jax.config import Config, ModelConfig
from moe_jax.models.transformer import innermost
from moe_jax.routing import make_router, metrics
from moe_jax.routing.soft_moe import SoftMoE
from moe_jax.train.observation import CAUSES, About, Observation, overlap

PREFIX = "observe/"  # of what an evaluation step hands out
OF_BATCH = ("tokens", "segment_ids", "document_ids")  # of a batch, handed out again
SAMPLE_TOKENS = 16384  # whose choices are kept, over all domains; at least two rows of each
VOCABULARY = 1024  # most frequent token ids that are counted one by one
PLACES = 16  # ranges of places in a row


def can_observe(model: ModelConfig) -> bool:
    """Whether the model has routers that choose: a dense model has none, and a soft router mixes all tokens for every expert."""
    return model.num_moe_layers > 0 and not isinstance(make_router(model.moe.router, model.moe.num_experts), SoftMoE)


def hand_out(model: ModelConfig, batch: dict, sums, recorded: dict) -> dict[str, jax.Array]:
    """What an evaluation step returns for the observatory, by `PREFIX` and name, on every device: within jit.

    Args:
      model: of the step.
      batch: its tokens, segment_ids and document_ids, [B, S].
      sums: `train.objective.Sums`.
      recorded: `choice` and `dropped`, as `train.objective.objective` records them.
    """

    def everywhere(array):
        return jax.sharding.reshard(array, P(*(None,) * array.ndim))

    nowhere = model.moe.num_experts
    arrays = {name: batch[name] for name in OF_BATCH} | {
        "choice": jnp.minimum(recorded["choice"], nowhere).astype(np.min_scalar_type(nowhere)),
        "dropped": recorded["dropped"].astype(jnp.uint16),
    }
    routing, stats = sums.routing, sums.stats
    of_layers = {"entropy_L": routing.entropy_sum}
    if routing.margin_sum is not None:
        of_layers["margin_L"] = routing.margin_sum
    of_layers["dropped_CL"] = jnp.stack([getattr(stats, f"dropped_{cause}") for cause in CAUSES])
    return {PREFIX + name: array for name, array in (jax.tree.map(everywhere, arrays) | of_layers).items()}


def take_observed(results: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """(the results of an evaluation step without what it handed out, what it handed out by name)."""
    observed = {name.removeprefix(PREFIX): array for name, array in results.items() if name.startswith(PREFIX)}
    return {name: array for name, array in results.items() if not name.startswith(PREFIX)}, observed


@dataclass
class _OfDomain:
    """What is added up over the batches of one domain; int64 and float64."""

    load_LE: np.ndarray
    tokens: int = 0
    entropy_L: np.ndarray | float = 0.0
    margin_L: np.ndarray | float = 0.0
    documents: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)


class Observer:
    """Counts what the batches of one evaluation hand out."""

    def __init__(self, config: Config, domains: Sequence[str], frequency_V: np.ndarray):
        """
        Args:
          config: of the run.
          domains: those that will be added, in the order of the observation's axes X.
          frequency_V: how often each token id stands in the validation split: the most frequent are counted one by one.
        """
        model, self._moe = config.model, config.model.moe
        self._config, self._words_N = config, np.argsort(-frequency_V, kind="stable")[:VOCABULARY]
        self._layers = tuple(layer for layer in range(model.num_layers) if model.is_moe_layer(layer))
        L, E, S, N = len(self._layers), self._moe.num_experts, config.data.seq_len, len(self._words_N)
        self._of = {domain: _OfDomain(np.zeros((L, E), np.int64)) for domain in domains}
        self._together_LEE = np.zeros((L, E, E), np.int64)
        self._slot_V = np.full(model.vocab_size, N)
        self._slot_V[self._words_N] = np.arange(N)
        self._word_tokens_N, self._word_load_NLE = np.zeros(N, np.int64), np.zeros((N, L, E), np.int64)
        self._first_P = -(-np.arange(min(PLACES, S)) * S // min(PLACES, S))
        self._assigned_PL, self._dropped_PL = np.zeros((2, len(self._first_P), L), np.int64)
        self._dropped_CL = np.zeros((len(CAUSES), L), np.int64)

    def add(self, domain: str, observed: Mapping[str, jax.Array]) -> None:
        """Counts a batch of `domain`: what `take_observed` found."""
        got, of = jax.device_get(dict(observed)), self._of[domain]
        valid_BS = got["segment_ids"] > 0
        choice_TLM = got["choice"][valid_BS].astype(np.int64)
        of.load_LE += self._loads(np.zeros(len(choice_TLM), np.int64), choice_TLM, 1)[0]
        of.tokens += len(choice_TLM)
        of.entropy_L = of.entropy_L + got["entropy_L"].astype(np.float64)
        of.margin_L = of.margin_L + got.get("margin_L", np.full(len(self._layers), np.nan)).astype(np.float64)
        self._dropped_CL += got["dropped_CL"]
        self._add_pairs(choice_TLM)
        slot_T, N = self._slot_V[got["tokens"][valid_BS]], len(self._words_N)
        self._word_tokens_N += np.bincount(slot_T, minlength=N + 1)[:N]
        self._word_load_NLE += self._loads(slot_T, choice_TLM, N + 1)[:N]
        self._add_documents(of, got["document_ids"][valid_BS], choice_TLM)
        self._add_places(valid_BS, choice_TLM, got["dropped"][valid_BS])
        room = max(2, SAMPLE_TOKENS // len(self._of) // valid_BS.shape[1]) - len(of.rows)
        real = np.flatnonzero(valid_BS.any(1))[: max(room, 0)]
        of.rows += [(got["tokens"][row], valid_BS[row], got["choice"][row].astype(np.uint16)) for row in real]

    def finish(self, step: int, router_state: dict, weights: tuple[np.ndarray, np.ndarray], tokenizer: str) -> Observation:
        """The observation.

        Args:
          step: optimizer steps taken.
          router_state: nested dict of arrays, on the devices.
          weights: of `expert_weights`.
          tokenizer: its kind.
        """
        each, (norm_LE, similarity_LEE) = list(self._of.values()), weights
        L, E = norm_LE.shape
        tokens_X = np.array([of.tokens for of in each])
        means = (np.stack([of.entropy_L for of in each]), np.stack([of.margin_L for of in each]))
        entropy_XL, margin_XL = (sum_XL / np.maximum(tokens_X, 1)[:, None] for sum_XL in means)
        state = jax.device_get(innermost(router_state))
        documents = [(u, x, *found) for x, of in enumerate(each) for u, found in sorted(of.documents.items())]
        rows = [(x, *row) for x, of in enumerate(each) for row in of.rows]
        about = About(
            step,
            self._config.workdir,
            self._moe.router.name,
            self._layers,
            E,
            self._moe.router.top_k,
            tuple(self._of),
            tokenizer,
            self._moe.may_drop,
        )
        return Observation(
            about,
            tokens_X,
            np.stack([of.load_LE for of in each]),
            entropy_XL / np.log(E) if E > 1 else np.ones_like(entropy_XL),
            margin_XL,
            state["bias_E"][:L] if "bias_E" in state else np.full((L, E), np.nan, np.float32),
            self._together_LEE,
            self._words_N.astype(np.int32),
            self._word_tokens_N,
            self._word_load_NLE,
            *(np.array([document[i] for document in documents]) for i in range(4)),
            self._first_P,
            self._assigned_PL,
            self._dropped_PL,
            self._dropped_CL,
            *(np.array([row[i] for row in rows]) for i in range(4)),
            norm_LE,
            similarity_LEE,
        )

    def _loads(self, group_T, choice_TLM, groups):
        """Assignments of each group of tokens to each expert, [groups, L, E]."""
        E = self._moe.num_experts
        loads = []
        for choice_TM in np.moveaxis(choice_TLM, 1, 0):
            cells = group_T[:, None] * (E + 1) + choice_TM
            loads.append(np.bincount(cells.ravel(), minlength=groups * (E + 1)).reshape(groups, E + 1)[:, :E])
        return np.stack(loads, axis=1)

    def _add_pairs(self, choice_TLM):
        for layer, choice_TM in enumerate(np.moveaxis(choice_TLM, 1, 0)):
            there_TE = np.zeros((len(choice_TM), self._moe.num_experts + 1), np.float32)
            np.put_along_axis(there_TE, choice_TM, 1.0, axis=1)
            there_TE = there_TE[:, :-1]  # sums of one batch are exact in float32
            self._together_LEE[layer] += (there_TE.T @ there_TE).astype(np.int64)

    def _add_documents(self, of, document_T, choice_TLM):
        ids, place_T, tokens = np.unique(document_T, return_inverse=True, return_counts=True)
        loads = self._loads(place_T, choice_TLM, len(ids))
        for document, count, load_LE in zip(ids.tolist(), tokens.tolist(), loads, strict=True):
            before, load_before = of.documents.get(document, (0, 0))
            of.documents[document] = before + count, load_before + load_LE

    def _add_places(self, valid_BS, choice_TLM, dropped_TL):
        place_T = np.searchsorted(self._first_P, np.nonzero(valid_BS)[1], side="right") - 1
        made_TL = (choice_TLM < self._moe.num_experts).sum(-1)
        np.add.at(self._assigned_PL, place_T, made_TL)
        np.add.at(self._dropped_PL, place_T, dropped_TL.astype(np.int64))


def summary(now: Observation, before: Observation | None = None) -> dict[str, float | np.ndarray]:
    """The figures of one evaluation by their names in `metrics.jsonl` (docs/observatory.md).

    Args:
      now: the observation.
      before: that of the evaluation before, on the same rows.
    """
    load_LE, tokens_X = now.load_LE, np.maximum(now.tokens_X, 1)
    mean_L, E = np.maximum(load_LE.mean(-1), 1e-9), now.about.num_experts
    figures = {
        "eval/max_violation": load_LE.max(-1) / mean_L - 1,
        "eval/noise_floor": metrics.noise_floor(E, mean_L),
        "eval/dead_experts": (load_LE == 0).sum(-1),
        "eval/entropy": tokens_X @ now.entropy_XL / tokens_X.sum(),
        "eval/expert_norm_ratio": now.expert_norm_LE.max(-1) / np.maximum(now.expert_norm_LE.min(-1), 1e-30),
    }
    if E > 1:
        others = now.similarity_LEE[:, ~np.eye(E, dtype=bool)]
        figures["eval/expert_similarity"] = others.mean(-1)
    if not np.isnan(now.margin_XL).any():
        figures["eval/margin"] = tokens_X @ now.margin_XL / tokens_X.sum()
    if before is not None:
        figures["eval/saturation"] = overlap(now, before)
    return figures


class LoadWindow:
    """Loads of several steps added up: what a balance over a window is told from."""

    def __init__(self):
        self._load_LE = None

    def add(self, load_LE: np.ndarray) -> None:
        """Adds those of a step."""
        load_LE = np.asarray(load_LE, np.int64)
        self._load_LE = load_LE if self._load_LE is None else self._load_LE + load_LE

    def state(self) -> list[list[int]] | None:
        """The sums of a window that is open, as JSON has them: part of a checkpoint."""
        return None if self._load_LE is None else self._load_LE.tolist()

    def resume(self, state: list[list[int]] | None) -> None:
        """Goes on with the sums that `state` gave."""
        self._load_LE = None if state is None else np.array(state, np.int64)

    def close(self) -> dict[str, np.ndarray]:
        """`router/window/...` of the steps since the last call; nothing without steps. The next window begins."""
        load_LE, self._load_LE = self._load_LE, None
        if load_LE is None:
            return {}
        mean_L = np.maximum(load_LE.mean(-1), 1e-9)
        return {
            "router/window/max_violation": load_LE.max(-1) / mean_L - 1,
            "router/window/noise_floor": metrics.noise_floor(load_LE.shape[-1], mean_L),
        }
