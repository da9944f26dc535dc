"""The report's page: what it says of runs made up so that the answer is known, and that nothing in a run becomes code."""

import dataclasses
import os
import re
import shutil
import xml.etree.ElementTree

import matplotlib.image
import numpy as np
import pytest
import tiny_run
from report_cases import EXPERTS, HOSTILE, NAME, Page, made_run

from moe_jax.analysis.report import drops, markup, pictures, runs, special, style, text
from moe_jax.analysis.report.write import write_report
from moe_jax.config import ConfigError
from moe_jax.train import observation
from moe_jax.train.observation import ObservationError


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(the folder of the report, its page as text, taken apart)."""
    folder = tmp_path_factory.mktemp("report") / NAME
    folder.mkdir()
    workdir = made_run(folder, model__moe__exchange_factor=1.5)
    page = write_report([workdir], folder / "out")
    content = page.read_text(encoding="utf-8")
    return page.parent, content, Page(content)


def test_the_page_asks_for_nothing(report):
    _, content, page = report
    for address in page.values("href", "src", "xlink:href", "action", "poster", "srcset"):
        assert address.startswith(("#", "data:")), address[:80]
    assert re.findall(r"(?i)https?:|//\w+\.|@import|url\((?!#)", content) == []
    policy = next(meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:")


def test_what_a_run_says_is_no_code(report):
    """The hostile text is the name of a domain, a token, a folder: it is shown, and is no element and no attribute."""
    page = report[2]
    assert len(page.of("script")) == 1
    assert page.of("img") == []
    assert page.of("b") == []
    assert [name for _, attributes in page.elements for name in attributes if name.startswith("on")] == []
    assert "$x_1$" in page.text()
    assert HOSTILE in page.text()
    assert sum(HOSTILE in data for tag, data in page.texts if tag == "span") > 0  # the token in its passage
    assert sum(HOSTILE in data for tag, data in page.texts if tag == "text") > 0  # the domain in a picture
    assert NAME in page.text()


def test_structure(report):
    """Ids are unique and every reference finds one; headings go down a step at a time; the table of contents has every section."""
    _, _, page = report
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    fragments = [href[1:] for href in page.values("href") if href.startswith("#")]
    fragments += page.values("for", "aria-labelledby")
    fragments += [
        name
        for _, attributes in page.elements
        for value in attributes.values()
        for name in re.findall(r"url\(#([^)]*)\)", value or "")
    ]
    assert set(fragments) <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(np.diff(levels)) <= 1
    linked = {attributes["href"][1:] for attributes in page.of("a")}
    assert {section["id"] for section in page.of("section")} <= linked
    assert page.of("html")[0]["lang"] == "en"


def test_every_picture_says_what_it_shows_and_is_a_file(report):
    folder, content, page = report
    drawn = [svg for svg in page.of("svg")]
    assert len(drawn) == len(page.of("figure")) >= 12
    for svg in drawn:
        assert svg["role"] == "img"
        assert re.search(r"\w\. .{20,}\.$", svg["aria-label"]), svg["aria-label"]
    files = {figure["id"].removeprefix("figure-") for figure in page.of("figure")}
    assert {path.stem for path in (folder / "figures").glob("*.png")} == files
    for path in (folder / "figures").glob("*.png"):
        picture = matplotlib.image.imread(path)[..., :3]
        assert picture.shape[1] > 500
        assert picture[0, 0].tolist() == [1, 1, 1]
        assert picture.std() > 0.05, path.name
    for svg in re.findall(r"<svg .*?</svg>", content, flags=re.DOTALL):
        xml.etree.ElementTree.fromstring(svg)
        assert "currentColor" in svg
        assert "#000000" not in svg


def test_the_slider_has_every_step(report):
    """Five logged steps and three evaluations, the last evaluation last and shown; a frame's pixels are its loads."""
    _, _, page = report
    frames = [image for image in page.of("image") if "frame" in image.get("class", "")]
    assert len(frames) == 8
    assert [("shown" in frame["class"], "last" in frame["class"]) for frame in frames] == [(False, False)] * 7 + [(True, True)]
    assert len({frame["href"] for frame in frames}) == 8
    entries = [data for tag, data in page.texts if tag == "li" and "step" in data]
    assert entries[:3] == ["Training step, step 2", "Training step, step 4", "Evaluation, step 4"]
    assert entries[-1] == "Evaluation, step 10"
    (control,) = (box for box in page.of("input") if box.get("max") == "7")
    assert (control["type"], control["value"], control["aria-valuetext"]) == ("range", "7", "Evaluation, step 10")
    shown = next(data for tag, data in page.texts if tag == "output")
    assert shown == "Evaluation, step 10"
    assert "layer 1: expert 3 has 1.78 times an equal share" in page.text().lower()  # 200 of 900 / 8


