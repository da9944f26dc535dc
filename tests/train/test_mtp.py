"""The prediction of the token after the next: its batch by hand, its loss document by document, and what it leaves alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from one_step import drawn
from tolerance import assert_close

from moe_jax.config import AttentionConfig
from moe_jax.layers.block import Block
from moe_jax.mesh import make_mesh, shard_batch
from moe_jax.models.transformer import build, innermost, token_ids, with_innermost
from moe_jax.train import objective as obj
from moe_jax.train.evaluate import make_eval_step
from moe_jax.train.step import make_gradient_fn

ROWS = 8


def configuration(mtp_layers=1, **model):
    # the last of every 2 layers sees all: layer 3, which comes after the three, too
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, window=2, full_every=2)
    model = dict(mtp_layers=mtp_layers, mtp_loss_weight=0.5, logit_z_loss_weight=0.0, attention=attention) | model
    return tiny.config("deepseek", model=model, balance_loss_weight=0.25, z_loss_weight=0.5)


@functools.cache
def problem():
    """(mesh, graphdef, params, router state, batch on the host, batch on the device)."""
    config = configuration()
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        graphdef, params, bias = drawn(config.model)
        bias = jax.tree.map(lambda b: b + 0.02 * (jnp.arange(b.shape[-1]) % 3), bias)
        batch = tiny.batch(rows=ROWS)
        return mesh, graphdef, params, bias, batch, shard_batch(mesh, batch)


@functools.cache
def measured():
    mesh, graphdef, params, bias, _, batch = problem()
    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(make_gradient_fn(configuration(), graphdef))(params, bias, batch, jax.random.key(0)))


def test_the_batch_by_hand():
    batch = {
        "tokens": [[5, 6, 7, 8, 9, 0]],
        "targets": [[6, 7, 8, 9, 4, 0]],
        "segment_ids": [[1, 1, 1, 2, 2, 0]],
        "loss_weights": [[1.0, 1.0, 0.0, 1.0, 1.0, 0.0]],
        "positions": [[0, 1, 2, 0, 1, 0]],
    }
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    later = obj.ahead(batch)
    # 5 knows 6 and predicts 7; 6 knows 7, whose target does not count; 7 does not know 8; 8 knows 9 and predicts 4
    np.testing.assert_array_equal(later["segment_ids"], [[1, 1, 0, 2, 0, 0]])
    np.testing.assert_array_equal(later["loss_weights"], [[1, 0, 0, 1, 0, 0]])
    counted = np.asarray(later["loss_weights"]) > 0
    np.testing.assert_array_equal(later["tokens"][counted], [6, 9])
    np.testing.assert_array_equal(later["targets"][counted], [7, 4])
    totals = obj.count(batch, with_ahead=True)
    assert (totals.targets, totals.tokens, totals.ahead.targets, totals.ahead.tokens) == (4, 5, 2, 3)
    full = jax.tree.map(lambda array: array[:, 3:5], batch)  # a row without padding: its last place has no next
    np.testing.assert_array_equal(obj.ahead(full)["segment_ids"], [[2, 0]])


def test_the_loss_document_by_document():
    """h' = W [norm(h_i); norm(Emb(t_i+1))], one block, norm, head, against t_i+2 (2412.19437, eqs. 21-24), a document at a time."""
    mesh, graphdef, params, bias, batch, on_device = problem()
    config = configuration().model
    mtp = jax.device_get(params["mtp"])
    with jax.set_mesh(mesh):
        inputs = on_device["tokens"], on_device["segment_ids"], on_device["positions"]
        model = nnx.merge(graphdef, params, bias)
        x_BSD = np.asarray(jax.jit(lambda: model.hidden(*inputs)[0])(), np.float64)
        window_free = dataclasses.replace(config, attention=dataclasses.replace(config.attention, window=0, full_every=0))
        block_def = nnx.graphdef(Block(window_free, is_moe=True, rngs=nnx.Rngs(0)))
        block_state = jax.tree.map(lambda a: a[0], (params["mtp"]["block"], bias["mtp"]["block"]))

        @jax.jit
        def block(alone):
            y_1SD, aux = nnx.merge(block_def, *block_state)(alone["x"], alone["valid"], alone["positions"])
            return y_1SD, aux.sums

        nll, targets, load_E, z_sum, tokens = 0.0, 0.0, 0, 0.0, 0
        for row, segment in [(row, segment) for row in range(ROWS) for segment in (1, 2)]:
            (places,) = np.nonzero(batch["segment_ids"][row] == segment)
            places = places[:-1]
            if not len(places):
                continue
            table_VD, w_DV = np.asarray(params["embed"]["table_VD"]), np.asarray(params["head"]["w_DV"])
            joined_SD = _rms_norm(x_BSD[row, places], mtp["hidden_norm"]) @ mtp["w_hidden_DD"]
            joined_SD += _rms_norm(table_VD[batch["tokens"][row, places + 1]], mtp["embed_norm"]) @ mtp["w_embed_DD"]
            padded_SD = np.zeros((tiny.SEQ_LEN, x_BSD.shape[-1]), np.float32)
            padded_SD[: len(places)] = joined_SD
            positions_1S = np.arange(tiny.SEQ_LEN, dtype=np.int32)[None]
            alone = {"x": padded_SD[None], "positions": positions_1S, "valid": (positions_1S < len(places)).astype(np.int32)}
            y_1SD, sums = jax.device_get(block(shard_batch(mesh, alone)))
            logits_SV = _rms_norm(y_1SD[0, : len(places)].astype(np.float64), mtp["final_norm"]) @ w_DV
            log_z_S = np.log(np.exp(logits_SV).sum(-1))
            counted_S = batch["loss_weights"][row, places + 1]
            nll += np.sum(counted_S * (log_z_S - logits_SV[np.arange(len(places)), batch["targets"][row, places + 1]]))
            targets, load_E, z_sum = targets + counted_S.sum(), load_E + sums.load_E, z_sum + sums.z_sum
            tokens += len(places)
    _, _, metrics = measured()
    assert_close(metrics["loss/mtp"], nll / targets)
    np.testing.assert_array_equal(metrics["router/load"][-1], load_E)
    assert load_E.sum() == metrics["router/experts_per_token"][-1] * tokens == 3 * tokens
    assert_close(innermost(bias)["bias_E"][-1] + 0.01 * np.sign(load_E.mean() - load_E), metrics["router/bias"][-1])


