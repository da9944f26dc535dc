"""The points of a sweep: what each one changes, the run it makes, and whether the folder of that run is free for it."""

import copy
import dataclasses
import difflib
import itertools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_jax.config import Config, ConfigError, from_dict, to_dict
from moe_jax.train import run
from moe_jax.train.run_info import read_config_tree

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")
_PLACES = ("workdir", "data.cache_dir", "train.resume")  # where a run is, not what it is


@dataclass(frozen=True)
class Point:
    """One setting of a sweep: its name, which is its folder's too, and the fields it changes by dotted name."""

    name: str
    changes: Mapping[str, Any]


def read_points(sweep: Callable[[Callable[..., None]], None]) -> list[Point]:
    """The points that `sweep(add)` adds, in order; the first is the reference the others are compared with.

    `add(name, {"model.moe.num_experts": 4})` adds one; changes may be keywords too, `add(name, **changes)`.

    Raises:
      ConfigError: no point, two of one name, or a name that is no folder's name.
    """
    points: list[Point] = []

    def add(name: str, changes: Mapping[str, Any] | None = None, **more):
        if not _NAME.fullmatch(name):
            raise ConfigError(f"sweep point {name!r} cannot name a folder; use letters, digits and _ . + = -.")
        if any(point.name == name for point in points):
            raise ConfigError(f"sweep point {name!r} is added twice; give each point its own name.")
        points.append(Point(name, {**(changes or {}), **more}))

    sweep(add)
    if not points:
        raise ConfigError("sweep(add) added no point; call add(name, {field: value}) once a point.")
    return points


def choose_points(points: Sequence[Point], names: Sequence[str]) -> list[Point]:
    """The points of these names, in the order of the sweep; all of them for no names. Raises ConfigError for an unknown one."""
    known = [point.name for point in points]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."
            raise ConfigError(f"--points: {name!r} is not a point of the sweep; {hint}")
    return [point for point in points if not names or point.name in names]


def point_tree(tree: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """The nested config `tree` with the changes of `point`.

    Raises:
      ConfigError: a field that `tree` does not have.
    """
    tree = copy.deepcopy(dict(tree))
    for path, value in point.changes.items():
        node, (*groups, field) = tree, path.split(".")
        for name in (*groups, field):
            if not isinstance(node, Mapping) or name not in node:
                near = difflib.get_close_matches(name, list(node) if isinstance(node, Mapping) else [], n=1)
                hint = f"did you mean {near[0]!r}?" if near else "configs/base.py has them all."
                raise ConfigError(f"sweep point {point.name!r}: the config has no field {path!r}; {hint}")
            parent, node = node, node[name]
        parent[field] = value
    return tree


def point_config(tree: Mapping[str, Any], point: Point) -> Config:
    """The validated config of `point_tree`, router options and schedule included. Raises ConfigError, which names the point."""
    changed = point_tree(tree, point)
    try:
        config = from_dict(changed)
        run.check(config)
    except ConfigError as refusal:
        raise ConfigError(f"sweep point {point.name!r}: {refusal}") from refusal
    return config


def point_configs(tree: Mapping[str, Any], points: Sequence[Point]) -> dict[str, Config]:
    """`point_config` of every point by name. Raises ConfigError, also for two points that are the same run."""
    configs = {point.name: point_config(tree, point) for point in points}
    for first, second in itertools.combinations(points, 2):
        if configs[first.name] == configs[second.name]:
            raise ConfigError(f"sweep points {first.name!r} and {second.name!r} are the same run; change or leave out one.")
    return configs


def run_folder(workdir: str | pathlib.Path, point: Point, seed: int) -> pathlib.Path:
    """Where a point's run with a seed is."""
    return pathlib.Path(workdir) / point.name / f"seed_{seed}"


def with_seed(config: Config, workdir: str | pathlib.Path, point: Point, seed: int) -> Config:
    """The config of one run."""
    train = dataclasses.replace(config.train, seed=seed)
    return dataclasses.replace(config, train=train, workdir=str(run_folder(workdir, point, seed)))


def changed_fields(config: Config, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `config` that differ from the nested config `tree`, by dotted name: what the command line must say."""
    then = flatten(to_dict(from_dict(tree)))
    # another family's options are not in a Config; the tree has every family's
    options = {name: value for name, value in flatten(tree).items() if name not in then}
    then |= options
    return {name: value for name, value in flatten(to_dict(config)).items() if value != then[name]}


def flag_words(config_file: str, changes: Mapping[str, Any]) -> list[str]:
    """The arguments of launch.train that make `changes` to the config of a file, as ml_collections reads them."""
    shown = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    return [f"--config={config_file}", *(f"--config.{name}={value}" for name, value in shown.items())]


def refuse_other_run(config: Config) -> None:
    """Refuses a `workdir` that holds a run of another config.

    Raises:
      ConfigError: names the first field that differs.
    """
    if not (pathlib.Path(config.workdir) / "config.json").is_file():
        return
    then, now = flatten(read_config_tree(config.workdir)), flatten(to_dict(config))
    ignored = (*_PLACES, *(() if config.model.vocab_size else ("model.vocab_size",)))  # 0 was filled in
    for name, value in now.items():
        if name in then and name not in ignored and then[name] != value:
            raise ConfigError(
                f"{config.workdir} holds a run with {name} = {then[name]!r}, and the sweep now says {value!r};"
                " set it back, or choose another --workdir."
            )
    if absent := sorted(name for name in then if name not in now):
        raise ConfigError(
            f"{config.workdir} holds a run with {absent[0]} = {then[absent[0]]!r}, which the sweep now does not have;"
            " choose another --workdir."
        )


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; tuples as lists, so that a config is equal to the same one read from JSON."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}{name}.")
        else:
            flat[f"{path}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat
