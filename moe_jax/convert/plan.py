"""Which tensor every array of ours is made of, layer by layer, and which arrays every tensor."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.convert.family import Family, Row
from moe_jax.convert.layout import Layout
from moe_jax.models.transformer import abstract
from moe_jax.validation import CheckpointError

PARAMS, ROUTER_STATE = "params", "router_state"
FLOATS = tuple(np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
# Arrays that must have this value where a family has no tensor for them.
CONSTANTS = {"moe.bias_E": 0.0}
EMBEDDING, HEAD = "embed.table_VD", "head.w_DV"

Source = Mapping[str, Any]  # names to arrays, or to what has `shape` and `dtype` and is read by `np.asarray`


@dataclass(frozen=True)
class Leaf:
    """One array of a model.

    Attributes:
      tree: "params" or "router_state".
      path: names of the nested dict there.
      key: the path within a layer, or within the model, with dots.
      shape: [L, ...] where layers are stacked.
      layers: which layer of the model each slice is; one None for an array of no layer.
      stacked: whether the slices are those of the first axis; else there is one, the whole array.
    """

    tree: str
    path: tuple[str, ...]
    key: str
    shape: tuple[int, ...]
    layers: tuple[int | None, ...]
    stacked: bool

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """Of one layer's."""
        return self.shape[1:] if self.stacked else self.shape

    def slice(self, array: Any, index: int) -> Any:
        """One layer's."""
        return array[index] if self.stacked else array


