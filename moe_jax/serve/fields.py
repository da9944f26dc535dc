"""The fields of a JSON body, each of the type and in the range it must be, or refused in a sentence."""

import difflib
import json
import math
from collections.abc import Collection
from typing import Any

from moe_jax.serve.refusals import ApiError, show

NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false", list: "a list", dict: "an object"}


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds. Raises ApiError."""
    try:
        tree = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(f"the body is not JSON that can be read: {why}; send one JSON object.") from error
    if not isinstance(tree, dict):
        raise ApiError(f'the body is {show(tree)}, not a JSON object; send {{"model": ..., ...}}.')
    return tree


class Fields:
    """A JSON object; null is as good as absent.

    Args:
      tree: the object.
      known: fields that are read.
      ignored: fields that are not, as they do not change the answer.
      fixed: fields that are not supported, with the values at which they change nothing.

    Raises:
      ApiError: another field, or a fixed one at another value.
    """

    def __init__(self, tree: dict[str, Any], known: Collection[str], ignored: Collection[str], fixed: dict[str, tuple]):
        self._tree = {name: value for name, value in tree.items() if value is not None}
        for name, value in self._tree.items():
            if name in fixed and value not in fixed[name]:
                usual = f", only {show(fixed[name][0])} is" if fixed[name] else ""
                raise ApiError(
                    f"{name} = {show(value)} is not supported{usual}; leave {name} out.", name, "unsupported_parameter"
                )
            if name not in known and name not in ignored and name not in fixed:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "leave it out."
                raise ApiError(f"{show(name)} is not a field that this server knows; {hint}", name, "unknown_parameter")

    def __contains__(self, name: str) -> bool:
        return name in self._tree

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """The value, which must be a `kind` (an integer is a number); `default` where it is absent. Raises ApiError."""
        value = self._tree.get(name)
        if value is None:
            return default
        right = isinstance(value, int | float) if kind is float else isinstance(value, kind)
        if not right or (isinstance(value, bool) and kind is not bool):
            raise ApiError(f"{name} = {show(value)} must be {NAMES[kind]}.", name)
        return value

    def integer(self, name: str, default: Any, least: int, most: float = math.inf, why: str = "") -> Any:
        """An integer from `least` to `most`; `why` is the reason for the range. Raises ApiError."""
        value = self.get(name, int)
        if value is None:
            return default
        if not least <= value <= most:
            allowed = least if least == most else f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ApiError(f"{name} = {show(value)} must be {allowed}{why and ', ' + why}.", name)
        return value

    def raw(self, name: str, example: str) -> Any:
        """The value as it is. Raises ApiError when it is absent."""
        if name not in self._tree:
            raise ApiError(f"{name} is missing; give {name} = {example}.", name, "missing_required_parameter")
        return self._tree[name]


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a number of JSON")
