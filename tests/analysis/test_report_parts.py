"""The parts that the report is made of: markup, pictures as SVG, pieces of text, dense models of equal size, numbers in words."""

import types

import numpy as np
from report_cases import Page, made_run

from moe_jax.analysis.report import markup, overview, pictures, runs, text
from moe_jax.data.tokenizers import Bytes
from moe_jax.sizes import num_params


def test_markup_escapes():
    made = markup.tag("p", "<a> & b", markup.tag("br"), class_="x", title='"quoted" <', hidden=True, data_n=3, for_=None)
    assert made == '<p class="x" title="&quot;quoted&quot; &lt;" hidden data-n="3">&lt;a&gt; &amp; b<br></p>'
    assert markup.tag("b", markup.join("1 < 2")) == "<b>1 &lt; 2</b>"
    assert markup.identifier("Run 1", "A & B!") == "run-1-a-b"
    assert markup.sentence_list(["a"]) == "a"
    assert markup.sentence_list(["a", "b", "c"]) == "a, b and c"


def test_tables_set_numbers_at_the_right():
    page = Page(markup.table("t", ("", "n", "text"), [("1", "1,000.5", "1 x"), ("2", "", "2")]))
    assert [(tag, attributes.get("class")) for tag, attributes in page.elements if tag in ("th", "td")] == [
        *(("th", None), ("th", "number"), ("th", None)),
        *(("th", None), ("td", "number"), ("td", None)) * 2,
    ]


def test_pictures_keep_the_numbers_of_their_axes():
    """Coordinates are rounded; what stands in the text of a picture is not."""
    drawn = (
        '<svg viewBox="0 0 72.000000 36"><g id="a"><path id="m" d="M 1.23456 2"/><use xlink:href="#m" style="fill: #1b2430"/>'
    )
    drawn += "<text style=\"font: 9px 'DejaVu Sans', sans-serif; text-anchor: end\">0.99965</text></g></svg>"
    made = pictures.inline_svg(drawn, "p", "What. It shows.")
    assert ">0.99965<" in made
    assert 'd="M 1.23 2"' in made
    assert 'id="p-m"' in made
    assert 'href="#p-m" style="fill: currentColor"' in made
    assert "font: 9px inherit; text-anchor: end" in made
    assert 'aria-label="What. It shows."' in made


def test_pieces_of_text():
    tokenizer = Bytes()
    assert [text.piece(tokenizer, token) for token in (65, 10, 0xE2, 256)] == ["A", "\n", "\\xe2", "⟨end⟩"]
    assert text.piece(None, 7) == "#7"
    assert text.visible(" a\n\t\x00") == "␣a⏎⇥\\u0000"
    assert text.first_experts(np.array([[[2, 1]], [[8, 3]], [[8, 8]]]), 8).tolist() == [[2], [3], [-1]]


def test_dense_models_of_equal_size(tmp_path):
    """As many parameters as asked for, to within half a step of the width; a model too small for that has none."""
    config = runs.read_runs([made_run(tmp_path, observed=False)])[0].config
    for params in (num_params(config.model).active, num_params(config.model).total):
        dense = overview.dense_equivalent(config, params).model
        assert dense.num_moe_layers == 0
        assert abs(num_params(dense).total - params) <= 3 * dense.d_model * dense.num_layers / 2
    assert overview.dense_equivalent(config, 10) is None


def test_numbers_in_words():
    assert [overview.short_number(n) for n in (999, 12_345, 3.4e9)] == ["999 ", "12.3 k", "3.4 G"]
    assert [overview.duration(s) for s in (1.25, 200, 7300, 2e6)] == ["1.2 s", "3 min 20 s", "2 h 1 min", "23.1 days"]
    assert runs.evenly(range(100), 4) == [0, 33, 66, 99]
    assert runs.evenly([1, 2], 4) == [1, 2]


def test_a_run_whose_only_step_was_compilation_has_no_speed():
    run = types.SimpleNamespace(series=lambda name: (np.array([1]), np.array([0.0])))
    assert overview._speed(run) == ""
