"""docs/deep_dive.md: what it points to is there, what it tells to run can be run, and its formulas and numbers are worked out again."""

import ast
import contextlib
import functools
import io
import math
import re
import runpy
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from tolerance import assert_close

from configs import base
from moe_jax.analysis.describe import describe
from moe_jax.config import RouterConfig, from_dict
from moe_jax.dispatch.capacity import CapacityDispatch, Group, capacity
from moe_jax.exchange.room import copies
from moe_jax.routing import make_router
from moe_jax.routing.contract import Tokens, token_choice
from moe_jax.routing.losses import balance_loss, routing_sums, z_loss
from moe_jax.routing.metrics import noise_floor
from moe_jax.sizes import flops_per_token, num_params

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "deep_dive.md"
TEXT = PAGE.read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
QUESTIONS = re.findall(r"^### (\d+)\. ([^\n]+)\n(.*?)(?=^### |\Z)", TEXT, re.MULTILINE | re.DOTALL)
SPANS = re.findall(r"`([^`\n]+)`", PROSE)
COMMANDS = sorted({span for span in SPANS if "python -m" in span})
FIELDS = sorted({span for span in SPANS if re.fullmatch(r"(model|mesh|data|optimizer|train)\.[\w.]+(=\S+)?", span)})
COMMAND = r"`(\w+=\S+ )*python -m (pytest|launch\.\w+) [^`]+`"
PICTURE_OR_NOTEBOOK = r"\[`(docs/figures/\w+\.png|notebooks/\w+\.ipynb)`\]\(\S+\)"


def test_forty_questions_each_answered_in_a_few_lines_that_end_in_something_to_look_at():
    assert [int(number) for number, _, _ in QUESTIONS] == list(range(1, 41))
    assert len({title for _, title, _ in QUESTIONS}) == 40
    for number, title, answer in QUESTIONS:
        lines = answer.strip().splitlines()
        assert title.endswith("?"), title
        assert 3 <= len(lines) <= 16, (number, len(lines))
        assert re.fullmatch(f"→ ({COMMAND}|{PICTURE_OR_NOTEBOOK})", lines[-1]), number


def test_every_path_and_link_is_there():
    missing = {span for span in SPANS if re.match(r"(moe_jax|tests|configs|launch|docs|notebooks)/\S+$", span)}
    missing = {span for span in missing if not (ROOT / span).exists()}
    headings = re.findall(r"^#+ (.+)$", PROSE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)\s]+)\)", PROSE):
        path, _, anchor = target.partition("#")
        if not (PAGE.parent / path).exists() or (anchor and not path and anchor not in anchors):
            missing.add(target)
    assert not missing


def defined(path):
    """Names of functions and classes of a file, in whatever they are nested."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_names_in_files_are_defined_there():
    found = re.findall(r"`((?:moe_jax|tests)/[\w/.]+\.py)`,?\s\(?((?:`\w+`(?:,\s)?)+)\)", PROSE)
    assert len(found) > 15
    for path, names in found:
        assert set(re.findall(r"\w+", names)) <= defined(path), path


def config_of(path, argument=""):
    return runpy.run_path(str(ROOT / path))["get_config"](argument)


def words_of(command):
    """The words after `python -m`, without the environment before it."""
    words = shlex.split(command)
    return words[words.index("-m") + 1 :]


def of(program):
    return pytest.mark.parametrize("command", [c for c in COMMANDS if words_of(c)[0].startswith(program)])


@of("pytest")
def test_tests_that_are_told_to_run_exist(command):
    _, path, *rest = words_of(command)
    names = {name for name in defined(path) if name.startswith("test_")}
    assert names
    assert not rest or rest[0] == "-k"
    for word in " ".join(rest[1:]).split(" or "):
        assert any(word in name for name in names), word


@of("launch")
def test_programs_exist_and_take_these_flags_and_configs(command, faults):
    module, *words = words_of(command)
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    known = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source)) | ({"config"} if "define_config(" in source else set())
    changes, file = [], ""
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            assert re.search(r"cli\.run\(main, ", source), word
            assert f'"{word}":' in source or "/" in word, word
        elif name.startswith("config."):
            changes.append(f"{name.removeprefix('config.')}={value}")
        else:
            assert name in known, word
            file = value if name == "config" else file
    assert not changes or file
    if file:
        path, _, argument = file.partition(":")
        from_dict(config_of(path, ",".join(filter(None, [argument, *changes]))))


@pytest.mark.parametrize("field", FIELDS)
def test_fields_are_in_the_config_and_take_what_is_said(field):
    functools.reduce(getattr, field.partition("=")[0].split("."), base.get_config())
    config = base.get_config(field if "=" in field else "")
    if family := re.match(r"model\.moe\.router\.(\w+)\.", field):
        config.model.moe.router.name = family[1]
    make_router(from_dict(config).model.moe.router, 8)


def test_mathematics_renders():
    """Inline formulas that Markdown cannot take for something else; longer ones in blocks that are closed and balanced."""
    inline = re.findall(r"(?<![`\w\\])\$([^$\n]+)\$", re.sub(r"`[^`]*`", "", PROSE))
    assert len(inline) > 100
    for formula in inline:
        assert not re.search(r"\\[^a-zA-Z]|\*|\}_|\|", formula), formula
        assert formula == formula.strip(), formula
    assert re.sub(r"`[^`]*`", "", PROSE).count("$") == 2 * len(inline)
    for block in re.findall(r"^```math\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        assert block.count("{") == block.count("}"), block
        assert "operatorname" not in block  # GitHub refuses it
        assert "\n\n" not in block
    assert max(map(len, TEXT.splitlines())) <= 140


@functools.cache
def output(index):
    """What the page's program prints, and what the page says that it does."""
    programs = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert len(programs) == TEXT.count("```python") == 2
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(programs[index][0], PAGE.name, "exec"), {})
    return said.getvalue().splitlines(), programs[index][1].splitlines()


