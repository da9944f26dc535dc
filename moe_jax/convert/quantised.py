"""Quantised checkpoints, read as the bfloat16 checkpoints that their authors' own tools make of them.

fp8     a matrix in float8 and `<name>_scale_inv`, a float32 factor for every block of 128 x 128, the last ones cut off (DeepSeek-V3,
        2412.19437, section 3.3.2, and its `fp8_cast_bf16.py`; Kimi K2)
mxfp4   `<name>_blocks`, [E, out, in / 32, 16] bytes of two 4-bit numbers each, the low half first, and `<name>_scales`, [E, out, in / 32]
        powers of two (gpt-oss; OCP Microscaling Formats 1.0, sections 5.3.3 and 6.3), for a tensor `<name>` of [E, in, out]
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.convert.fields import Ours, Theirs, refuse
from moe_jax.validation import CheckpointError

FIELD, METHODS = "quantization_config", ("fp8", "mxfp4")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E8M0_BIAS = 127


class Quantisation:
    """The relation of `quantization_config`: none, or one whose tensors `dequantised` reads. What is written is not quantised."""

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        given = theirs.get(FIELD)
        if given is not None and (not isinstance(given, Mapping) or given.get("quant_method") not in METHODS):
            raise refuse(
                FIELD,
                given,
                f"is a quantised checkpoint of a kind other than {' and '.join(METHODS)}; make a bfloat16 copy first (in transformers:"
                " from_pretrained with dequantize=True in its quantization_config, then save_pretrained).",
            )
        return {}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        return {}


class _Tensor:
    """A tensor whose shape is known and whose numbers `make` works out, by `np.asarray`."""

    dtype = BFLOAT16

    def __init__(self, shape: tuple[int, ...], make: Callable[[], np.ndarray]):
        self.shape, self.make = shape, make

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.make().astype(self.dtype if dtype is None else dtype, copy=False)


def dequantised(files: Mapping[str, Any], config: Theirs) -> Mapping[str, Any]:
    """`files` themselves, or what their quantised tensors stand for, as the `quantization_config` of a config.json says.

    Each is worked out when it is asked for, by `np.asarray`, and none is kept.

    Raises:
      CheckpointError: a quantised tensor without its scales, or with scales of another shape.
    """
    how = config.get(FIELD)
    if how is None:
        return files
    return dict(_fp8(files, how) if how["quant_method"] == "fp8" else _mxfp4(files))


def _fp8(files, how):
    block = tuple(how.get("weight_block_size") or (128, 128))
    for name, stored in files.items():
        if name.endswith("_scale_inv"):
            continue
        if np.dtype(stored.dtype).itemsize > 1:
            yield name, stored
            continue
        scales = _partner(
            files, name, f"{name}_scale_inv", tuple(-(-n // size) for n, size in zip(stored.shape, block, strict=False))
        )
        yield name, _Tensor(stored.shape, lambda stored=stored, scales=scales: _scale_blocks(stored, scales, block))


def _scale_blocks(stored, scales, block):
    rows, columns = stored.shape
    scale = np.repeat(np.repeat(np.asarray(scales, np.float32), block[0], axis=0)[:rows], block[1], axis=1)[:, :columns]
    scale *= np.asarray(stored).astype(np.float32)
    return scale


def _mxfp4(files):
    for name, stored in files.items():
        if name.endswith("_scales"):
            continue
        if not name.endswith("_blocks"):
            yield name, stored
            continue
        whole = name.removesuffix("_blocks")
        scales = _partner(files, name, f"{whole}_scales", tuple(stored.shape[:-1]))
        experts, out, blocks, size = stored.shape
        shape = (experts, blocks * size * 2, out)
        yield whole, _Tensor(shape, lambda stored=stored, scales=scales: _unpack(np.asarray(stored), np.asarray(scales)))


def _unpack(blocks, scales):
    """[E, in, out] in bfloat16, which holds every product; expert by expert, as float32 is four times that."""
    experts, out, groups, size = blocks.shape
    table, unpacked = E2M1.astype(BFLOAT16), np.empty((experts, groups * size * 2, out), BFLOAT16)
    for e in range(experts):
        halves = np.stack([blocks[e] & 15, blocks[e] >> 4], axis=-1).reshape(out, groups, size * 2)
        exponents = scales[e].astype(np.int32)[..., None] - E8M0_BIAS
        unpacked[e] = np.ldexp(table[halves].astype(np.float32), exponents).reshape(out, -1).T
    return unpacked


def _partner(files, name, partner, shape):
    """The scales of `name`."""
    if partner not in files:
        raise CheckpointError(f"{name} is quantised, and its scales {partner} are missing; download all files.")
    if tuple(files[partner].shape) != shape:
        raise CheckpointError(
            f"{partner} has shape {list(files[partner].shape)} and {name} makes it {list(shape)}; one of the two is of another model."
        )
    return files[partner]
