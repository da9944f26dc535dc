"""What the operands of a `scan` are, which JAX's versions write down in different ways."""

from collections.abc import Mapping
from typing import Any


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """(constants, carried arrays) of a `scan` by its equation's parameters: operands in this order, then the arrays scanned over."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()  # jax 0.12 and later
    return len(list(constants)), len(list(carry))