def _rms_norm(x_SD, params):
    x_SD = np.asarray(x_SD, np.float64)
    return x_SD / np.sqrt((x_SD**2).mean(-1, keepdims=True) + 1e-6) * params["scale_D"]


def test_the_terms_of_the_loss_add_up():
    """The objective is the reported means with their weights: the balance and z losses of three layers, the last over its own tokens."""
    mesh, graphdef, params, bias, _, batch = problem()
    config = configuration().model
    with jax.set_mesh(mesh):
        batch = batch | {"token_id": token_ids(batch["tokens"])}
        totals = obj.count(batch, with_ahead=True)
        loss, (sums, _) = jax.jit(functools.partial(obj.objective, graphdef=graphdef, config=config))(
            params, bias, batch, None, totals
        )
    _, _, metrics = measured()
    routing = jax.tree.map(lambda array: np.asarray(array, np.float64), sums.routing)
    tokens_L1 = routing.num_tokens[:, None]
    balance_L = 8 * np.sum(routing.load_E / (3 * tokens_L1) * routing.prob_sum_E / tokens_L1, axis=1)
    z_L = routing.z_sum / routing.num_tokens
    assert_close(loss, metrics["train/loss"] + 0.5 * metrics["loss/mtp"] + np.sum(0.25 * balance_L + 0.5 * z_L))
    assert_close(metrics["router/balance_loss"], balance_L.mean())
    assert_close(metrics["router/z_loss"], z_L.mean())
    np.testing.assert_allclose(np.sum(sums.routing.prob_sum_E, -1), sums.routing.num_tokens, rtol=1e-5)
    assert sums.routing.num_tokens.tolist() == [totals.tokens] * 2 + [totals.ahead.tokens]


def test_every_parameter_has_a_gradient_and_the_state_keeps_its_form():
    bias = problem()[3]
    gradients, next_bias, metrics = measured()
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients)) > 1e-6
    assert jax.tree.map(np.shape, next_bias) == jax.tree.map(np.shape, bias)
    np.testing.assert_array_equal(innermost(next_bias)["bias_E"], metrics["router/bias"])
    state = {name: np.arange(3 * 8.0).reshape(3, 8) for name in ("a", "b")}
    nested = {"mtp": {"block": {"a": 0, "b": 0}}, "groups": {"moe": {"b": np.zeros((2, 8)), "a": np.zeros((2, 8))}}}
    nested["mtp"]["block"] = {name: np.zeros((1, 8)) for name in "ab"}
    np.testing.assert_array_equal(innermost(with_innermost(nested, state))["b"], state["b"])


@pytest.mark.slow
def test_the_model_itself_is_the_same_without():
    """Its initial parameters, its evaluation, and where the weights of the other terms are 0, its gradients."""
    mesh, graphdef, params, bias, _, batch = problem()
    plain = configuration(mtp_layers=0).model
    with jax.set_mesh(mesh):
        plain_def, plain_params, _ = build(plain, seed=3)
        _, initial, _ = build(configuration().model, seed=3)
        assert set(initial) - set(plain_params) == {"mtp"}
        for name, tree in plain_params.items():
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(initial[name]), jax.device_get(tree))
        main = {name: params[name] for name in plain_params}, {"groups": bias["groups"]}
        bytes_V = np.ones(tiny.VOCAB, np.int32)
        expected = make_eval_step(plain, plain_def, bytes_V)(*main, batch)
        actual = make_eval_step(configuration().model, graphdef, bytes_V)(params, bias, batch)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual), jax.device_get(expected))
        step = functools.partial(jax.grad(obj.objective, has_aux=True), graphdef=graphdef)
        batch = batch | {"token_id": token_ids(batch["tokens"])}
        off = dataclasses.replace(configuration(mtp_loss_weight=0.0).model)
        off = dataclasses.replace(off, moe=dataclasses.replace(off.moe, balance_loss_weight=0.0, z_loss_weight=0.0))
        with_it, without = (
            jax.jit(functools.partial(step, config=off))(params, bias, batch, None, obj.count(batch, with_ahead=ahead))[0]
            for ahead in (True, False)
        )
        jax.tree.map(assert_close, jax.device_get(with_it), jax.device_get(without))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.device_get(with_it["mtp"])))
