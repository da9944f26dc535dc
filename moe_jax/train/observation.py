"""What the experts did in one evaluation, as one file: `observations/step_00000100.npz` in the run's folder.

Written by every evaluation of a run whose `train.observe` is on, by one process; `docs/observatory.md` has each array in a table. Beyond
the package's letters: `X` domains, `M` choices a token (`routing.record.choices_of`: K under token choice, else E), `N` token ids, `U`
documents, `R` rows of the sample, `P` ranges of places in a row, `C` causes of a drop. An expert's number E is nowhere.
"""

import io
import json
import os
import pathlib
import zipfile
from dataclasses import asdict, dataclass, fields

import numpy as np

from moe_jax.train.files import write_atomic
from moe_jax.validation import RefusalError

VERSION = 1
FOLDER = "observations"
CAUSES = ("capacity", "sender", "receiver")


class ObservationError(RefusalError):
    """An observation that cannot be read; the message names the file, what is wrong and the fix."""


@dataclass(frozen=True)
class About:
    """What was observed.

    Attributes:
      step: optimizer steps taken.
      workdir: of the run.
      router: name of its family.
      layers: the MoE layers' numbers in the model, from 0.
      num_experts: E.
      top_k: K.
      domains: names, the order of every axis X.
      tokenizer: its kind.
      drops: whether this model can drop at all.
      version: of the format.
    """

    step: int
    workdir: str
    router: str
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    domains: tuple[str, ...]
    tokenizer: str
    drops: bool
    version: int = VERSION


@dataclass(frozen=True, eq=False)
class Observation:
    """One evaluation. Counts are of valid tokens and of choices before any drop, exact and the same on every mesh.

    Attributes:
      about: what was observed.
      tokens_X: int64, tokens of each domain.
      load_XLE: int64, assignments to each expert.
      entropy_XL: float64, mean entropy of the router's probabilities over ln E.
      margin_XL: float64, mean of the least score of a token's chosen experts less the greatest of the others
        (`routing.losses.RoutingSums.margin_sum`); nan where the router makes no such choice.
      bias_LE: float32, the router's balancing bias; nan for routers without one.
      coactivation_LEE: int64, tokens that chose both experts; the diagonal is the load.
      vocabulary_N: int32, token ids, the most frequent first.
      vocabulary_tokens_N: int64, how often each was read.
      vocabulary_load_NLE: int64, assignments of each to each expert.
      document_U: int64, numbers of the documents in the validation split.
      document_domain_U: int32, place in `about.domains`.
      document_tokens_U: int64, tokens of each that were read.
      document_load_ULE: int64.
      place_P: int64, first place in a row of each range; the last range ends with the row.
      place_assigned_PL: int64, assignments of tokens in these places.
      place_dropped_PL: int64, of those, the ones that no expert answered.
      dropped_CL: int64, by cause: capacity, sender, receiver.
      row_domain_R: int32, of a sample of rows, the same ones in every evaluation of a run.
      row_tokens_RS: int32, token ids read.
      row_valid_RS: bool, False for padding.
      row_choice_RSLM: uint16, experts in the order of choice; E is nowhere.
      expert_norm_LE: float32, root of the sum of the squares of all of an expert's weights.
      similarity_LEE: float32, cosine of each two experts' weights, all of them end to end.
    """

    about: About
    tokens_X: np.ndarray
    load_XLE: np.ndarray
    entropy_XL: np.ndarray
    margin_XL: np.ndarray
    bias_LE: np.ndarray
    coactivation_LEE: np.ndarray
    vocabulary_N: np.ndarray
    vocabulary_tokens_N: np.ndarray
    vocabulary_load_NLE: np.ndarray
    document_U: np.ndarray
    document_domain_U: np.ndarray
    document_tokens_U: np.ndarray
    document_load_ULE: np.ndarray
    place_P: np.ndarray
    place_assigned_PL: np.ndarray
    place_dropped_PL: np.ndarray
    dropped_CL: np.ndarray
    row_domain_R: np.ndarray
    row_tokens_RS: np.ndarray
    row_valid_RS: np.ndarray
    row_choice_RSLM: np.ndarray
    expert_norm_LE: np.ndarray
    similarity_LEE: np.ndarray

    @property
    def load_LE(self) -> np.ndarray:
        """Over all domains, int64."""
        return self.load_XLE.sum(0)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file, whole or not at all."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, about=np.array(json.dumps(asdict(self.about))), **self.arrays())
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "about"}


def path_of(workdir: str | os.PathLike, step: int) -> pathlib.Path:
    """Where a run keeps the observation of a step."""
    return pathlib.Path(workdir) / FOLDER / f"step_{step:08d}.npz"


def observed_steps(workdir: str | os.PathLike) -> list[int]:
    """The steps whose observation the run in `workdir` has, ascending."""
    return sorted(int(path.stem.removeprefix("step_")) for path in (pathlib.Path(workdir) / FOLDER).glob("step_*.npz"))


def latest(workdir: str | os.PathLike, before: int) -> Observation | None:
    """The last observation of the run in `workdir` from earlier than the step `before`; None where there is none."""
    steps = [step for step in observed_steps(workdir) if step < before]
    return load(path_of(workdir, steps[-1])) if steps else None


def load(path: str | os.PathLike) -> Observation:
    """Reads an observation.

    Raises:
      ObservationError: no such file, or it is something else, damaged, or of another version.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ObservationError(f"{str(path)!r} does not exist; evaluate the run with train.observe=True.")
    try:
        with np.load(path, allow_pickle=False) as file:
            about, arrays = json.loads(str(file["about"])), {name: file[name] for name in file.files if name != "about"}
        version = about["version"]
        if version == VERSION:
            about = About(**about | {"layers": tuple(about["layers"]), "domains": tuple(about["domains"])})
            return Observation(about, **arrays)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ObservationError(f"{str(path)!r} is not an observation, or damaged ({error}); evaluate the run again.") from error
    raise ObservationError(f"{str(path)!r} is of version {version} and this is {VERSION}; evaluate the run again.")


def comparable(a: Observation, b: Observation) -> bool:
    """Whether both are of the same rows, layers and experts, so that `overlap` means something."""
    alike = a.row_choice_RSLM.shape == b.row_choice_RSLM.shape and a.about.num_experts == b.about.num_experts
    return alike and np.array_equal(a.row_tokens_RS, b.row_tokens_RS)


def overlap(now: Observation, earlier: Observation) -> np.ndarray:
    """Router saturation (OLMoE, 2409.02060, section 5.1): mean over the sample's tokens of the choices that `earlier` had too, [L].

    1 where each token has the experts it had; about K / E between two routers that have nothing to do with each other.

    Raises:
      ObservationError: they are of other rows, layers or experts.
    """
    if not comparable(now, earlier):
        raise ObservationError(
            f"steps {earlier.about.step} and {now.about.step} of {now.about.workdir!r} were observed on other rows or with other experts;"
            " compare evaluations of one run."
        )
    E, valid_RS = now.about.num_experts, now.row_valid_RS
    a_TLM, b_TLM = now.row_choice_RSLM[valid_RS], earlier.row_choice_RSLM[valid_RS]
    common_TL = ((a_TLM[..., :, None] == b_TLM[..., None, :]) & (a_TLM[..., :, None] < E)).any(-1).sum(-1)
    made_TL = np.maximum((a_TLM < E).sum(-1), (b_TLM < E).sum(-1))
    return np.where(made_TL > 0, common_TL / np.maximum(made_TL, 1), 1.0).mean(0)
