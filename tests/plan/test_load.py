"""Imbalance by hand: two devices, four experts, eight tokens of two choices."""

import dataclasses

import numpy as np
import pytest
import tiny

from moe_jax.config import ConfigError, DataConfig, TrainConfig
from moe_jax.plan import load
from moe_jax.plan.roofline import PartTime, Prediction
from moe_jax.train.routing_log import Header, RoutingWriter

SIZES = {"data": 1, "expert_outer": 1, "fsdp": 1, "expert": 2, "tensor": 1}


def config(**moe):
    made = tiny.config("mixtral", **{"num_experts": 4, **moe}, model={"num_layers": 2})
    return dataclasses.replace(made, data=DataConfig(seq_len=4, batch_size=2))


def prediction(matrix=0.3, exchange=0.2):
    """A step of 1 s: experts take `matrix` of the matrix units, 0.1 s of passes over memory besides, and `exchange` on the wire."""
    parts = {"experts": PartTime(matrix, 0.1, matrix + 0.1), "head": PartTime(0.1, 0.0, 0.1)}
    network = {(("expert",), "exchange"): exchange, (("fsdp",), "weights"): 0.05}
    return Prediction(parts, network, 1.0, {}, 8, 8.0, 4.0, 0.0, 0.0, 0.0, "matrix units", ())


# Device 0 has rows 0, device 1 rows 1; experts 0 and 1 are on device 0. Each row four tokens, each token two choices, one MoE layer.
CHOICES = np.array(
    [
        [[0, 1], [0, 2], [0, 1], [0, 3]],
        [[0, 1], [1, 0], [2, 3], [4, 4]],  # the last token is padding, which goes nowhere
    ]
)


def record(path, *steps, layers=None):
    """A record of training steps, each of the choices [B, S, M] of one MoE layer; or of one step of several `layers`."""
    steps = [np.stack(layers, axis=2)] if layers else [choice_BSM[:, :, None] for choice_BSM in steps]
    with RoutingWriter(path, Header("mixtral", 4, tuple(range(steps[0].shape[2])), 2)) as writer:
        for number, choice_BSLM in enumerate(steps):
            rows = choice_BSLM.shape[:2]
            batch = {"tokens": np.zeros(rows, np.int32), "segment_ids": np.ones(rows, np.int32)}
            writer.write(f"train/{number + 1}", batch, choice_BSLM, np.ones(choice_BSLM.shape, np.float32))
    return path


def test_who_sends_what_to_whom(tmp_path):
    routed = load.from_record(record(tmp_path / "a.rec", CHOICES), config(), SIZES)
    assert routed.rows_NLGPE.tolist() == [[[[[4, 2, 1, 1], [2, 2, 1, 1]]]]]
    assert routed.tokens_NLGPQ.tolist() == [[[[[4, 2], [2, 1]]]]]
    assert routed.received_NLGQ.tolist() == [[[[10, 4]]]]


def test_layers_wait_for_the_slowest_device(tmp_path):
    """10 rows where the mean is 7: the matrix units' 0.3 s become 0.3 x 10 / 7, and nothing else changes. A second step is balanced."""
    balanced = np.array([[[0, 2], [1, 3], [0, 2], [1, 3]]] * 2)
    routed = load.from_record(record(tmp_path / "a.rec", CHOICES, balanced), config(), SIZES)
    simulation = load.simulate(prediction(), routed, config(), SIZES)
    assert simulation.slowest == pytest.approx(1 + 0.3 * 3 / 7)
    assert simulation.seconds == pytest.approx(1 + 0.3 * 3 / 7 / 2)
    assert simulation.experts_L == pytest.approx([(10 / 7 + 1) / 2])
    assert simulation.exchange_L == (1.0,)  # buffers of one size


def test_a_ragged_exchange_waits_too(tmp_path):
    """Sent once, device 0 sends 2 tokens away and receives 2; device 1 the same: no wait. One by one it is 2 rows out and 4 in."""
    routed = load.from_record(record(tmp_path / "a.rec", CHOICES), config(), SIZES)
    once = load.simulate(prediction(), routed, config(exchange="ragged"), SIZES)
    each = load.simulate(prediction(), routed, config(exchange="ragged", send_once=False), SIZES)
    assert once.exchange_L == pytest.approx([1.0])
    assert each.exchange_L == pytest.approx([4 / 3])
    assert each.seconds == pytest.approx(1 + 0.3 * 3 / 7 + 0.2 / 3)


