"""What a family of models is: the relations of its config's fields with ours, and its tensors."""

import re
from dataclasses import dataclass

from moe_jax.convert.fields import Relation


@dataclass(frozen=True)
class Row:
    """One tensor and what of ours it holds (`layout` explains `axes`).

    Attributes:
      name: of the tensor, under `model.layers.<i>.` where the arrays are of a layer. With "{e}" there is one for every expert, and
        `axes` are those of one.
      axes: its layout.
      arrays: paths of ours within a layer, or within the model; with ":" and letters where the name says one letter twice.
    """

    name: str
    axes: str
    arrays: tuple[str, ...]

    def __init__(self, name: str, axes: str, *arrays: str):
        for key, value in (("name", name), ("axes", axes), ("arrays", arrays)):
            object.__setattr__(self, key, value)

    @property
    def keys(self) -> tuple[str, ...]:
        """The paths."""
        return tuple(array.split(":")[0] for array in self.arrays)

    @property
    def letters(self) -> tuple[str, ...]:
        """Each array's axes: the end of its name."""
        return tuple(re.split("[_:]", array)[-1] for array in self.arrays)


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
      architecture: in the `architectures` of a config.json.
      model_type: in its `model_type`.
      relations: of the fields of its config with ours; a line may use what those above it have read.
      rows: its tensors. Of several rows for one array, that is used whose tensor is there; the first is written.
      ignored: patterns of names of tensors that are there and not needed; "{num_layers}" is filled in.
    """

    architecture: str
    model_type: str
    relations: tuple[Relation, ...]
    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
