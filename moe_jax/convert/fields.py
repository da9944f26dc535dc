"""What a field of a config.json and fields of our `ModelConfig` have to do with each other, in both directions.

Every kind of relation has `read` (a config.json, and what was read so far, to values of ours by dotted path under `model`) and
`write` (a model to fields of a config.json). A family's relations are listed in `families`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

from moe_jax.config import ModelConfig, RouterConfig
from moe_jax.routing import default_options
from moe_jax.validation import CheckpointError

REQUIRED: Any = object()

Theirs = Mapping[str, Any]
Ours = Mapping[str, Any]


class Relation(Protocol):
    """One line of a family's table."""

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """Our values; `ours` are those of the lines above. Raises CheckpointError for a value that we have nothing for."""
        ...

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Their values."""
        ...


def refuse(field: str, value: Any, why: str) -> CheckpointError:
    """The error for a field of a config.json; `why` ends the sentence and says what to do."""
    return CheckpointError(f"config.json: {field} = {value!r} {why}")


def get(model: ModelConfig, path: str) -> Any:
    """The value at a dotted path; `moe.router.<family>.<option>` is the option's default where another family is in use."""
    value: Any = model
    names = path.split(".")
    for i, name in enumerate(names):
        if isinstance(value, RouterConfig) and name not in {field.name for field in fields(value)}:
            own = dict(value.options) if value.name == name else {}
            return (default_options()[name] | own)[names[i + 1]]
        value = getattr(value, name)
    return value


def nested(flat: Ours) -> dict[str, Any]:
    """Values by dotted path as nested dicts."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *groups, name = path.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[name] = value
    return tree


@dataclass(frozen=True)
class Same:
    """A field of theirs that is one of ours, or several of ours at once.

    Attributes:
      theirs: its name.
      ours: dotted paths.
      default: what it means that the field is not there; without one the field must be there.
      null: our value for null; without one null is refused.
      also: another name of the field.
    """

    theirs: str
    ours: str | tuple[str, ...]
    default: Any = REQUIRED
    null: Any = REQUIRED
    also: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Ours, always several."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def value(self, theirs: Theirs) -> Any:
        """Ours, read."""
        given = theirs.get(self.theirs, theirs.get(self.also, self.default))
        if given is REQUIRED:
            raise CheckpointError(f"config.json has no {self.theirs}; add it, the model's size or arithmetic depends on it.")
        if given is None and self.null is REQUIRED:
            raise refuse(self.theirs, given, "says nothing; give the value that the model has.")
        return self.null if given is None else given

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        return dict.fromkeys(self.paths, self.value(theirs))

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        value = get(model, self.paths[0])
        return {self.theirs: value or None if self.null is not REQUIRED else value}


@dataclass(frozen=True)
class Choice(Same):
    """A field whose values have other names here; `values` are (theirs, ours)."""

    values: tuple[tuple[Any, Any], ...] = ()

    def value(self, theirs: Theirs) -> Any:
        """Ours, read."""
        given = super().value(theirs)
        if given not in dict(self.values):
            known = ", ".join(repr(name) for name, _ in self.values)
            raise refuse(self.theirs, given, f"is not there in moe_jax, which has {known}; such a model cannot be converted.")
        return dict(self.values)[given]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`; what they have no name for is written as their first, and found out by reading it again."""
        value = get(model, self.paths[0])
        return {self.theirs: next((name for name, ours in self.values if ours == value), self.values[0][0])}


@dataclass(frozen=True)
class Only:
    """A field of theirs that may have these values alone, or not be there.

    The first is written (None: the field is left out); `why` says what another value is.
    """

    theirs: str
    values: tuple[Any, ...]
    why: str

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        if self.theirs in theirs and theirs[self.theirs] not in self.values:
            raise refuse(self.theirs, theirs[self.theirs], f"{self.why}; only {self.values[0]!r} can be converted.")
        return {}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        return {} if self.values[0] is None else {self.theirs: self.values[0]}


@dataclass(frozen=True)
class Written:
    """A field that a new config.json gets, and that is not read."""

    theirs: str
    value: Any

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        return {}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        return {self.theirs: self.value}


@dataclass(frozen=True)
class Always:
    """A value of ours that all models of the family have."""

    ours: str
    value: Any

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        return {self.ours: self.value}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        return {}