def test_what_a_capacity_factor_buys_and_drops(tmp_path):
    """Loads 6, 4, 2, 2 of buffers of ceil(f x 8 x 2 / 4) = 4 f rows: at 1.0 two of 14 are dropped, at 1.5 none."""
    routed = load.from_record(record(tmp_path / "a.rec", CHOICES), config(), SIZES)
    buffers = load.simulate(prediction(), routed, config(), SIZES, factors=(1.0, 1.25, 1.5)).buffers
    found = {b.factor: (b.seconds, b.dropped) for b in buffers if b.name == "capacity_factor"}
    assert found[1.0] == pytest.approx((1.0, 2 / 14))
    assert found[1.25] == pytest.approx((1 + 0.3 * 0.25, 1 / 14))
    assert found[1.5] == pytest.approx((1 + 0.3 * 0.5, 0.0))


def test_what_room_between_devices_buys_and_drops(tmp_path):
    """Sent one by one, a pair's balanced rows are 8 x 2 / 2 / 2 = 4 and its most 8. At 1.0 device 0 keeps 4 of the 6 rows for itself, and
    the buffers, half as long as those of the worst case, take half the time."""
    made = config(send_once=False)
    routed = load.from_record(record(tmp_path / "a.rec", CHOICES), made, SIZES)
    buffers = load.simulate(prediction(), routed, made, SIZES, factors=(1.0, 1.5)).buffers
    found = {b.factor: (b.seconds, b.dropped) for b in buffers if b.name == "exchange_factor"}
    assert found[1.0] == pytest.approx((1 + 0.3 * (8 / 7 - 1) - 0.2 / 2, 2 / 14))
    assert found[1.5] == pytest.approx((1 + 0.3 * (10 / 7 - 1) - 0.2 / 4, 0.0))


def test_loads_alone_are_spread_over_the_senders():
    loads = np.array([[[6, 4, 2, 2]]])
    routed = load.from_loads(loads, config(), SIZES)
    assert routed.received_NLGQ.tolist() == [[[[10, 4]]]]
    assert routed.rows_NLGPE.sum(axis=3).tolist() == [[[[6, 4, 2, 2]]]]
    simulation = load.simulate(prediction(), routed, config(), SIZES)
    assert simulation.seconds == pytest.approx(1 + 0.3 * 3 / 7)


def test_microbatches_and_replicas_take_the_rows_that_training_gives_them(tmp_path):
    """Eight rows of a token, both of its choices the row's number modulo 4, in a second layer one more. With two microbatches (rows m, m +
    2, ...) over data 2 x expert 2, microbatch 0 has rows 0, 2, 4, 6, one a device."""
    sizes = SIZES | {"data": 2}
    first = np.array([[[row % 4, row % 4]] for row in range(8)])
    made = dataclasses.replace(
        config(first_dense=0), data=DataConfig(seq_len=1, batch_size=8), train=TrainConfig(accumulation=2)
    )
    routed = load.from_record(record(tmp_path / "a.rec", layers=(first, (first + 1) % 4)), made, sizes)
    rows = [[2 * (e == expert) for e in range(4)] for expert in range(4)]
    of_microbatch = [[[rows[0], rows[2]]] * 2, [[rows[1], rows[3]]] * 2]
    of_next = [[[rows[1], rows[3]]] * 2, [[rows[2], rows[0]]] * 2]
    assert routed.rows_NLGPE.tolist() == [list(pair) for pair in zip(of_microbatch, of_next, strict=True)]


def test_refusals(tmp_path):
    path = record(tmp_path / "a.rec", CHOICES)
    with pytest.raises(ConfigError, match="1 layers of 4 experts"):
        load.from_record(path, config(num_experts=8), SIZES)
    with pytest.raises(ConfigError, match="cannot be split over 1 microbatches and 4 devices"):
        load.from_record(path, config(), SIZES | {"data": 2})
    with pytest.raises(ConfigError, match=r"are not \[steps, 1, 4\]"):
        load.from_loads(np.ones((2, 3, 4)), config(), SIZES)
