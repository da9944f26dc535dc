"""Drawing a token: filters against sorted NumPy and transformers, the distribution drawn, and independence of batch and mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

from moe_jax.config import ConfigError
from moe_jax.models.sampling import Draws, Sampling, draw, filter_logits

VOCAB = 23
MIXED = [
    Sampling(),
    Sampling(temperature=0.0),
    Sampling(temperature=0.7, top_k=5),
    Sampling(top_p=0.6, seed=3),
    Sampling(min_p=0.2, seed=2**32 - 1),
    Sampling(temperature=1.5, top_k=9, top_p=0.8, min_p=0.05, seed=1),
    Sampling(temperature=0.0, top_k=3, top_p=0.5, min_p=0.5, seed=7),
    Sampling(temperature=0.3, top_k=10**12, top_p=1e-46),
    Sampling(temperature=1e-42, min_p=1.0),
    Sampling(temperature=4.0, top_k=1),
]
drawn, filtered = jax.jit(draw), jax.jit(filter_logits)


def logits_of(rows=10, vocab=VOCAB, seed=0):
    return np.random.default_rng(seed).normal(0, 2.5, (rows, vocab)).astype(np.float32)


def numpy_filter(logits, sampling):
    """Which of a row's tokens are left, in float64 with every filter written out over the sorted vocabulary."""
    probs = np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature)
    order = np.argsort(-logits, kind="stable")
    left = order[: sampling.top_k] if sampling.top_k else order
    left = left[probs[left] >= sampling.min_p * probs.max()]
    shares = probs[left] / probs[left].sum()
    left = left[np.cumsum(shares) - shares < sampling.top_p]
    return np.isin(np.arange(len(logits)), left)


def test_filters_keep_what_sorting_keeps():
    """Every row its own settings; five batches of logits."""
    for seed in range(5):
        logits = logits_of(seed=seed)
        kept = np.isfinite(filtered(logits, Draws.of(MIXED)))
        for row, sampling in enumerate(MIXED):
            if sampling.temperature > 0:
                np.testing.assert_array_equal(kept[row], numpy_filter(logits[row], sampling), str(sampling))


def test_filters_by_hand():
    """Probabilities .5 .3 .15 .05, and what is left is over the temperature."""
    logits = np.log([[0.3, 0.05, 0.5, 0.15]]).astype(np.float32)

    def kept(**options):
        return np.isfinite(filtered(logits, Draws.of([Sampling(**options)])))[0].tolist()

    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, False, True, False]
    assert kept(top_p=0.6) == [True, False, True, False]
    assert kept(top_p=0.49) == [False, False, True, False]
    assert kept(top_p=0.81) == [True, False, True, True]
    assert kept(min_p=0.29) == [True, False, True, True]  # .15 / .5 = .3
    assert kept(min_p=0.31) == [True, False, True, False]
    assert kept(top_k=2, top_p=0.62) == [False, False, True, False], "of what top-k left, .5 is .625"
    assert kept(min_p=0.29, top_p=0.52) == [False, False, True, False], "of what min-p left, .5 is .526"
    halved = filtered(logits, Draws.of([Sampling(temperature=0.5)]))
    np.testing.assert_allclose(halved - jnp.max(halved), 2 * (logits - logits.max()), rtol=1e-6)


