"""Checkpoints whose every number is finite: one that is not trains, samples and evaluates to nothing, and is refused when it is read."""

from typing import Any

from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.finite import not_finite
from moe_jax.validation import CheckpointError


def restore(checkpoints: Checkpoints, step: int, abstract_state: Any, part: bool = False) -> tuple[Any, dict[str, Any]]:
    """`Checkpoints.restore`, whose arguments these are, of a checkpoint without NaN and infinity. The ambient mesh is the arrays'.

    Raises:
      CheckpointError: as there; or an array is not finite. Earlier checkpoints are then read too, to name the last one that is.
    """
    state, extra = checkpoints.restore(step, abstract_state, part)
    if not (wrong := not_finite(state)):
        return state, extra
    del state
    earlier = [other for other in checkpoints.steps() if other < step]
    good = next((other for other in reversed(earlier) if _is_sound(checkpoints, other, abstract_state, part)), None)
    folder = checkpoints.folder / str(step)
    others = f" and {len(wrong) - 1} more array{'s' * (len(wrong) > 2)}" if len(wrong) > 1 else ""
    fix = f"the last good checkpoint is that of step {good}: move {folder} away to go on from it"
    if good is None:
        fix = "no earlier checkpoint is good: train again in another workdir, with a lower optimizer.learning_rate"
    raise CheckpointError(f"{wrong[0]}{others} in the checkpoint {folder} holds NaN or infinity; {fix}.")


def _is_sound(checkpoints, step, abstract_state, part):
    try:
        return not not_finite(checkpoints.restore(step, abstract_state, part)[0])
    except CheckpointError:
        return False
