"""What every router must do, run over the table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import router_oracle
from router_oracle import CASES
from tolerance import assert_close

from moe_jax.config import RouterConfig
from moe_jax.routing import ROUTERS, make_router
from moe_jax.routing.scores import input_jitter

T, D, E = 12, 6, 8
every_case = pytest.mark.parametrize("case", CASES)


def router_of(case, num_experts=E):
    family, top_k, options = CASES[case]
    return make_router(RouterConfig(family, top_k, options), num_experts)


@functools.partial(jax.jit, static_argnums=0)
def _route(router, *args, **noise):
    return router(*args, **noise)


def route(router, *args, **noise):
    """`router(*args)`, compiled, with NumPy arrays."""
    return jax.device_get(_route(router, *args, **noise))


@functools.cache
def inputs(seed=0):
    """x, w, bias, mask (all valid), token ids. Logits have a standard deviation of about 2: choices are clear."""
    rng = np.random.default_rng(seed)
    x_TD = rng.normal(size=(T, D)).astype(np.float32)
    w_DE = (rng.normal(size=(D, E)) * 0.8).astype(np.float32)
    bias_E = (rng.normal(size=E) * 0.2).astype(np.float32)
    return x_TD, w_DE, bias_E, np.ones(T, bool), np.arange(T, dtype=np.int32) + 100


def per_token(routing):
    """(expert_TK, weight_TK) of a token-choice routing."""
    return routing.expert_A.reshape(routing.choices, -1).T, routing.weight_A.reshape(routing.choices, -1).T


def test_every_family_of_the_table_is_tested():
    assert {family for family, _, _ in CASES.values()} == set(ROUTERS)


@every_case
def test_agrees_with_the_oracle(case):
    x_TD, w_DE, bias_E, mask_T, _ = inputs()
    routing = route(router_of(case), x_TD, w_DE, bias_E, mask_T)
    expert_TK, weight_TK, probs_TE, logits_TE = router_oracle.route(case, x_TD, w_DE, bias_E)
    experts, weights = per_token(routing)
    np.testing.assert_array_equal(experts, expert_TK)
    np.testing.assert_array_equal(routing.token_A, np.tile(np.arange(T), expert_TK.shape[1]))
    assert_close(weights, weight_TK)
    assert_close(routing.probs_TE, probs_TE)
    assert_close(routing.logits_TE, logits_TE)


@every_case
def test_gradient_is_live_and_agrees_with_finite_differences(case):
    """Of random projections of the weights (the language-model loss's way in) and of the probabilities (the balance loss's)."""
    x_TD, w_DE, bias_E, mask_T, _ = inputs()
    rng = np.random.default_rng(1)
    router = router_of(case)
    u_TK, v_TE = rng.normal(size=(T, router.top_k)), rng.normal(size=(T, E))

    def loss(w_DE, x_TD, on_weights, on_probs):
        routing = route(router, x_TD, w_DE, bias_E, mask_T)
        return on_weights * jnp.sum(per_token(routing)[1] * u_TK) + on_probs * jnp.sum(routing.probs_TE * v_TE)

    def oracle(w_DE, x_TD, on_weights, on_probs):
        _, weight_TK, probs_TE, _ = router_oracle.route(case, x_TD, w_DE, bias_E)
        return on_weights * np.sum(weight_TK * u_TK) + on_probs * np.sum(probs_TE * v_TE)

    def differences(f, array):
        array, step = np.asarray(array, np.float64), 1e-6
        slopes = np.zeros_like(array)
        for i in np.ndindex(array.shape):
            shift = np.zeros_like(array)
            shift[i] = step
            slopes[i] = (f(array + shift) - f(array - shift)) / (2 * step)
        return slopes

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    for on in ((1.0, 0.0), (0.0, 1.0)):
        grad_w, grad_x = gradient(w_DE, x_TD, *on)
        assert np.abs(grad_w).max() > 0.05, "the router learns nothing"
        assert_close(grad_w, differences(lambda w, on=on: oracle(w, x_TD, *on), w_DE), what="gradient of w")
        assert_close(grad_x, differences(lambda x, on=on: oracle(w_DE, x, *on), x_TD), what="gradient of x")


@every_case
def test_experts_of_a_token_differ_and_weights_sum_as_declared(case):
    x_TD, w_DE, bias_E, mask_T, _ = inputs(2)
    family, _, options = CASES[case]
    experts, weights = per_token(route(router_of(case), x_TD, w_DE, bias_E, mask_T))
    assert all(len(set(row)) == len(row) and set(row) <= set(range(E)) for row in experts.tolist())
    assert np.all(weights > 0)
    renormalised = {
        "switch": False,
        "mixtral": options.get("normalize") != "before",
        "deepseek": options.get("normalize", True),
    }
    if renormalised[family]:
        assert_close(weights.sum(1), np.full(T, options.get("scale", 1.0)))
    else:
        assert np.all(weights.max(1) < 1)
        assert np.std(weights.sum(1)) > 0.01


@every_case
def test_padding_goes_nowhere_and_changes_no_other_token(case):
    x_TD, w_DE, bias_E, _, _ = inputs()
    router, mask_T = router_of(case), np.arange(T) % 3 != 1
    routing = route(router, x_TD, w_DE, bias_E, mask_T)
    experts, weights = per_token(routing)
    assert np.all(experts[~mask_T] == E)
    assert np.all(weights[~mask_T] == 0)
    other = route(router, np.where(mask_T[:, None], x_TD, np.float32(7)), w_DE, bias_E, mask_T)
    full_experts, full_weights = per_token(route(router, x_TD, w_DE, bias_E, np.ones(T, bool)))
    for got_experts, got_weights in ((experts, weights), per_token(other)):
        np.testing.assert_array_equal(got_experts[mask_T], full_experts[mask_T])
        np.testing.assert_array_equal(got_weights[mask_T], full_weights[mask_T])
    assert_close(routing.probs_TE.sum(-1), np.ones(T))  # padding too


@every_case
def test_equivariant_to_the_order_of_tokens(case):
    x_TD, w_DE, bias_E, mask_T, id_T = inputs()
    mask_T = mask_T & (np.arange(T) != 4)
    order = np.random.default_rng(3).permutation(T)
    noisy = functools.partial(route, router_of(case), noise_key=jax.random.key(5))
    experts, weights = per_token(noisy(x_TD, w_DE, bias_E, mask_T, token_id_T=id_T))
    moved = noisy(x_TD[order], w_DE, bias_E, mask_T[order], token_id_T=id_T[order])
    np.testing.assert_array_equal(per_token(moved)[0], experts[order])
    assert_close(per_token(moved)[1], weights[order])


@every_case
def test_equivariant_to_the_names_of_experts(case):
    """Any renaming without groups; with groups those that move whole groups, and experts inside one."""
    x_TD, w_DE, bias_E, mask_T, _ = inputs()
    router, rng = router_of(case), np.random.default_rng(4)
    num_groups = CASES[case][2].get("num_groups", 1)
    old_of_new = np.concatenate([rng.permutation(g) for g in rng.permutation(np.arange(E).reshape(num_groups, -1))])
    experts, weights = per_token(route(router, x_TD, w_DE, bias_E, mask_T))
    renamed = route(router, x_TD, w_DE[:, old_of_new], bias_E[old_of_new], mask_T)
    np.testing.assert_array_equal(old_of_new[per_token(renamed)[0]], experts)
    assert_close(per_token(renamed)[1], weights)


@every_case
def test_ties_go_to_the_lowest_expert(case):
    x_TD, w_DE, bias_E, mask_T, _ = inputs()
    experts, _ = per_token(route(router_of(case), x_TD, np.zeros_like(w_DE), np.zeros_like(bias_E), mask_T))
    np.testing.assert_array_equal(experts, np.tile(np.arange(experts.shape[1]), (T, 1)))


@every_case
def test_float32_inside_for_bfloat16_tokens(case):
    x_TD, w_DE, bias_E, mask_T, _ = inputs()
    router, low_TD = router_of(case), x_TD.astype(jnp.bfloat16)
    routing = route(router, low_TD, w_DE, bias_E, mask_T)
    for array in (routing.weight_A, routing.probs_TE, routing.logits_TE):
        assert array.dtype == jnp.float32
    assert routing.expert_A.dtype == routing.token_A.dtype == jnp.int32
    expert_TK, weight_TK, probs_TE, logits_TE = router_oracle.route(case, low_TD.astype(np.float32), w_DE, bias_E)
    np.testing.assert_array_equal(per_token(routing)[0], expert_TK)
    assert_close(per_token(routing)[1], weight_TK)
    assert_close(routing.probs_TE, probs_TE)
    assert_close(routing.logits_TE, logits_TE)


@every_case
def test_products_ask_for_full_precision_forward_and_backward(case):
    """A CPU multiplies float32 as float32 whatever is asked; TPUs and GPUs do so only when asked."""
    x_TD, w_DE, bias_E, mask_T, _ = inputs()
    router = router_of(case)
    jaxpr = jax.make_jaxpr(jax.grad(lambda w, x: jnp.sum(router(x, w, bias_E, mask_T).weight_A), (0, 1)))(w_DE, x_TD)
    products = [eqn for eqn in jax.tree.leaves(list(_equations(jaxpr.jaxpr))) if eqn.primitive.name == "dot_general"]
    assert len(products) >= 3  # logits, and the gradients of w and x
    assert all(eqn.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2 for eqn in products)


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


@every_case
@pytest.mark.parametrize("size", [30.0, 1e4, 1e30])
def test_finite_at_extreme_logits(case, size):
    x_TD, w_DE, bias_E, mask_T, _ = inputs()
    router = router_of(case)
    extremes_TD = np.concatenate([x_TD, -np.ones((1, D), np.float32)])  # the last token has only hugely negative logits
    w_DE, mask_T = (np.abs(w_DE) + 0.1) * np.float32(size), np.ones(T + 1, bool)

    def loss(w_DE):
        routing = route(router, extremes_TD, w_DE, bias_E, mask_T)
        return jnp.sum(routing.weight_A**2) + jnp.sum(routing.probs_TE**2), routing

    grad, routing = jax.jit(jax.grad(loss, has_aux=True))(w_DE)
    for array in (grad, routing.weight_A, routing.probs_TE):
        assert np.all(np.isfinite(array))
    assert_close(routing.probs_TE.sum(-1), np.ones(T + 1))
    assert np.all((routing.expert_A >= 0) & (routing.expert_A < E))


@every_case
def test_no_token_depends_on_another(case):
    """The routers here call themselves causal; proved by the gradient, and for the choice by changing the later tokens."""
    x_TD, w_DE, bias_E, mask_T, _ = inputs()
    router = router_of(case)
    assert router.causal
    jacobian_ATD = jax.jit(jax.jacobian(lambda x: router(x, w_DE, bias_E, mask_T).weight_A))(x_TD)
    token_A = np.tile(np.arange(T), router.top_k)
    depends_AT = np.abs(jacobian_ATD).max(-1) > 0
    np.testing.assert_array_equal(depends_AT, token_A[:, None] == np.arange(T))
    later_TD = np.where(np.arange(T)[:, None] < T // 2, x_TD, -3 * x_TD)
    changed = route(router, later_TD, w_DE, bias_E, mask_T)
    before = token_A < T // 2
    experts = route(router, x_TD, w_DE, bias_E, mask_T).expert_A
    np.testing.assert_array_equal(changed.expert_A[before], experts[before])
    assert np.any(changed.expert_A[~before] != experts[~before])


@every_case
def test_noise_depends_on_key_and_token_id_alone(case):
    x_TD, w_DE, bias_E, mask_T, id_T = inputs()
    router = router_of(case)
    quiet = route(router, x_TD, w_DE, bias_E, mask_T)

    def noisy(key, rows=slice(None)):
        return route(router, x_TD[rows], w_DE, bias_E, mask_T[rows], noise_key=key, token_id_T=id_T[rows])

    first, again, other = noisy(jax.random.key(0)), noisy(jax.random.key(0)), noisy(jax.random.key(1))
    np.testing.assert_array_equal(first.logits_TE, again.logits_TE)
    if not router.uses_noise:
        np.testing.assert_array_equal(first.logits_TE, quiet.logits_TE)
        return
    assert np.all(np.abs(first.logits_TE - quiet.logits_TE).max(-1) > 0)
    assert np.all(np.abs(first.logits_TE - other.logits_TE).max(-1) > 0)
    for rows in (slice(0, 5), slice(5, None)):
        part = noisy(jax.random.key(0), rows)
        assert_close(part.logits_TE, first.logits_TE[rows])
        np.testing.assert_array_equal(per_token(part)[0], per_token(first)[0][rows])
    with pytest.raises(ValueError, match="token_id_T"):
        route(router, x_TD, w_DE, bias_E, mask_T, noise_key=jax.random.key(0))


def test_noise_multiplies_the_input_and_stays_in_its_interval():
    x_TD, w_DE, bias_E, mask_T, id_T = inputs()
    noise_TD = np.asarray(input_jitter(jax.random.key(0), jnp.arange(500), D, 0.1))
    assert 0.9 <= noise_TD.min() < 0.901
    assert 1.099 < noise_TD.max() <= 1.1
    assert abs(noise_TD.mean() - 1) < 0.005
    assert np.unique(noise_TD).size > 2900  # neither tokens nor widths share noise
    router = make_router(RouterConfig("switch", 1, {"jitter": 0.1}), E)
    routing = route(router, x_TD, w_DE, bias_E, mask_T, noise_key=jax.random.key(0), token_id_T=id_T)
    expected = x_TD * noise_TD[id_T] @ w_DE
    assert_close(routing.logits_TE, expected)


@every_case
def test_routers_are_values(case):
    """Frozen, hashable, equal when made alike: static arguments that do not recompile."""
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def counted(router, x_TD, w_DE, bias_E, mask_T):
        traces.append(router)
        return router(x_TD, w_DE, bias_E, mask_T).weight_A

    counted(router_of(case), *inputs()[:4])
    counted(router_of(case), *inputs(1)[:4])
    assert len(traces) == 1
    with pytest.raises(AttributeError):
        router_of(case).top_k = 2


def test_weights_for_another_number_of_experts_are_refused():
    x_TD, w_DE, bias_E, mask_T, _ = inputs()
    with pytest.raises(ValueError, match=r"w_DE has shape \(6, 8\).*\(6, 4\)"):
        router_of("mixtral", num_experts=4)(x_TD, w_DE, bias_E, mask_T)
