"""The observatory against loops in plain Python over recorded choices, two gradients, and itself on other meshes."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from one_step import drawn
from tolerance import assert_close

from moe_jax.config import Config, MoEConfig, RouterConfig
from moe_jax.mesh import make_mesh, shard_batch
from moe_jax.routing.contract import Tokens, token_choice
from moe_jax.routing.losses import score_margin
from moe_jax.train import observation, observatory
from moe_jax.train.evaluate import evaluate, make_eval_step
from moe_jax.train.expert_weights import expert_weights
from moe_jax.train.step import make_gradient_fn, routers

DOMAINS = {"code": (0, 1), "prose": (2,)}
DROPS = dict(dispatch="capacity", capacity_factor=0.6, num_shared_experts=0)


def batches(seed):
    batch = tiny.batch(seed, rows=8)
    document = 10 * seed + 2 * np.arange(8)[:, None] % 6 + batch["segment_ids"]  # documents of several rows
    return batch | {"document_ids": np.where(batch["segment_ids"] > 0, document, -1).astype(np.int32)}


@functools.cache
def observe(router="mixtral", mesh="one device", **moe):
    """(observation, evaluation's metrics, recorded choices of every batch)."""
    config = tiny.config(router, mesh, **moe)
    config = dataclasses.replace(config, workdir="runs/tiny")
    device_mesh = make_mesh(config, jax.devices()[: np.prod(config.mesh.shape)])
    with jax.set_mesh(device_mesh):
        graphdef, params, state = drawn(config.model)
        eval_step = make_eval_step(config.model, graphdef, np.ones(tiny.VOCAB, np.int32), observe=True)
        observer = observatory.Observer(config, tuple(DOMAINS), np.arange(tiny.VOCAB))
        by_domain = {domain: [batches(seed) for seed in seeds] for domain, seeds in DOMAINS.items()}
        metrics = evaluate(eval_step, params, state, device_mesh, by_domain, observer=observer)
        seen = {}
        for domain, members in by_domain.items():
            for number, batch in enumerate(members):
                results = observatory.take_observed(eval_step(params, state, shard_batch(device_mesh, batch)))[1]
                seen[domain, number] = (batch, jax.device_get(results))
        now = observer.finish(7, state, expert_weights(params), "bytes")
        weights = jax.device_get(params["groups"]["moe"]["moe"]["experts"])
    return now, metrics, seen, weights


def tokens_of(seen):
    """(domain, token id, document, place, [experts of each layer], [drops of each layer]) of every valid token."""
    for (domain, _), (batch, got) in seen.items():
        for row, place in np.argwhere(batch["segment_ids"] > 0):
            experts = [[int(e) for e in choices if e < 8] for choices in got["choice"][row, place]]
            about = int(batch["tokens"][row, place]), int(batch["document_ids"][row, place])
            yield domain, *about, int(place), experts, got["dropped"][row, place].tolist()


def test_counts_are_those_of_a_loop_over_tokens():
    now, metrics, seen, _ = observe()
    L, E = 2, 8
    load, pairs = np.zeros((2, L, E), int), np.zeros((L, E, E), int)
    words, places = np.zeros((tiny.VOCAB, L, E), int), np.zeros((tiny.SEQ_LEN, L), int)
    documents, counted = {}, [0, 0]
    for domain, word, document, place, experts, _ in tokens_of(seen):
        x = list(DOMAINS).index(domain)
        counted[x] += 1
        of_document = documents.setdefault(document, [x, 0, np.zeros((L, E), int)])
        of_document[1] += 1
        for layer, chosen in enumerate(experts):
            assert len(set(chosen)) == 2
            places[place, layer] += 2
            for expert in chosen:
                load[x, layer, expert] += 1
                words[word, layer, expert] += 1
                of_document[2][layer, expert] += 1
                for other in chosen:
                    pairs[layer, expert, other] += 1
    np.testing.assert_array_equal(now.load_XLE, load)
    np.testing.assert_array_equal(now.load_XLE.sum(0), metrics["eval/load"])
    np.testing.assert_array_equal(now.tokens_X, counted)
    np.testing.assert_array_equal(now.coactivation_LEE, pairs)
    np.testing.assert_array_equal(now.coactivation_LEE[:, range(E), range(E)], now.load_LE)
    np.testing.assert_array_equal(now.vocabulary_N, np.arange(tiny.VOCAB)[::-1])  # the most frequent first
    np.testing.assert_array_equal(now.vocabulary_load_NLE[::-1], words)
    np.testing.assert_array_equal(now.vocabulary_tokens_N[::-1] * 2, words[:, 0].sum(-1))
    np.testing.assert_array_equal(now.place_assigned_PL, places)
    assert now.document_U.tolist() == sorted(documents)
    assert now.document_domain_U.tolist() == [documents[u][0] for u in sorted(documents)]
    assert now.document_tokens_U.tolist() == [documents[u][1] for u in sorted(documents)]
    np.testing.assert_array_equal(now.document_load_ULE, [documents[u][2] for u in sorted(documents)])
    assert not now.place_dropped_PL.any()
    assert now.about == observation.About(7, "runs/tiny", "mixtral", (1, 2), 8, 2, ("code", "prose"), "bytes", False)


def test_the_sample_has_each_domain_s_first_rows():
    now, _, seen, _ = observe()
    first, rows = {}, []
    for (domain, _), (batch, got) in seen.items():
        rows += [(domain, batch["tokens"][row], got["choice"][row]) for row in range(7)]  # the last row is padding
        first.setdefault(domain, len(rows) - 7)
    assert [list(DOMAINS)[x] for x in now.row_domain_R] == [domain for domain, _, _ in rows]
    np.testing.assert_array_equal(now.row_tokens_RS, [tokens for _, tokens, _ in rows])
    np.testing.assert_array_equal(now.row_choice_RSLM, [choice for _, _, choice in rows])
    assert now.row_valid_RS.sum() == now.tokens_X.sum()


@pytest.mark.parametrize(
    ("router", "mesh", "moe"),
    [
        ("mixtral", "one device", DROPS),
        ("mixtral", "data 2 expert 4", DROPS),
        ("deepseek", "expert_outer 2 expert 4", DROPS | {"exchange_factor": 1.0, "capacity_priority": "probability"}),
        ("mixtral", "expert 8", dict(exchange_factor=1.0, send_once=False, dispatch_wire="int8")),
        ("switch", "data 2 expert 4", dict(exchange="ragged", exchange_factor=1.0, exchange_chunks=2)),
    ],
    ids=str,
)
def test_drops_by_place_add_up_to_the_drops_by_cause(router, mesh, moe):
    now, metrics, seen, _ = observe(router, mesh, **moe)
    assert now.about.drops
    np.testing.assert_array_equal(now.place_dropped_PL.sum(0), now.dropped_CL.sum(0))
    assert (now.dropped_CL.sum(0) > 0).all()
    assert metrics["eval/dropped_fraction"] == pytest.approx(now.dropped_CL.sum() / now.load_LE.sum())
    for *_, place, experts, dropped in tokens_of(seen):
        assert all(0 <= d <= len(chosen) for d, chosen in zip(dropped, experts, strict=True)), place
    by_place = np.zeros_like(now.place_dropped_PL)
    for *_, place, _, dropped in tokens_of(seen):
        by_place[place] += dropped
    np.testing.assert_array_equal(now.place_dropped_PL, by_place)


@pytest.mark.parametrize("mesh", ["data 2 expert 4", "fsdp 2 expert 2 tensor 2"])
def test_no_mesh_changes_an_observation(mesh):
    expected, actual = observe("deepseek")[0], observe("deepseek", mesh)[0]
    for name, array in expected.arrays().items():
        if array.dtype.kind == "f":
            assert_close(actual.arrays()[name], array, "float32", what=name)
        else:
            np.testing.assert_array_equal(actual.arrays()[name], array, err_msg=name)
    assert (expected.margin_XL > 0).all()
    assert (expected.entropy_XL > 0.1).all()
    assert (expected.entropy_XL < 1).all()


def test_weights_are_compared_end_to_end():
    now, _, _, weights = observe("deepseek", "fsdp 2 expert 2 tensor 2")
    flat_LEN = np.concatenate([array.reshape(*array.shape[:2], -1) for array in weights.values()], axis=-1).astype(np.float64)
    norm_LE = np.linalg.norm(flat_LEN, axis=-1)
    assert_close(now.expert_norm_LE, norm_LE)
    assert_close(now.similarity_LEE, np.einsum("LEN,LGN->LEG", flat_LEN, flat_LEN) / norm_LE[:, :, None] / norm_LE[:, None])


def test_the_gradient_ratio_is_that_of_two_gradients():
    """With one MoE layer its losses reach its router in one way alone, so their gradient is the difference of two whole ones."""
    with_losses = tiny.config("mixtral", model=dict(num_layers=2))
    router = RouterConfig("mixtral", 2)
    moe = dataclasses.replace(with_losses.model.moe, balance_loss_weight=0.0, z_loss_weight=0.0, router=router)
    without = dataclasses.replace(with_losses, model=dataclasses.replace(with_losses.model, moe=moe))
    of_both, metrics = zip(*(router_gradient(config) for config in (with_losses, without)), strict=True)
    of_losses = np.linalg.norm(of_both[0] - of_both[1])
    assert of_losses > 0
    assert_close(metrics[0]["router/gradient_ratio"], [of_losses / np.linalg.norm(of_both[1])])
    assert "router/gradient_ratio" not in metrics[1]


def router_gradient(config: Config):
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        graphdef, params, state = drawn(config.model)
        step = jax.jit(make_gradient_fn(config, graphdef, observe=True))
        gradients, _, metrics = step(params, state, shard_batch(mesh, tiny.batch()), jax.random.key(0))
    rule = observatory.make_router(config.model.moe.router, config.model.moe.num_experts)
    return np.asarray(routers(gradients, rule, config.model.d_model)["w_router_DE"]), metrics


def test_the_margin_by_hand():
    probs_TE = jnp.array([[0.1, 0.6, 0.3], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]])
    tokens = Tokens(jnp.zeros((3, 1)), jnp.array([True, True, False]))

    def margin(choices, **more):
        return score_margin(
            token_choice(jnp.array(choices), jnp.ones((3, len(choices[0]))), probs_TE, probs_TE, tokens, **more)
        )

    np.testing.assert_allclose(margin([[1], [1], [2]])[:2], [0.3, 0.2], rtol=1e-6)
    np.testing.assert_allclose(margin([[1, 2], [1, 0], [2, 0]])[:2], [0.2, -0.1], rtol=1e-5)  # the second against the scores
    score_TE = jnp.array([[-jnp.inf, 1.0, 3.0], [-jnp.inf, 2.0, -jnp.inf], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(
        margin([[2], [1], [0]], score_TE=score_TE)[:2], [2.0, 0.0]
    )  # nothing else was open to the second
    assert margin([[0, 1, 2]] * 3) is None


def test_saturation_by_hand():
    now = observe()[0]
    assert observation.overlap(now, now).tolist() == [1.0, 1.0]
    moved = now.row_choice_RSLM.copy()
    moved[:, :, 0] = moved[:, :, 0, ::-1]  # the same experts in another order
    moved[:, :, 1, 0] = 8 - 1 - moved[:, :, 1, 1]  # maybe another first expert, never the second
    kept = (moved[:, :, 1, 0] == now.row_choice_RSLM[:, :, 1, 0])[now.row_valid_RS]
    assert 0 < kept.mean() < 1
    expected = 0.5 + 0.5 * kept.mean()
    earlier = dataclasses.replace(now, row_choice_RSLM=moved)
    np.testing.assert_allclose(observation.overlap(now, earlier), [1.0, expected])
    figures = observatory.summary(now, earlier)
    np.testing.assert_allclose(figures["eval/saturation"], [1.0, expected])
    others = dataclasses.replace(now, row_tokens_RS=now.row_tokens_RS + 1)
    with pytest.raises(observation.ObservationError, match="other rows"):
        observation.overlap(now, others)


def test_the_summary_by_hand():
    now = observe()[0]
    figures = observatory.summary(now)
    load_LE = now.load_LE.astype(float)
    np.testing.assert_allclose(figures["eval/max_violation"], load_LE.max(1) / load_LE.mean(1) - 1)
    np.testing.assert_allclose(figures["eval/noise_floor"], [math.sqrt(2 * math.log(8) / load_LE.mean(1)[0])] * 2)
    share_X = now.tokens_X / now.tokens_X.sum()
    np.testing.assert_allclose(figures["eval/margin"], share_X @ now.margin_XL)
    off = [np.mean([now.similarity_LEE[layer, i, j] for i in range(8) for j in range(8) if i != j]) for layer in range(2)]
    np.testing.assert_allclose(figures["eval/expert_similarity"], off, rtol=1e-5)
    assert "eval/saturation" not in figures


def test_a_window_adds_loads_up():
    window = observatory.LoadWindow()
    assert window.close() == {}
    window.add(np.array([[4, 0], [2, 2]], np.int32))
    window.add(np.array([[0, 4], [4, 0]], np.int32))
    np.testing.assert_allclose(window.close()["router/window/max_violation"], [0.0, 0.5])
    assert window.close() == {}


def test_a_window_goes_on_from_its_state():
    """As JSON has it: what a checkpoint within a window keeps."""
    window, resumed = observatory.LoadWindow(), observatory.LoadWindow()
    assert window.state() is None
    window.add(np.array([[4, 0], [2, 2]], np.int32))
    resumed.resume(json.loads(json.dumps(window.state())))
    for each in (window, resumed):
        each.add(np.array([[0, 4], [4, 0]], np.int32))
    np.testing.assert_equal(resumed.close(), window.close())
    resumed.resume(None)
    assert resumed.close() == {}


def test_a_file_comes_back_and_a_damaged_one_is_refused(tmp_path):
    now = observe()[0]
    path = observation.path_of(tmp_path, 7)
    now.save(path)
    assert observation.observed_steps(tmp_path) == [7]
    assert observation.latest(tmp_path, 7) is None
    again = observation.latest(tmp_path, 8)
    assert again.about == now.about
    for name, array in now.arrays().items():
        assert again.arrays()[name].dtype == array.dtype
        np.testing.assert_array_equal(again.arrays()[name], array)
    with pytest.raises(observation.ObservationError, match="does not exist"):
        observation.load(tmp_path / "other.npz")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(observation.ObservationError, match="damaged"):
        observation.load(path)
    dataclasses.replace(now, about=dataclasses.replace(now.about, version=99)).save(path)
    with pytest.raises(observation.ObservationError, match="version 99"):
        observation.load(path)


@pytest.mark.parametrize(("experts", "router", "can"), [(0, "mixtral", False), (4, "soft_moe", False), (4, "mixtral", True)])
def test_what_can_be_observed(experts, router, can):
    model = tiny.config().model
    moe = MoEConfig(num_experts=experts, router=RouterConfig(router, 2, allow_noncausal=True))
    assert observatory.can_observe(dataclasses.replace(model, moe=moe)) == can