def test_what_is_known_is_said(report):
    """The first MoE layer is specialised by construction, the second is not; a token's experts beat three bytes of random text."""
    _, _, page = report
    text = page.text()
    assert "1 of 2 MoE layers are above the null (layer 1)." in text
    assert re.search(r"they tell 0\.\d\d bits more of it than three bytes do", text)
    assert "no specialisation by domain that can be told from chance" in text
    assert "In 5 of 5 logged steps some expert had no token; in the last, 1." in text
    assert "2 x expert 4 on 8 emulated cpu devices" in text
    assert "commit 0123456789ab with changes" in text
    assert "100% at a full receiver" in text
    assert "The last evaluation lost 0.39%" in text  # 64 of 2 x 4,096 x 2 assignments
    assert "Most of the logged time, 89%, went into step." in text  # 2 x 30 of 67.5 seconds


def test_a_passage_has_the_number_of_every_expert(report):
    """Colours, titles and numbers are those of the observation's first choices, for the layer shown and the others."""
    folder, _, page = report
    seen = observation.load(observation.path_of(folder.parent / "run", 10))
    spans = [span for span in page.of("span") if "data-e" in span]
    assert len(spans) == 2 * text.TOKENS
    expected = seen.row_choice_RSLM.reshape(-1, 2, 2)[: text.TOKENS, :, 0]
    assert [span["data-e"] for span in spans[: text.TOKENS]] == [f"{first} {second}" for first, second in expected]
    assert [span["data-n"] for span in spans[:3]] == [str(second) for _, second in expected[:3]]
    assert spans[0]["title"] == f"expert {expected[0, 1]}"
    assert spans[0]["class"] == f"e{expected[0, 1] % style.expert_colors()}"


def test_no_specialisation_is_called_none(tmp_path):
    """And without the corpus, one sentence says what is missing; a model that cannot drop is said to drop nothing."""
    workdir = made_run(tmp_path, specialised=False)
    (tmp_path / "corpus.jsonl").unlink()
    (run,) = runs.read_runs([workdir])
    with pictures.drawing():
        gallery = pictures.Gallery(tmp_path / "figures")
        text = Page(markup.join(*special.domains(run, gallery), *drops.drops(run, gallery))).text()
    assert "there is no specialisation to report" in text
    assert "are above the null" not in text
    assert "What three bytes tell is missing, because the run's text cannot be read here" in text
    assert "This model drops nothing: dispatch dropless, and the exchange has room for the worst case." in text


def test_a_dense_run(tmp_path):
    workdir = made_run(tmp_path, model__moe__num_experts=0)
    page = Page(write_report([workdir], tmp_path / "out").read_text())
    assert len(page.of("figure")) == 2
    assert "This is a dense model" in page.text()
    assert "router" not in [data for tag, data in page.texts if tag == "th"]


def test_a_run_that_was_not_observed(tmp_path):
    """Has the figures of its metrics, and the command that makes an observation."""
    workdir = made_run(tmp_path, observed=False, train__observe=False)
    page = Page(write_report([workdir], tmp_path / "out").read_text())
    assert "This run has no observation" in page.text()
    assert f"--workdir={workdir} --observe={workdir}/observations/step_00000010.npz" in page.text()
    assert {figure["id"] for figure in page.of("figure")} == {
        f"figure-{n}" for n in ("learning", "max-violation", "router", "load", "time")
    }


