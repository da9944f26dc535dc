"""Names of the leaves of a tree of arrays: `blocks/moe/experts/w_down_EFD`."""

from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey


def leaf_names(tree: Any) -> list[str]:
    """One name a leaf, in the order of `jax.tree.leaves`.

    Nested dicts, tuples, dataclasses and `nnx.State` all give the path joined by "/"; the `.value` of an nnx Variable adds
    nothing.

    Raises:
      ValueError: two leaves would have the same name.
    """
    names = [_join(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Two leaves of the tree are both named {twice!r}; rename one.")
    return names


def _join(path) -> str:
    if path and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    return "/".join(_part(key) for key in path)


def _part(key) -> str:
    match key:
        case DictKey(key=part) | FlattenedIndexKey(key=part) | GetAttrKey(name=part) | SequenceKey(idx=part):
            return str(part)
    raise TypeError(f"A tree with the key {key!r} has no names; use dicts, sequences and dataclasses.")