def test_equals_of_the_last_kept_are_kept():
    """And the next float32 below is not."""
    logits = np.array([[1.0, 3.0, 2.0, 2.0, -0.0, 0.0]], np.float32)
    for sampling, kept in {
        Sampling(top_k=2): [0, 1, 1, 1, 0, 0],
        Sampling(top_p=0.6): [0, 1, 1, 1, 0, 0],
        Sampling(top_k=5): [1, 1, 1, 1, 1, 1],
        Sampling(min_p=np.exp(-1.001)): [0, 1, 1, 1, 0, 0],
    }.items():
        np.testing.assert_array_equal(np.isfinite(filtered(logits, Draws.of([sampling])))[0], kept, str(sampling))
    near = np.array([[0.0, -1.0, np.nextafter(np.float32(-1), np.float32(-2))]], np.float32)
    np.testing.assert_array_equal(np.isfinite(filtered(near, Draws.of([Sampling(top_k=2)])))[0], [1, 1, 0])


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [s for s in MIXED if s.temperature > 1e-3 and s.top_p > 1e-3], ids=str)
def test_filters_are_those_of_transformers(sampling):
    """Its own processors, in our order."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    logits = logits_of(rows=16, vocab=301)
    scores = theirs.TemperatureLogitsWarper(float(sampling.temperature))(None, torch.tensor(logits))
    if sampling.top_k:
        scores = theirs.TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.min_p:
        scores = theirs.MinPLogitsWarper(sampling.min_p)(None, scores)
    if sampling.top_p < 1:
        scores = theirs.TopPLogitsWarper(sampling.top_p)(None, scores)
    ours = jax.nn.softmax(filtered(logits, Draws.of([sampling] * 16)))
    np.testing.assert_allclose(ours, scores.softmax(-1).numpy(), atol=1e-6)
    np.testing.assert_array_equal(ours > 0, scores.softmax(-1).numpy() > 0)


@pytest.mark.parametrize("sampling", [Sampling(seed=5), Sampling(temperature=1.7, top_k=6, top_p=0.95, min_p=0.02)], ids=str)
def test_draws_have_the_filtered_distribution(sampling):
    """Pearson's statistic of 4096 draws of one request; 99.9% of the chi-square distribution is below the bound (Wilson-Hilferty)."""
    logits, count = logits_of(rows=1, vocab=9, seed=11), 4096
    draws = Draws.of([sampling] * count).replace(number_B=np.arange(count, dtype=np.int32))
    tokens, _ = drawn(np.repeat(logits, count, 0), draws)
    kept = numpy_filter(logits[0], sampling)
    weights = np.where(kept, np.exp(logits[0] / sampling.temperature), 0)
    expected = count * weights / weights.sum()
    observed = np.bincount(tokens, minlength=9)
    assert observed[~kept].sum() == 0
    freedom = kept.sum() - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3
    assert freedom >= 3
    assert ((observed - expected)[kept] ** 2 / expected[kept]).sum() < bound, (observed, expected)


def test_greedy_is_the_best_token_and_of_equals_the_first():
    logits = logits_of()
    logits[:, [4, 17]] = logits.max() + 1
    alone = Draws.of([Sampling(temperature=0.0, seed=i) for i in range(len(logits))])
    for draws in (alone, Draws.of(MIXED)):
        tokens, _ = drawn(logits, draws)
        np.testing.assert_array_equal(np.asarray(tokens)[draws.temperature_B == 0], 4)
    assert (np.asarray(drawn(logits, alone.replace(temperature_B=np.full(len(logits), 3, np.float32)))[0]) != 4).any()


def test_log_probabilities_are_the_models_own():
    logits = logits_of()
    tokens, log_probs = drawn(logits, Draws.of(MIXED))
    expected = [row[token] - np.log(np.exp(row).sum()) for row, token in zip(logits.astype(np.float64), tokens, strict=True)]
    assert tokens.dtype == jnp.int32
    assert log_probs.dtype == jnp.float32
    np.testing.assert_allclose(log_probs, expected, atol=1e-5)
    half, _ = drawn(logits.astype(jnp.bfloat16), Draws.of(MIXED))
    assert half.dtype == jnp.int32


def test_a_row_depends_on_itself_alone():
    """In the batch, in another order, and by itself; and on each of its logits, its seed and its number."""
    logits, draws = logits_of(), Draws.of(MIXED).replace(number_B=np.arange(len(MIXED), dtype=np.int32))
    tokens, log_probs = map(np.asarray, drawn(logits, draws))
    turned = np.random.default_rng(1).permutation(len(MIXED))
    other = drawn(logits[turned], jax.tree.map(lambda a: a[turned], draws))
    np.testing.assert_array_equal(other[0], tokens[turned])
    np.testing.assert_allclose(other[1], log_probs[turned], atol=1e-6)
    for row in range(len(MIXED)):
        alone = drawn(logits[row : row + 1], jax.tree.map(lambda a, row=row: a[row : row + 1], draws))
        assert alone[0][0] == tokens[row], MIXED[row]


