"""Routers: which experts a token goes to, and with what weight.

A family is one file with one frozen dataclass. Its first two fields are `num_experts` and `top_k`; every field after them has
a default and is an option of the family, set at `model.moe.router.<family>.<option>`. A new router is one new file and one
entry in `ROUTERS`.
"""

import difflib
import typing
from dataclasses import MISSING, fields
from typing import Any

from moe_jax.config import ConfigError, RouterConfig
from moe_jax.routing.contract import Router
from moe_jax.routing.deepseek import DeepSeek
from moe_jax.routing.mixtral import Mixtral
from moe_jax.routing.switch import Switch

ROUTERS: dict[str, type[Router]] = {"switch": Switch, "mixtral": Mixtral, "deepseek": DeepSeek}

_PATH = "model.moe.router"


def default_options() -> dict[str, dict[str, Any]]:
    """`{family: {option: default}}` for every router of the table, to fill the tree of the command line."""
    return {name: _defaults(family) for name, family in ROUTERS.items()}


def make_router(config: RouterConfig, num_experts: int) -> Router:
    """The router of `config` for `num_experts` experts.

    Raises:
      ConfigError: an unknown router or option, an option of the wrong type, or values that the family refuses.
    """
    family = _known(f"{_PATH}.name", config.name, ROUTERS)
    path = f"{_PATH}.{config.name}"
    defaults, kinds = _defaults(family), typing.get_type_hints(family)
    options = {}
    for option, value in config.options.items():
        if option not in defaults:
            near = difflib.get_close_matches(option, defaults, n=1)
            hint = f"did you mean {path}.{near[0]}?" if near else f"options there are: {', '.join(defaults)}."
            raise ConfigError(f"{path}.{option} is not an option of the router {config.name!r}; {hint}")
        options[option] = _convert(f"{path}.{option}", value, kinds[option])
    return family(num_experts, config.top_k, **options)


def _known(path, name, table):
    if name not in table:
        near = difflib.get_close_matches(str(name), table, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(table)}."
        raise ConfigError(f"{path} = {name!r} is unknown; {hint}")
    return table[name]


def _defaults(family):
    return {f.name: f.default for f in fields(family) if f.default is not MISSING}


def _convert(path, value, kind):
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path} = {value!r} is a {type(value).__name__}; give a {kind.__name__}.")
    return value
