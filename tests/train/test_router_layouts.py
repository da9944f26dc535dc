"""Layout invariance of the routers that have more than logits and a choice: own parameters, losses, state, rewards, shared batches."""

import functools

import pytest
import tiny
from one_step import assert_same, measure

from moe_jax.config import RouterConfig
from moe_jax.routing import ROUTERS

OTHERS = {
    "noisy_top_k": RouterConfig("noisy_top_k", 2),
    "remoe": RouterConfig("remoe", 2, {"l1_start": 0.1}),
    "reinforce": RouterConfig("reinforce", 2, {"entropy_weight": 0.01}),
    "zero_experts": RouterConfig("zero_experts", 3, {"expected_real": 2.0, "balance_weight": 0.1}),
    "mixture_of_depths": RouterConfig("mixture_of_depths", 2, {"capacity_fraction": 0.5}),
    "soft_moe": RouterConfig("soft_moe", 2, {}, allow_noncausal=True),
    "expert_choice": RouterConfig("expert_choice", 2, {}, allow_noncausal=True),
    "quantile": RouterConfig("deepseek", 2, {"bias_update": "quantile"}),
    "gshard": RouterConfig("gshard", 2),
    "st_moe": RouterConfig("st_moe", 2),
    "deepseek_moe": RouterConfig("deepseek_moe", 2, {"num_groups": 4, "device_loss_weight": 0.1}),
    "balanced": RouterConfig("balanced", 2),
    "all_experts": RouterConfig("all_experts", 8),
}
SHARE_THE_BATCH = {  # tokens of one pass compete: with microbatches there are other passes
    "expert_choice, batch": RouterConfig("expert_choice", 2, {"group": "batch"}, allow_noncausal=True),
    "expert_choice, position": RouterConfig("expert_choice", 2, {"group": "position"}),
    "base": RouterConfig("base", 1),
    "sinkhorn": RouterConfig("sinkhorn", 2),
}
LEARN_NOTHING = {
    "hash": RouterConfig("hash", 2),
    "random": RouterConfig("random", 2),
    "round_robin": RouterConfig("round_robin", 2),
}
FAST = ("expert_choice, position",)
SLOW = ("noisy_top_k", "remoe", "reinforce", "zero_experts", "mixture_of_depths", "base", "sinkhorn")  # the others: the matrix
PLAIN = dict(accumulation=1, remat="none")
ALONE = dict(
    model=dict(num_layers=1), first_dense=0, num_shared_experts=0
)  # one MoE layer: `test_layout_invariance.py` has depth


@pytest.fixture(autouse=True)
def known(monkeypatch):
    for name, router in (OTHERS | SHARE_THE_BATCH | LEARN_NOTHING).items():
        monkeypatch.setitem(tiny.ROUTERS, name, router)


@functools.cache
def reference(router):
    return measure(tiny.config(router, "one device", **PLAIN, **ALONE))


def compare(router, mesh, layout, **moe):
    assert_same(measure(tiny.config(router, mesh, **layout, **ALONE, **moe)), reference(router))


def tiers(names):
    def marks(name):
        return () if name in FAST else pytest.mark.slow if name in SLOW else pytest.mark.matrix

    return [pytest.param(name, marks=marks(name)) for name in names]


def test_every_family_is_somewhere():
    tested = {router.name for router in tiny.ROUTERS.values()}
    assert tested == set(ROUTERS)


@pytest.mark.parametrize("router", tiers(OTHERS))
def test_microbatches_remat_and_all_axes(router):
    compare(router, "fsdp 2 expert 2 tensor 2", dict(accumulation=4, remat="full"))
    assert reference(router)["['metric']['router/load']"].sum() > 0


@pytest.mark.parametrize("router", tiers(SHARE_THE_BATCH))
def test_who_shares_a_batch_shares_it_over_devices(router):
    compare(router, "data 2 expert 4", PLAIN)


@pytest.mark.parametrize("router", tiers(LEARN_NOTHING))
def test_routers_without_parameters(router):
    compare(router, "fsdp 2 expert 2 tensor 2", dict(accumulation=4, remat="full"))


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("router", "exchange"),
    [("remoe", "all_gather"), ("expert_choice", "ragged"), ("mixture_of_depths", "all_gather"), ("zero_experts", "ragged")],
)
def test_lists_of_any_length_over_every_exchange(router, exchange):
    compare(router, "expert 8", PLAIN, exchange=exchange)
