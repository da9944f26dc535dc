"""The sum of a step's times: by hand on rates that make every figure a simple one, and on a real trace that every part is there."""

import dataclasses
import math

import pytest
import tiny

from moe_jax.analysis.jaxpr_ledger import ledger_of_jaxpr
from moe_jax.analysis.ledger import Branch, Entry
from moe_jax.config import ConfigError
from moe_jax.plan import program, roofline, topology, work
from moe_jax.sizes import flops_per_token


@pytest.fixture(scope="module")
def step():
    made = tiny.config("mixtral", "data 2 expert 4", exchange="ragged", model={"dtype": "bfloat16"})
    return program.trace(made, topology.abstract_mesh(made, topology.parse("v5p:2x2x2")))


V5P = topology.parse("v5p:2x2x2")


def slow(matrix=0.0, memory=0.0, network=0.0):
    """Seconds for each FLOP, each byte moved, each byte sent."""
    return roofline.Machine(lambda p: matrix * p.flops, lambda size, _: memory * size, lambda entry: network * entry.bytes)


EXCHANGED = Entry("all-to-all", ("expert",), "bfloat16", 30, loops=(10,))
GATHERED = Entry("all-gather", ("data",), "bfloat16", 500, loops=(2,))
SUMMED = Entry("all-reduce", ("tensor",), "bfloat16", 100)


def test_bounds_and_the_estimate_between(step):
    """FLOPs and 1,400 bytes on the wire, of which 300 + 100 are waited for."""
    done = sum(p.times * p.flops for p in work.products(step))
    predicted = roofline.predict(step, V5P, [EXCHANGED, GATHERED, SUMMED], machine=slow(matrix=600 / done, network=1.0))
    assert predicted.bounds == pytest.approx({"all": 1000, "weights": 1000 + 400, "none": 600 + 1400})
    assert predicted.seconds == predicted.bounds["weights"]
    assert predicted.bound_by == "network (data, weights)"
    assert predicted.network == {(("expert",), "exchange"): 300, (("data",), "weights"): 1000, (("tensor",), "tensor"): 100}
    hidden = roofline.predict(step, V5P, [EXCHANGED, GATHERED], machine=slow(matrix=2000 / done, network=1.0))
    assert hidden.bounds["weights"] == pytest.approx(2000 + 300)
    assert hidden.bound_by == "matrix units"
    assert roofline.predict(step, V5P, [EXCHANGED], overlap="none", machine=slow(network=1.0)).seconds == pytest.approx(300)


def test_tokens_and_utilisation(step):
    made = step.config
    tokens = made.data.batch_size * made.data.seq_len
    predicted = roofline.predict(step, V5P, [SUMMED], machine=slow(network=0.02))
    assert predicted.seconds == pytest.approx(2.0)
    assert (predicted.tokens, predicted.tokens_per_second) == (tokens, pytest.approx(tokens / 2))
    assert predicted.tokens_per_second_per_device == pytest.approx(tokens / 16)
    model_flops = 3 * flops_per_token(made.model, made.data.seq_len) * tokens
    assert predicted.mfu == pytest.approx(model_flops / 2 / 8 / 459e12)
    whole = model_flops + 3 * tokens * 2 * 2 * 4 * 4 * 3 * (
        8 - 4.5
    )  # products, FLOPs, heads, width, layers; 8 tokens seen, not 4.5
    assert predicted.mfu_whole_attention == pytest.approx(whole / 2 / 8 / 459e12)
    assert predicted.hfu == pytest.approx(sum(p.times * p.flops for p in work.products(step)) / 2 / 459e12)


def test_every_part_has_its_time_by_the_data_sheet(step):
    predicted = roofline.predict(step, V5P, ledger_of_jaxpr(step.traced.jaxpr, step.mesh))
    assert {*work.PARTS} - {"other"} <= predicted.parts.keys()
    assert {"optimizer", "dispatch", "combine", "exchange", "model"} <= predicted.parts.keys()
    for time in predicted.parts.values():
        assert max(time.matrix, time.memory) <= time.seconds * (1 + 1e-9)
        assert time.seconds <= (time.matrix + time.memory) * (1 + 1e-9)
    assert predicted.bounds["all"] <= predicted.bounds["weights"] <= predicted.bounds["none"]
    fused = roofline.predict(step, V5P, [], fused_attention=True).parts["attention scores"]
    assert fused.memory == 0 < predicted.parts["attention scores"].memory
    assert fused.matrix == predicted.parts["attention scores"].matrix


def test_of_two_branches_the_cheaper_counts(step):
    taken = dataclasses.replace(SUMMED, branch=(Branch("cond", 0),))
    other = dataclasses.replace(GATHERED, branch=(Branch("cond", 1),))
    machine = slow(matrix=1.0, network=1.0)
    assert roofline.predict(step, V5P, [taken, other], machine=machine).network == {(("tensor",), "tensor"): 100}
    assert roofline.predict(step, V5P, [other], machine=machine).network == {}  # one of the two has none


def test_a_ragged_exchange_sends_its_balanced_rows(step):
    """32 tokens a device, two choices, 16 numbers of two bytes."""
    entry = Entry("ragged-all-to-all", ("expert",), "bfloat16", 10**6, upper_bound=True)
    sizes = dict(step.mesh.shape)
    assert roofline.expected(entry, step.config, sizes).bytes == 32 * 2 * 16 * 2
    assert roofline.expected(dataclasses.replace(entry, bytes=100), step.config, sizes).bytes == 100
    assert roofline.expected(EXCHANGED, step.config, sizes) == EXCHANGED
    assert math.isclose(work.expert_rows(step.config, sizes), 64)


def test_refusals(step):
    with pytest.raises(ConfigError, match="choose one of all, weights, none"):
        roofline.predict(step, V5P, [], overlap="some")
    with pytest.raises(ConfigError, match="has no data sheet"):
        roofline.predict(step, topology.parse("cpu:8"), [])
