"""Layouts of tensors against numpy written out."""

import numpy as np
import pytest

from moe_jax.convert.layout import Layout

H, N, M, D, E, F, R = 3, 4, 5, 7, 2, 6, 8


def _random(*shape):
    return np.random.default_rng(0).normal(size=shape)


@pytest.mark.parametrize(
    ("layout", "shape", "expected"),
    [
        (Layout("F,D", ("DF",), ((D, F),)), (F, D), [lambda w: w.T]),
        (Layout("HN,D", ("DHN",), ((D, H, N),)), (H * N, D), [lambda w: w.reshape(H, N, D).transpose(2, 0, 1)]),
        (Layout("D,HN", ("HND",), ((H, N, D),)), (D, H * N), [lambda w: w.reshape(D, H, N).transpose(1, 2, 0)]),
        (Layout("HN", ("HN",), ((H, N),)), (H * N,), [lambda w: w.reshape(H, N)]),
        (Layout("1,D", ("D",), ((D,),)), (1, D), [lambda w: w[0]]),
        (Layout("R|N,D", ("DR", "DN"), ((D, R), (D, N))), (R + N, D), [lambda w: w[:R].T, lambda w: w[R:].T]),
        (
            Layout("HN|N,R", ("RHN", "RHN"), ((R, H, N), (R, H, M))),
            (H * (N + M), R),
            [
                lambda w: w.reshape(H, N + M, R)[:, :N].transpose(2, 0, 1),
                lambda w: w.reshape(H, N + M, R)[:, N:].transpose(2, 0, 1),
            ],
        ),
        (
            Layout("E,F|F,D", ("EDF", "EDF"), ((E, D, F), (E, D, F))),
            (E, 2 * F, D),
            [lambda w: w[:, :F].transpose(0, 2, 1), lambda w: w[:, F:].transpose(0, 2, 1)],
        ),
        (
            Layout("E,D,F/F", ("EDF", "EDF"), ((E, D, F), (E, D, F))),
            (E, D, 2 * F),
            [lambda w: w[..., ::2], lambda w: w[..., 1::2]],
        ),
        (Layout("D,X|X", ("XD", "XD"), ((D, D), (D, D))), (D, 2 * D), [lambda w: w[:, :D].T, lambda w: w[:, D:].T]),
    ],
)
def test_take_and_join(layout, shape, expected):
    assert layout.shape == shape
    tensor = _random(*shape)
    parts = [layout.take(tensor, i) for i in range(len(expected))]
    for part, of_tensor in zip(parts, expected, strict=True):
        np.testing.assert_array_equal(part, of_tensor(tensor))
    np.testing.assert_array_equal(layout.join(parts), tensor)