def test_two_runs_side_by_side(tmp_path):
    """What differs is named, sections are repeated, ids stay unique, each run has its own pictures."""
    first = made_run(tmp_path, workdir="a", model__moe__num_experts=0)
    second = made_run(tmp_path, workdir="b", model__moe__num_experts=0, optimizer__learning_rate=0.5)
    page = Page(write_report([first, second], tmp_path / "out").read_text())
    assert len(page.values("id")) == len(set(page.values("id")))
    headings = [data for tag, data in page.texts if tag in ("h2", "h3")]
    assert headings[1:4] == ["The runs side by side", "a", "What was trained"]
    assert headings.count("Learning") == 2
    cells = [data for tag, data in page.texts if tag in ("th", "td")]
    at = cells.index("optimizer.learning_rate")
    assert cells[at : at + 3] == ["optimizer.learning_rate", "0.001", "0.5"]
    assert "workdir" not in cells
    assert {"side-by-side.png", "run-1-time.png", "run-2-time.png"} <= set(os.listdir(tmp_path / "out" / "figures"))


def test_what_is_no_run_is_refused(tmp_path):
    workdir = made_run(tmp_path, observed=False)
    with pytest.raises(ConfigError, match=r"nothing' holds no run \(no config.json\)"):
        write_report([tmp_path / "nothing"])
    with pytest.raises(ConfigError, match="say where it goes with --out"):
        write_report([workdir, made_run(tmp_path, workdir="other", observed=False)])
    with pytest.raises(ConfigError, match="named twice"):
        write_report([workdir, f"{workdir}/"], tmp_path)
    with pytest.raises(ConfigError, match="no run is named"):
        write_report([])
    (workdir / "observations").mkdir()
    (workdir / "observations" / "step_00000010.npz").write_text("no archive")
    with pytest.raises(ObservationError, match="is not an observation, or damaged"):
        write_report([workdir])
    (workdir / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"metrics.jsonl is empty; train the run until it logs a step"):
        write_report([workdir])
    (workdir / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"has no metrics.jsonl"):
        write_report([workdir])


@pytest.mark.slow
def test_the_program(tmp_path):
    workdir = made_run(tmp_path, model__moe__num_experts=0)
    done = tiny_run.program("report", str(workdir), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"written to {tmp_path / 'out' / 'index.html'}\n"
    done = tiny_run.program("report", str(workdir), str(tmp_path), f"--out={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "holds no run" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("one domain", "The run was evaluated on one domain (code), so that experts cannot differ by domain."),
        ("one evaluation", "Saturation compares two evaluations, and this run has one"),
        ("nothing routed", "no token has an expert here."),
        ("no tokenizer", "#256"),
    ],
)
def test_odd_observations(tmp_path, change, sentence):
    """What there is nothing of is said in a sentence."""
    workdir = made_run(tmp_path)
    paths = [observation.path_of(workdir, step) for step in (4, 8, 10)]
    for seen, path in [(observation.load(path), path) for path in paths]:
        if change == "one domain":
            summed = {name: getattr(seen, name).sum(0, keepdims=True) for name in ("tokens_X", "load_XLE")}
            firsts = {name: getattr(seen, name)[:1] for name in ("entropy_XL", "margin_XL")}
            zeros = {name: 0 * getattr(seen, name) for name in ("document_domain_U", "row_domain_R")}
            changed = summed | firsts | zeros | {"about": dataclasses.replace(seen.about, domains=("code",))}
        elif change == "nothing routed":
            names = ("load_XLE", "coactivation_LEE", "vocabulary_load_NLE", "document_load_ULE", "place_assigned_PL")
            changed = {name: 0 * getattr(seen, name) for name in (*names, "place_dropped_PL", "dropped_CL")}
            changed["row_choice_RSLM"] = np.full_like(seen.row_choice_RSLM, EXPERTS)
        else:
            changed = {}
        dataclasses.replace(seen, **changed).save(path)
    if change == "one evaluation":
        for path in paths[:2]:
            path.unlink()
    if change == "no tokenizer":
        shutil.rmtree(workdir / "tokenizer")
    assert sentence in Page(write_report([workdir]).read_text()).text()


@pytest.mark.slow
def test_routers_without_pairs_or_choices(tmp_path):
    top_1 = made_run(tmp_path, workdir="a", model__moe__router__name="switch", model__moe__router__top_k=1)
    assert "A token has one expert in this run" in Page(write_report([top_1]).read_text()).text()
    soft = {"model__moe__router__name": "soft_moe", "model__moe__router__allow_noncausal": True}
    soft = made_run(tmp_path, workdir="b", observed=False, model__moe__dispatch="einsum", **soft)
    assert "The router soft_moe mixes all tokens for every expert" in Page(write_report([soft]).read_text()).text()