def test_seed_and_number_make_the_stream():
    flat = np.zeros((64, 1000), np.float32)  # 64 draws of 1000 equals seldom meet
    plain = Draws.of([Sampling()] * 64)
    count = np.arange(64, dtype=np.int32)
    by_seed, _ = drawn(flat, plain.replace(seed_B=count.astype(np.uint32)))
    by_number, _ = drawn(flat, plain.replace(number_B=count))
    assert len(set(np.asarray(drawn(flat, plain)[0]).tolist())) == 1
    assert len(set(np.asarray(by_seed).tolist())) > 50
    assert len(set(np.asarray(by_number).tolist())) > 50
    assert by_seed[0] == by_number[0]
    assert (np.asarray(by_seed)[1:] != np.asarray(by_number)[1:]).sum() > 50
    np.testing.assert_array_equal(by_number, drawn(flat, plain.replace(number_B=count))[0])


def test_one_program_for_all_settings_and_nothing_drawn_where_all_are_greedy():
    jitted = jax.jit(lambda logits, draws: draw(logits, draws))
    for sampling in MIXED:
        jitted(logits_of(), Draws.of([sampling] * len(MIXED)))
    jitted(logits_of(), Draws.of(MIXED))
    assert jitted._cache_size() == 1
    jaxpr = jax.make_jaxpr(draw)(logits_of(), Draws.of(MIXED)).jaxpr
    always = str([equation for equation in jaxpr.eqns if equation.primitive.name != "cond"])
    assert not [name for name in ("random_bits", "while", "scan", "sort", "top_k", "cond") if f"{name}[" in always]
    assert "random_bits[" in str(jaxpr)


@pytest.mark.parametrize(
    ("sizes", "spec"),
    [
        (dict(data=2, expert=4), P(None, None)),
        (dict(data=2, fsdp=2, tensor=2), P(("data", "fsdp"), None)),
        (dict(data=2, tensor=4), P("data", "tensor")),
    ],
    ids=str,
)
def test_draws_do_not_depend_on_the_mesh(sizes, spec):
    logits = logits_of(rows=20, vocab=24)
    draws = Draws.of(MIXED * 2).replace(number_B=np.arange(20, dtype=np.int32))
    tokens, log_probs = drawn(logits, draws)
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        laid = jax.device_put(logits, NamedSharding(mesh, spec))
        many = jax.jit(draw)(laid, draws)
    assert all(array.sharding.is_fully_replicated for array in many)
    np.testing.assert_array_equal(many[0], tokens)
    np.testing.assert_allclose(many[1], log_probs, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(temperature=-1.0), "temperature = -1.0 must be 0 (greedy) or more, and finite."),
        (dict(temperature=float("nan")), "temperature = nan must be"),
        (dict(temperature=float("inf")), "temperature = inf must be"),
        (dict(temperature="hot"), "temperature = 'hot' is a str; give a number"),
        (dict(top_k=-1), "top_k = -1 must be 0 (all tokens) or more."),
        (dict(top_k=2.5), "top_k = 2.5 is a float; give an integer"),
        (dict(top_k=True), "top_k = True is a bool"),
        (dict(top_p=0.0), "top_p = 0.0 must be more than 0 and at most 1."),
        (dict(top_p=1.01), "top_p = 1.01 must be"),
        (dict(min_p=-0.1), "min_p = -0.1 must be at least 0"),
        (dict(min_p=1.5), "min_p = 1.5 must be"),
        (dict(seed=-1), "seed = -1 must be at least 0 and less than 2**32."),
        (dict(seed=2**32), "seed = 4294967296 must be"),
    ],
    ids=str,
)
def test_bad_sampling_is_refused(options, sentence):
    with pytest.raises(ConfigError) as refusal:
        Sampling(**options)
    assert str(refusal.value).startswith(sentence)