def test_the_program_of_the_bias_prints_what_is_shown():
    got, shown = output(0)
    assert got[0] == shown[0]
    numbers, expected = (np.array([re.findall(r"[\d.]+", line) for line in lines[1:]], float) for lines in (got, shown))
    np.testing.assert_allclose(numbers, expected, atol=0.1)
    by_case = {tuple(row[:2]): row[2:] for row in numbers}
    assert by_case[0.001, 1][-1] < 0.1 < by_case[0.01, 1][-1] < 0.2 < by_case[0.1, 1][-1] < by_case[0.0001, 1][-1]


def test_the_program_of_the_null_prints_what_is_shown():
    assert output(1)[0] == output(1)[1]


T, E, K = 12, 5, 2
LOGITS_TE, ANSWERS_TE = np.random.default_rng(0).normal(size=(2, T, E)).astype(np.float32)  # z_te; a_te, gradient times answer
PROBS_TE = special.softmax(LOGITS_TE, axis=1)


def route(family, logits_TE, top_k=K, **options):
    """A router whose logits are given: its matrix is the identity."""
    router = make_router(RouterConfig(family, top_k, options), E)
    return router(Tokens(logits_TE, jnp.ones(T, bool)), {"w_router_DE": jnp.eye(E)}, router.init_state())


def weights_and_gradient(family, **options):
    """Weights [T, E], 0 where not chosen, and the gradient of sum w a for the logits."""

    def loss(logits_TE):
        routing = route(family, logits_TE, **options)
        weight_TE = jnp.zeros((T, E)).at[routing.token_A, routing.expert_A].add(routing.weight_A)
        return jnp.sum(weight_TE * ANSWERS_TE), weight_TE

    gradient_TE, weight_TE = map(np.asarray, jax.jit(jax.grad(loss, has_aux=True))(LOGITS_TE))
    assert np.abs(gradient_TE).max() > 0.1
    return weight_TE, gradient_TE


@pytest.mark.parametrize(("family", "options"), [("switch", {"top_k": 1}), ("mixtral", {"normalize": "before"})])
def test_gradient_of_a_softmax_before_the_choice(family, options):
    weight_TE, gradient_TE = weights_and_gradient(family, **options)
    heard_TE = np.where(weight_TE > 0, ANSWERS_TE, 0)
    assert_close(gradient_TE, PROBS_TE * (heard_TE - np.sum(weight_TE * heard_TE, 1, keepdims=True)))


@pytest.mark.parametrize(("family", "fading_TE"), [("mixtral", 1), ("deepseek", 1 - special.expit(LOGITS_TE))])
def test_gradient_of_weights_that_add_up_to_one(family, fading_TE):
    weight_TE, gradient_TE = weights_and_gradient(family)
    assert_close(gradient_TE, weight_TE * fading_TE * (ANSWERS_TE - np.sum(weight_TE * ANSWERS_TE, 1, keepdims=True)))


