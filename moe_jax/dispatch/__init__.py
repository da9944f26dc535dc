"""Local strategies that run a list of assignments: a new one is a file and an entry in the table."""

from collections.abc import Callable

from jax.typing import DTypeLike

from moe_jax.config import MoEConfig
from moe_jax.dispatch.capacity import CapacityDispatch, Group
from moe_jax.dispatch.contract import Dispatch
from moe_jax.dispatch.dropless import DroplessDispatch
from moe_jax.dispatch.einsum import EinsumDispatch
from moe_jax.dispatch.touched import TouchedDispatch

__all__ = ["DISPATCHES", "Group", "make_dispatch"]

DISPATCHES: dict[str, Callable[[MoEConfig, Group | None, DTypeLike | None, int | None], Dispatch]] = {
    "dropless": lambda moe, group, dtype, rows: DroplessDispatch(dtype, rows),
    "capacity": lambda moe, group, dtype, rows: CapacityDispatch(moe.capacity_factor, moe.capacity_priority, group, dtype),
    "einsum": lambda moe, group, dtype, rows: EinsumDispatch(group.num_tokens if group else None, dtype),
}
FOR_INFERENCE = {"touched": lambda moe, group, dtype, rows: TouchedDispatch(dtype)}  # no gradient: no config says it


def make_dispatch(
    moe: MoEConfig, group: Group | None = None, out_dtype: DTypeLike | None = None, rows: int | None = None
) -> Dispatch:
    """The dispatch that `moe.dispatch` names.

    "dropless" and "einsum" (the oracle, for small inputs) drop nothing; "capacity" drops what does not fit. "touched" is for
    decoding (`models/decoder.py`).

    Args:
      group: who shares the experts' buffers, when the call sees only a part of it (the receiver of an exchange).
      out_dtype: dtype of y; None for x's.
      rows: most rows that "dropless" computes; None for one an assignment. The others have bounds of their own.
    """
    return (DISPATCHES | FOR_INFERENCE)[moe.dispatch](moe, group, out_dtype, rows)