class Plan:
    """The tensors of a `family` for a model of ours.

    Attributes:
      leaves: every array of `models.transformer.build(model, ...)`.

    Raises:
      CheckpointError: the model has an array that the family has no tensor for.
    """

    def __init__(self, model: ModelConfig, family: Family):
        self.model, self.family = model, family
        _, params, router_state = abstract(model)
        self.leaves = (*self._leaves(PARAMS, params), *self._leaves(ROUTER_STATE, router_state))
        self._rows: dict[str, list[tuple[Row, int]]] = {}  # of every leaf: the rows that hold it, and its place there
        for row in family.rows:
            for part, key in enumerate(row.keys):
                self._rows.setdefault(key, []).append((row, part))
        for leaf in self.leaves:
            if leaf.key not in self._rows and leaf.key not in CONSTANTS:
                raise CheckpointError(
                    f"{'.'.join(leaf.path)} {leaf.shape} has no tensor in {family.architecture}; export as another architecture."
                )

    def _leaves(self, tree, state):
        for path, variable in nnx.to_flat_state(state):
            names = tuple(str(name) for name in path)
            depth, layers = self._place(names)
            yield Leaf(tree, names, ".".join(names[depth:]), tuple(variable.shape), layers, stacked=depth > 0)

    def _place(self, names):
        """(names before the path within a stacked layer, or 0; the layers of the slices)."""
        model = self.model
        every, dense = model.moe.every, model.moe.first_dense if model.num_moe_layers else model.num_layers
        if names[0] == "dense":
            return 1, tuple(range(dense))
        if names[0] == "groups":
            place = every - 1 if names[1] == "moe" else int(names[1].removeprefix("dense_"))
            return 2, tuple(range(dense + place, model.num_layers, every))
        if names[0] == "mtp":
            return 2 if names[1] == "block" else 0, (model.num_layers,)
        return 0, (None,)

    @property
    def layers(self) -> tuple[int | None, ...]:
        """All layers, with None for what is in no layer; what predicts a token further is a layer more."""
        return (None, *range(self.model.num_layers + self.model.mtp_layers))

    def read(self, leaf: Leaf, index: int, source: Source, dtype: Any = np.float32) -> np.ndarray:
        """One layer's slice of an array of ours: `leaf`'s of layer `leaf.layers[index]`."""
        if leaf.key not in self._rows:
            return np.full(leaf.slice_shape, CONSTANTS[leaf.key], dtype)
        layer = leaf.layers[index]
        row, part = self._row(leaf.key, layer, source)
        layout = self._layout(row, layer)
        out = np.empty(leaf.slice_shape, dtype)
        for e, name in enumerate(self._names(row, layer)):
            into = out[e] if "{e}" in row.name else out
            into[...] = layout.take(np.asarray(source[name]), part)
        return out

    def read_all(self, source: Source, dtype: Any = np.float32) -> tuple[dict, dict]:
        """(params, router_state) as nested dicts of stacked arrays; `dtype` is that of params, the router's state is float32."""
        trees: dict[str, dict] = {PARAMS: {}, ROUTER_STATE: {}}
        for leaf in self.leaves:
            array = np.empty(leaf.shape, dtype if leaf.tree == PARAMS else np.float32)
            for index in range(len(leaf.layers)):
                leaf.slice(array, index)[...] = self.read(leaf, index, source, array.dtype)
            tree = trees[leaf.tree]
            for name in leaf.path[:-1]:
                tree = tree.setdefault(name, {})
            tree[leaf.path[-1]] = array
        return trees[PARAMS], trees[ROUTER_STATE]

    def tensors(
        self, get: Callable[[Leaf, int], np.ndarray], like: Collection[str] = (), layers: Collection[int | None] | None = None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """The inverse of `read`: (name, array) of the checkpoint's tensors, a layer after the other.

        Args:
          get: one layer's slice of an array of ours, for (leaf, index).
          like: names of a checkpoint whose naming to follow where a family has several.
          layers: of which layers; None among them is what is in no layer. Default: all.

        Raises:
          CheckpointError: an array without a tensor has another value than the one it must have.
        """
        for layer in self.layers if layers is None else layers:
            here = self._here(layer)
            for key, (leaf, index) in here.items():
                if key not in self._rows:
                    self._check_constant(leaf, get(leaf, index))
            for row in dict.fromkeys(self._row(key, layer, like)[0] for key in here if key in self._rows):
                layout = self._layout(row, layer)
                arrays = [np.asarray(get(*here[key])) for key in row.keys]
                for e, name in enumerate(self._names(row, layer)):
                    yield name, layout.join([array[e] for array in arrays] if "{e}" in row.name else arrays)

    def expected(self, like: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
        """{name: shape} of all tensors of the checkpoint; `like` as in `tensors`."""
        shapes = {}
        for layer in self.layers:
            for key in self._here(layer):
                if key in self._rows:
                    row, _ = self._row(key, layer, like)
                    shapes |= dict.fromkeys(self._names(row, layer), self._layout(row, layer).shape)
        return shapes

    def check(self, source: Source) -> None:
        """Compares names, shapes and dtypes with what is expected; reads no tensor but a head that a tied model should not have.

        Raises:
          CheckpointError: tensors that are missing, of another shape or kind of number, or left over.
        """
        expected = self.expected(source)
        self._check_head(source)
        self._check_dtypes(source)
        if missing := [name for name in expected if name not in source]:
            raise CheckpointError(
                f"{_some(missing)} missing in the checkpoint, which config.json says is {self.family.architecture} with"
                f" {self.model.num_layers} layers; download all files, or correct config.json."
            )
        for name, shape in expected.items():
            if (found := tuple(source[name].shape)) != shape:
                raise CheckpointError(
                    f"{name} has shape {list(found)} and config.json makes it {list(shape)}; one of the two files is of another model."
                )
        ignored = [re.compile(pattern.replace("{num_layers}", str(self.model.num_layers))) for pattern in self.family.ignored]
        known = {*expected, self._name_of(HEAD)}
        left = [name for name in source if name not in known and not any(pattern.fullmatch(name) for pattern in ignored)]
        if left:
            raise CheckpointError(
                f"{_some(left)} in the checkpoint but not in {self.family.architecture} as config.json describes it; without them it would"
                " be another model."
            )

    def _check_dtypes(self, source):
        for name in source:
            if (dtype := np.dtype(source[name].dtype)) not in FLOATS or name.endswith(("_scale_inv", "_scales", "_blocks")):
                raise CheckpointError(
                    f"{name} holds {dtype.name} numbers of a quantised checkpoint; make a bfloat16 copy first (in transformers:"
                    " from_pretrained with dequantize=True in its quantization_config, then save_pretrained)."
                )

    def _check_head(self, source):
        head, table = self._name_of(HEAD), self._name_of(EMBEDDING)
        if self.model.tied_embeddings and head in source and table in source:
            if not np.array_equal(np.asarray(source[head]), np.asarray(source[table])):
                raise CheckpointError(
                    f"config.json: tie_word_embeddings = True, but {head} differs from {table}; set it to false if the head is its own."
                )
        elif not self.model.tied_embeddings and head not in source and table in source:
            raise CheckpointError(
                f"config.json: tie_word_embeddings = False, but there is no {head}; set it to true if the head is the embedding."
            )

    def _check_constant(self, leaf, array):
        value = CONSTANTS[leaf.key]
        if np.any(np.asarray(array) != value):
            raise CheckpointError(
                f"{'.'.join(leaf.path)} is not {value} everywhere, and {self.family.architecture} has no tensor for it; export as an"
                " architecture that has, or without it the model would choose other experts."
            )

    def _here(self, layer):
        """{key: (leaf, index)} of the arrays of a layer; None for those of no layer."""
        return {leaf.key: (leaf, leaf.layers.index(layer)) for leaf in self.leaves if layer in leaf.layers}

    def _row(self, key, layer, names):
        """The row to use for an array: the first whose tensor is among `names`, else the first."""
        rows = self._rows[key]
        return next((found for found in rows if self._names(found[0], layer)[0] in names), rows[0])

    def _names(self, row, layer):
        """The row's tensors of a layer, one or one for every expert."""
        name = row.name if layer is None else f"model.layers.{layer}.{row.name}"
        return [name.replace("{e}", str(e)) for e in range(self.model.moe.num_experts if "{e}" in name else 1)]

    def _name_of(self, key):
        return self._rows[key][0][0].name

    def _layout(self, row, layer):
        here = self._here(layer)
        each = "{e}" in row.name
        letters = tuple(letters[each:] for letters in row.letters)
        return Layout(row.axes, letters, tuple(here[key][0].slice_shape[each:] for key in row.keys))


def _some(names):
    """The first few names of a list as the beginning of a sentence: "a, b, c and 5 more are"."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more + (" are" if len(names) > 1 else " is")