def test_one_expert_of_weight_one_has_no_gradient():
    gradient_TE = jax.grad(lambda z_TE: jnp.sum(jax.nn.softmax(jax.lax.top_k(z_TE, 1)[0]) * ANSWERS_TE[:, :1]))(LOGITS_TE)
    assert not np.any(gradient_TE)


@jax.jit
def sums_of(logits_TE):
    return routing_sums(route("mixtral", logits_TE), jnp.ones(T, bool), 1)


def test_gradient_of_the_balance_loss():
    def loss(logits_TE):
        sums = sums_of(logits_TE)
        return balance_loss(sums.load_E, sums.prob_sum_E, sums.num_tokens)

    share_E = np.asarray(sums_of(LOGITS_TE).load_E) / (T * K)
    assert_close(jax.grad(loss)(LOGITS_TE), E / T * PROBS_TE * (share_E - PROBS_TE @ share_E[:, None]))


def test_gradient_of_the_z_loss():
    gradient_TE = jax.grad(lambda logits_TE: z_loss(sums_of(logits_TE).z_sum, T))(LOGITS_TE)
    assert_close(gradient_TE, 2 / T * special.logsumexp(LOGITS_TE, 1, keepdims=True) * PROBS_TE)
    assert_close(z_loss(sums_of(np.zeros_like(LOGITS_TE)).z_sum, T), math.log(E) ** 2)


def test_the_bias_descends_on_a_convex_function_to_balance():
    score_TE = np.random.default_rng(0).random((600, 6)) ** np.arange(1, 7)

    def load(bias_E):
        return np.bincount(np.argsort(-(score_TE + bias_E))[:, :2].ravel(), minlength=6)

    def phi(bias_E):
        return np.sort(score_TE + bias_E)[:, -2:].sum() - 200 * bias_E.sum()

    step_EE = 1e-7 * np.eye(6)
    slope_E = [(phi(step_E) - phi(-step_E)) / 2e-7 for step_E in step_EE]
    np.testing.assert_allclose(slope_E, load(np.zeros(6)) - 200, atol=0.01)
    bias_E = np.zeros(6)
    for _ in range(2000):
        bias_E += 1e-3 * np.sign(200 - load(bias_E))
    assert np.abs(load(bias_E) - 200).max() <= 5 < np.abs(slope_E).max()
    assert phi(bias_E) < phi(np.zeros(6)) - 10


