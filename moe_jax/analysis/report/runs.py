"""Run folders, read for the report: config, versions, metrics and observations."""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moe_jax.analysis.load_plot import short_names
from moe_jax.config import Config, ConfigError, to_dict
from moe_jax.data.corpus import Corpus, load_corpus
from moe_jax.data.tokenizers import Tokenizer, load
from moe_jax.train import observation
from moe_jax.train.observation import Observation
from moe_jax.train.run import read_config
from moe_jax.validation import RefusalError

EVALUATIONS = 24  # observations that are read of a run, evenly spaced, the first and the last among them


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder.

    Attributes:
      name: to show.
      workdir: the folder.
      config: of the run.
      versions: what `versions.json` holds; empty without one.
      records: the lines of `metrics.jsonl`, steps ascending.
      observed: steps whose observation there is, ascending.
    """

    name: str
    workdir: str
    config: Config
    versions: dict
    records: Sequence[dict]
    observed: Sequence[int]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps [N], values [N, ...], float64) of the records that have `key`; null is nan, and N may be 0."""
        found = [(record["step"], record[key]) for record in self.records if key in record]
        return np.array([step for step, _ in found]), np.array([value for _, value in found], np.float64)

    def keys(self, prefix: str) -> list[str]:
        """Names of the metrics that begin with `prefix`, sorted."""
        return sorted({key for record in self.records for key in record if key.startswith(prefix)})

    @property
    def layers(self) -> list[int]:
        """Numbers of the MoE layers in the model, from 0."""
        model = self.config.model
        return [layer for layer in range(model.num_layers) if model.is_moe_layer(layer)]

    @property
    def domains(self) -> list[str]:
        """The domains that were evaluated."""
        return [
            key.removeprefix("eval/").removesuffix("/loss") for key in self.keys("eval/") if re.fullmatch("eval/.+/loss", key)
        ]

    @cached_property
    def last(self) -> Observation | None:
        """The last observation; None without one."""
        return observation.load(observation.path_of(self.workdir, self.observed[-1])) if self.observed else None

    @cached_property
    def observations(self) -> list[Observation]:
        """Up to `EVALUATIONS` of them, without what only the last is asked for (documents, vocabulary), which is most of their size."""
        return [_slim(observation.load(observation.path_of(self.workdir, step))) for step in evenly(self.observed, EVALUATIONS)]

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The run's; None where the folder has none that can be read."""
        try:
            return load(pathlib.Path(self.workdir) / "tokenizer")
        except RefusalError:
            return None

    @cached_property
    def corpus(self) -> Corpus | str:
        """The run's corpus, or the sentence why it cannot be read here, or is another one by now."""
        try:
            corpus = load_corpus(self.config.data, self.workdir)
        except (RefusalError, OSError, ValueError) as error:
            return str(error)
        return corpus


def read_runs(workdirs: Sequence[str | os.PathLike]) -> list[Run]:
    """The runs in these folders, named by what their paths do not share.

    Raises:
      ConfigError: a folder that is no run, that logged nothing, or that is given twice.
      ObservationError: a run's last observation is damaged.
    """
    folders = [os.path.normpath(workdir) for workdir in workdirs]
    if not folders:
        raise ConfigError("no run is named; give the folder of a run.")
    if len(set(folders)) < len(folders):
        raise ConfigError(f"{', '.join(folders)}: a run is named twice; name each once.")
    return [_read(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]


def differing_fields(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(field, its value in each run) of all config fields in which the runs differ, the run folder aside."""
    trees = [dict(_leaves(to_dict(run.config))) for run in runs]
    names = dict.fromkeys(name for tree in trees for name in tree if name != "workdir")
    values = [(name, [str(tree.get(name, "(none)")) for tree in trees]) for name in names]
    return [(name, cells) for name, cells in values if len(set(cells)) > 1]


def evenly(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, count).round().astype(int))]


def _read(folder, name):
    config = read_config(folder)
    path = pathlib.Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{folder} has no metrics.jsonl; give the folder of a run that was trained.")
    records = sorted(filter(None, map(_record, path.read_text(encoding="utf-8").splitlines())), key=lambda r: r["step"])
    if not records:
        raise ConfigError(f"{path} is empty; train the run until it logs a step (train.log_every).")
    versions = pathlib.Path(folder) / "versions.json"
    versions = json.loads(versions.read_text(encoding="utf-8")) if versions.is_file() else {}
    run = Run(name, folder, config, versions, records, observation.observed_steps(folder))
    _ = run.last  # one that is damaged is told before anything is drawn
    return run


def _record(line):
    """A line's figures; None for one that a kill cut short."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def _slim(seen):
    empty = np.zeros(0, np.int64)
    large = ("vocabulary_load_NLE", "document_load_ULE", "similarity_LEE", "coactivation_LEE")
    return dataclasses.replace(seen, **dict.fromkeys(large, empty))


def _leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
