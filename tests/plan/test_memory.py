"""The memory of a whole train step of a tiny model: arguments and what is kept by hand, the parts, the verdict, the largest batch."""

import dataclasses
import functools

import pytest
import tiny

from moe_jax.config import ConfigError, MeshConfig, RouterConfig
from moe_jax.plan import program
from moe_jax.plan.buffers import buffers
from moe_jax.plan.chips import CHIPS
from moe_jax.plan.memory import fits, largest_batch, last_that_fits, memory
from moe_jax.plan.topology import abstract_mesh, parse
from moe_jax.sizes import num_params

MESH = "fsdp 2 expert 2 tensor 2"
PARTS = ("parameters", "router_state", "optimizer", "batch", "gradients", "kept", "exchange", "working")


@functools.cache
def plan(remat="full", *, mesh=MESH, topology="h100:8", accumulation=1, rows=tiny.BATCH):
    config = tiny.config("deepseek", mesh, remat=remat, accumulation=accumulation)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows))
    topology = parse(topology)
    return memory(program.trace(config, abstract_mesh(config, topology)), topology)


def test_parts_add_up():
    found = plan()
    assert sum(getattr(found, part) for part in PARTS) == found.total
    assert all(getattr(found, part) > 0 for part in PARTS)
    assert 0 < found.kept <= found.all_kept
    assert found.gradients <= found.all_gradients == found.parameters


def test_arguments_on_one_device():
    found, config = plan(mesh="one device", topology="h100:1"), tiny.config("deepseek")
    parameters = 4 * num_params(config.model).total
    steps = 3 * 4  # the state's, and two counts of the optimizer
    assert found.parameters == parameters
    assert found.optimizer == 2 * parameters + steps
    assert found.batch == 5 * 4 * tiny.BATCH * tiny.SEQ_LEN + 8
    assert found.router_state == 4 * 2 * 8  # a bias of each of 8 experts in 2 layers
    assert found.exchange == 0
    assert found.buffers is None


def test_full_rematerialisation_keeps_the_layers_inputs():
    """On one device, where nothing comes over a wire: each layer's input, the last hidden vectors, and what loss and norm keep of them."""
    found, config = plan(mesh="one device", topology="h100:1"), tiny.config("deepseek")
    vectors = 4 * tiny.BATCH * tiny.SEQ_LEN * config.model.d_model
    logits = 4 * tiny.BATCH * tiny.SEQ_LEN * config.model.vocab_size
    inputs = config.model.num_layers * vectors
    assert inputs + logits <= found.all_kept <= inputs + 3 * vectors + 3 * logits


def test_less_rematerialisation_keeps_more():
    kept = [plan(remat).all_kept for remat in ("full", "dots", "none")]
    assert kept == sorted(set(kept))


def test_microbatches_keep_the_activations_of_one():
    assert plan(accumulation=4).all_kept < 0.5 * plan().all_kept


def test_more_rows_need_more():
    assert plan().total < plan(rows=2 * tiny.BATCH).total < 2 * plan().total


@pytest.mark.parametrize("largest", [0, 1, 2, 3, 7, 64, 65, 1000, 123456])
@pytest.mark.parametrize("bend", [0, 30])
def test_the_largest_batch_is_the_last_that_fits(largest, bend):
    """Of memory that grows by 1,000 bytes a row, and once by some rows' worth more (an exchange that gets another shape)."""
    asked = []

    def needed(rows):
        return 5000 + 1000 * rows + 1000 * bend * (rows > 5)

    def free(rows):
        asked.append(rows)
        return needed(largest) + 999 - needed(rows) if largest else -1

    assert last_that_fits(free) == largest
    assert len(asked) < 12


def test_the_largest_batch_of_a_config():
    topology, config = parse("h100:8"), tiny.config("deepseek", MESH)
    too_small = dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, memory=1000))
    assert largest_batch(config, too_small) == 0


def test_verdicts():
    found, chip = plan(), CHIPS["h100"]
    roomy = fits(found, chip)
    assert (roomy.fits, roomy.sure) == (True, True)
    just = fits(found, dataclasses.replace(chip, memory=found.total + 1))
    assert (just.fits, just.sure, just.free) == (True, False, 1)
    assert "let the compiler decide" in just.sentence
    close = fits(found, dataclasses.replace(chip, memory=found.total - 1))
    assert (close.fits, close.sure) == (False, False)
    hopeless = fits(found, dataclasses.replace(chip, memory=found.total // 2))
    assert (hopeless.fits, hopeless.sure) == (False, True)
    assert hopeless.sentence.startswith("does not fit: ")
    with pytest.raises(ConfigError, match="'cpu' has no memory of its own"):
        fits(found, CHIPS["cpu"])


@pytest.mark.parametrize("send_once", [True, False])
@pytest.mark.parametrize("exchange", ["all_to_all", "ragged"])
@pytest.mark.parametrize("sizes", [(1, 4), (2, 2)])
def test_buffers(sizes, exchange, send_once):
    mesh = MeshConfig(data=2, expert_outer=sizes[0], expert=sizes[1])
    config = tiny.config("mixtral", exchange=exchange, send_once=send_once, exchange_factor=1.0)
    found = buffers(dataclasses.replace(config, mesh=mesh), 8)
    assignments = 2 * tiny.BATCH * tiny.SEQ_LEN // 8
    assert found.expected.computed == assignments
    assert found.static.computed >= found.expected.computed
    for field in ("sent", "arrived", "computed", "bytes"):
        assert getattr(found.expected, field) <= getattr(found.static, field) <= getattr(found.worst, field), field
    if not send_once and sizes == (1, 4):
        assert found.expected.arrived == assignments
        assert found.worst.arrived == 4 * assignments


def test_buffers_of_no_exchange_and_of_lists_that_are_not_full():
    assert buffers(tiny.config("mixtral", "data 8"), 8) is None
    assert buffers(tiny.config("mixtral", "expert 8", exchange="all_gather"), 8) is None
    config = tiny.config("mixtral", "expert 8")
    moe = dataclasses.replace(config.model.moe, router=RouterConfig("remoe", 2))
    assert buffers(dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe)), 8).expected is None