def cells(label):
    """The cells after the first of the one table row that begins with `label`."""
    (line,) = re.findall(rf"^\| {re.escape(label)} \|(.*)\|$", TEXT, re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


MODELS = {
    "Mixtral 8x7B": "mixtral_8x7b",
    "OLMoE": "olmoe_1b_7b",
    "Qwen3-30B-A3B": "qwen3_30b_a3b",
    "DeepSeek-V3": "deepseek_v3",
}


@pytest.mark.parametrize("label", MODELS)
def test_the_table_of_models(label):
    model = from_dict(config_of(f"configs/published/{MODELS[label]}.py")).model
    count, moe = num_params(model), model.moe
    assert cells(label) == [
        f"{count.total:,}",
        f"{count.active:,}",
        f"{100 * count.active / count.total:.1f} %",
        f"{flops_per_token(model, 4096) / 1e9:.1f} G",
        f"{2 * count.total / 2**30:,.1f}",
        f"{moe.router.top_k * model.d_model * 4 / 1024:.1f}",
    ]
    assert f"{6 * model.d_model * moe.d_ff / (4 * model.d_model):,.0f}" in PROSE
    if label == "Mixtral 8x7B":
        assert f"{count.active_without_embedding:,}" in PROSE
    if label in ("Mixtral 8x7B", "DeepSeek-V3"):
        column = int(label == "DeepSeek-V3")
        numbers = f"{moe.num_experts}, {moe.router.top_k}, {moe.num_shared_experts}"
        assert cells("experts a layer, a token, shared")[column] == numbers
        assert cells("width of an expert")[column] == f"{moe.d_ff:,}"


def test_what_describe_says_of_deepseek_v3():
    said = describe("deepseek_v3", from_dict(config_of("configs/published/deepseek_v3.py", "h100-64")))
    for there, here in (("97.4%", "97.4 %"), ("141.6 GiB", "141.6 GiB"), ("89.1 KiB  3.18 rows", "89.1 KiB in 3.18 rows")):
        assert there in said
        assert here in PROSE


def test_tables_of_numbers():
    for experts, choices in ((8, 2), (64, 8), (256, 8)):
        counts = [experts * (1 - (1 - choices / experts) ** batch) for batch in (1, 4, 16, 64, 256)]
        assert cells(f"{experts}, {choices}") == [f"{count:.1f}" for count in counts]
    for choices, experts in ((2, 8), (2, 16), (8, 64), (8, 256)):
        assert cells(f"{choices} of {experts}") == [f"{math.comb(experts, choices):,}"]
    for experts, tokens in ((8, 1024), (64, 1024), (64, 4096)):
        load_N = np.arange(tokens + 1)
        part_N = stats.binom(tokens, 1 / experts).pmf(load_N) * experts / tokens
        dropped = [part_N @ np.maximum(load_N - capacity(tokens, 1, experts, factor), 0) for factor in (1.0, 1.25, 1.5)]
        assert cells(f"{experts}, {tokens}") == [f"{100 * part:.2f} %" for part in dropped]
        assert dropped[0] == pytest.approx(math.sqrt((1 - 1 / experts) / (2 * math.pi * tokens / experts)), rel=0.01)


def test_numbers_in_the_text():
    assert f"{balance_loss(jnp.array([6, 4]), jnp.array([6 * 0.51 + 4 * 0.01, 6 * 0.49 + 4 * 0.99]), 10):.3f}." in PROSE
    assert balance_loss(jnp.array([10, 10, 0, 0]), jnp.array([10.0, 0, 0, 0]), 10) == 4 / 2  # E / K
    assert [f"{noise_floor(*sizes):.2f}" for sizes in ((8, 1024), (64, 512))] == ["0.06", "0.13"]
    assert noise_floor(64, 5200) == pytest.approx(0.04, rel=1e-3)
    assert [jnp.bfloat16(x) for x in (128.4, 129, 255.4)] == [128, 129, 255]
    assert jax.nn.sigmoid(jnp.array([15.0, 17.0])).tolist() == [pytest.approx(1, abs=1e-6), 1]
    assert jax.nn.sigmoid(15.0) < 1
    betas = 131 / 28, 138 / 21
    assert "{:.1f} to {:.1f};".format(*betas) in PROSE
    for ratio in (1, 8 / 2, 64 / 8):
        assert "{:.0f} to {:.0f}".format(*(4 / 2 * beta * ratio for beta in betas)) in PROSE
    assert f"{8 * 7168 * 4:,}" in PROSE
    once = (8 - 1) * (1 - math.comb(56, 8) / math.comb(64, 8))
    assert float((8 - 1) * copies(Group(64, 8, 64), 8, True)) == pytest.approx(once)


def test_a_later_token_takes_an_earlier_ones_row():
    @jax.jit
    def first_answer(last_choice):
        expert_TK = jnp.array([[0, 1], [2, 0], [last_choice, 3]])
        weight_TK, none_TE = jnp.array([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]]), jnp.zeros((3, 4))
        routing = token_choice(expert_TK, weight_TK, none_TE, none_TE, Tokens(None, jnp.ones(3, bool)))
        return CapacityDispatch(0.6)(jnp.ones((3, 1)), routing, lambda x_ECD: x_ECD)[0][0, 0]

    assert first_answer(2) == pytest.approx(1.0)
    assert first_answer(1) == pytest.approx(0.7)


QUOTED = {
    "ablations.md": "-0.0248 -0.0270 -0.0441 -0.1062 -0.0350 1.5517 1.5166 4.65 0.177 0.245 0.259 +0.069 +0.083 61.91% 0.546 0.407",
    "inference.md": "1.06 0.33 1.08 0.17 2.99 0.86 4.78 0.70 1.13 1.36 5.43 7.86 26.06 55.92 21 28 131 138 52 17 9 3.0 1.2 1.5 2816 704",
    "performance.md": "1.17 1.32 1.76 2.76 538 313 0.57",
    "../README.md": "2099200 268288",
}


@pytest.mark.parametrize("page", QUOTED)
def test_measurements_quoted_are_in_their_page(page):
    numbers = re.findall(r"[-+]?[\d.,]*\d%?", (PAGE.parent / page).read_text(encoding="utf-8"))
    assert set(QUOTED[page].split()) <= set(numbers)
