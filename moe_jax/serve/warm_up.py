"""Everything compiled before the first client comes."""

import numpy as np

from moe_jax.models.sampling import Sampling
from moe_jax.serve.engine import Rows


def warm_up(generator: Rows) -> None:
    """Runs prompts of each power of two and of the longest, in each power of two of rows and in all, and a step.

    The expert load is set back: it is to say what clients' texts chose.
    """
    longest = generator.max_length - 1  # a prompt that one token fits behind
    for length in _sizes(longest):
        for rows in _sizes(generator.rows):
            prompts = {row: np.zeros(length, np.int32) for row in range(rows)}
            generator.admit(prompts, dict.fromkeys(prompts, Sampling()))
            if length < longest:
                generator.step()
            for row in prompts:
                generator.release(row)
    generator.expert_load[...] = 0


def _sizes(most: int) -> list[int]:
    """1, 2, 4, ... below `most`, and `most`."""
    return [2**i for i in range(most.bit_length()) if 2**i < most] + [most]
