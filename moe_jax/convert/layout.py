"""How one tensor of a checkpoint holds one or more of our arrays, written as a string of axes.

Axes of the tensor stand in order, separated by commas, in the letters that our array's name ends with: "HN,D" for `wq_DHN` is a
matrix [H * N, D]. Several of our arrays in one tensor are told apart along one letter: "F|F,D" for (gate, up) is gate over up,
"F/F" has their rows in turn (gate, up, gate, up, ...). "1" is an axis of size 1.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Layout:
    """The layout `axes` of a tensor that holds arrays with these letters and shapes."""

    axes: str
    letters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def _tokens(self) -> list[list[tuple[str, ...]]]:
        """For every axis its letters in order; a letter is a tuple with one entry, or one for every array."""
        words = [re.findall(r"\w(?:[|/]\w)*", axis) for axis in self.axes.split(",")]
        return [[tuple(re.split("[|/]", word)) for word in axis] for axis in words]

    @cached_property
    def _sizes(self) -> list[list[list[int]]]:
        """As `_tokens`, with the size of each letter in place of it."""
        of_array = [
            dict(zip(text, shape, strict=True)) | {"1": 1} for text, shape in zip(self.letters, self.shapes, strict=True)
        ]
        return [[[of_array[i][letter] for i, letter in enumerate(token)] for token in axis] for axis in self._tokens]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(math.prod(sum(sizes) for sizes in axis) for axis in self._sizes)

    @cached_property
    def _split(self) -> int | None:
        """Which of all the letters in a row tells the arrays apart; None for one array."""
        flat = [token for axis in self._tokens for token in axis]
        return next((i for i, token in enumerate(flat) if len(token) > 1), None)

    def _window(self, part):
        """Index of array `part` in the tensor with an axis a letter."""
        flat = [sizes for axis in self._sizes for sizes in axis]
        window = [slice(None)] * len(flat)
        if self._split is not None:
            sizes = flat[self._split]
            start = sum(sizes[:part])
            window[self._split] = slice(part, None, len(sizes)) if "/" in self.axes else slice(start, start + sizes[part])
        return tuple(window)

    def _order(self, part):
        """Where our letters stand in the tensor with an axis a letter, then where its "1" do."""
        flat = [token[part] if len(token) > 1 else token[0] for axis in self._tokens for token in axis]
        ones = [i for i, letter in enumerate(flat) if letter == "1"]
        return [flat.index(letter) for letter in self.letters[part]] + ones

    def take(self, tensor: np.ndarray, part: int) -> np.ndarray:
        """Array `part` out of the tensor."""
        by_letter = tensor.reshape([sum(sizes) for axis in self._sizes for sizes in axis])
        return by_letter[self._window(part)].transpose(self._order(part)).reshape(self.shapes[part])

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor that holds these arrays: the inverse of `take`."""
        by_letter = np.empty([sum(sizes) for axis in self._sizes for sizes in axis], arrays[0].dtype)
        for part, array in enumerate(arrays):
            order = self._order(part)
            ones = (1,) * (len(order) - array.ndim)
            by_letter[self._window(part)] = array.reshape(*array.shape, *ones).transpose(np.argsort(order))
        return by_letter.reshape(self.shape)
