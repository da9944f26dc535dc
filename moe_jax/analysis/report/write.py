"""The page put together: one file that opens without a network, and its pictures as PNG files beside it."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence

from moe_jax.analysis.report import (
    compare,
    curves,
    drops,
    guide,
    heat_maps,
    overview,
    script,
    special,
    style,
    text,
    vocabulary,
    weights,
)
from moe_jax.analysis.report.markup import Html, identifier, join, paragraph, raw, tag
from moe_jax.analysis.report.pictures import Gallery, drawing
from moe_jax.analysis.report.runs import Run, read_runs
from moe_jax.config import ConfigError
from moe_jax.train import observation
from moe_jax.train.files import write_atomic
from moe_jax.train.observatory import can_observe

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
PAGE, PICTURES = "index.html", "figures"


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading with what stands under it."""

    id: str
    title: str
    body: Sequence[Html | str]
    parts: Sequence["Section"] = ()


def write_report(workdirs: Sequence[str | os.PathLike], out: str | os.PathLike = "") -> pathlib.Path:
    """Writes the report of these runs and returns its page.

    Args:
      workdirs: run folders.
      out: folder to write to: `index.html`, and `figures/` with every picture as PNG. "" is the folder `report` of the one run.

    Raises:
      ConfigError: no run, several runs and no `out`, or no matplotlib.
      ObservationError: an observation is damaged.
    """
    runs = read_runs(workdirs)
    if not out and len(runs) > 1:
        raise ConfigError(f"a report of {len(runs)} runs belongs to none of their folders; say where it goes with --out.")
    folder = pathlib.Path(out or pathlib.Path(runs[0].workdir) / "report")
    with drawing():
        sections = _sections(runs, folder / PICTURES)
    title = f"Report: {', '.join(run.name for run in runs)}"
    page = folder / PAGE
    lead = overview.lead(runs[0]) if len(runs) == 1 else ""
    write_atomic(page, _page(title, lead, sections))
    return page


def _sections(runs, pictures):
    how = Section("how-to-read-this", "How to read this", guide.guide())
    if len(runs) == 1:
        return [*_of_run(runs[0], Gallery(pictures), ""), how]
    sections = [Section("side-by-side", "The runs side by side", compare.side_by_side(runs, Gallery(pictures)))]
    for number, run in enumerate(runs, 1):
        prefix = f"run-{number}"
        sections.append(Section(prefix, run.name, [], _of_run(run, Gallery(pictures, prefix), prefix)))
    return [*sections, how]


def _of_run(run: Run, gallery: Gallery, prefix: str) -> list[Section]:
    """The sections of one run: those of which it has something, and a sentence on what is missing."""
    sections = [
        _section(prefix, "What was trained", overview.overview(run)),
        _section(prefix, "Learning", curves.learning(run, gallery)),
    ]
    if run.config.model.num_moe_layers:
        of_metrics = {"Balance over time": curves.balance, "Load by layer and expert": heat_maps.load}
        sections += [_section(prefix, title, make(run, gallery)) for title, make in of_metrics.items()]
        sections += _of_observation(run, gallery, prefix)
    else:
        words = "This is a dense model (model.moe.num_experts = 0): nothing is routed, so that there is nothing more to show."
        sections.append(_section(prefix, "Experts", [guide.missing(words)]))
    return [*sections, _section(prefix, "Time", curves.times(run, gallery))]


def _of_observation(run, gallery, prefix):
    if run.last is None:
        return [
            _section(prefix, "Specialisation and more", [_why_unobserved(run)]),
            _section(prefix, "Drops", drops.drops(run, gallery)),
        ]
    makers: dict[str, Callable[[], Sequence[Html]]] = {
        "Specialisation by domain": lambda: special.domains(run, gallery),
        "Specialisation by token": lambda: vocabulary.vocabulary(run, gallery),
        "Text in the colours of its experts": lambda: text.passages(run, prefix),
        "Experts chosen together": lambda: heat_maps.together(run, gallery),
        "Drops": lambda: drops.drops(run, gallery),
        "The experts' weights": lambda: weights.weights(run, gallery),
        "Saturation": lambda: weights.settled(run, gallery),
    }
    return [_section(prefix, title, make()) for title, make in makers.items()]


def _why_unobserved(run):
    if not can_observe(run.config.model):
        return guide.missing(
            f"The router {run.config.model.moe.router.name} mixes all tokens for every expert and chooses nothing, so that"
            " there is no specialisation, co-activation or text to show."
        )
    file = observation.path_of(run.workdir, overview.steps_done(run))
    command = f"python -m launch.evaluate --workdir={run.workdir} --observe={file}"
    return guide.missing(
        "This run has no observation, and specialisation, co-activation, text and weights are read from one: train with"
        " train.observe=True (the default), or observe its checkpoint with ",
        tag("code", command),
        ".",
    )


def _section(prefix, title, body):
    return Section(identifier(prefix, title), title, body)


def _page(title, lead, sections):
    contents = tag("nav", tag("h2", "Contents", id="contents"), _contents(sections), aria_labelledby="contents")
    closing = "Every picture is a file in figures/ too. The page needs no network."
    main = tag("main", *(_show(section, 2) for section in sections), tag("footer", paragraph(closing)), id="main")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),
        raw(f"<style>{style.style_sheet()}</style>"),
    )
    body = tag(
        "body",
        tag("a", "To the content", class_="skip", href="#main"),
        tag(
            "div", tag("header", tag("h1", title), tag("p", lead, class_="lead") if lead else ""), contents, main, class_="page"
        ),
        raw(f"<script>{script.script()}</script>"),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _contents(sections):
    entries = [
        tag("li", tag("a", section.title, href=f"#{section.id}"), _contents(section.parts) if section.parts else "")
        for section in sections
    ]
    return tag("ol", *entries)


def _show(section, level):
    heading = tag(f"h{level}", section.title, id=f"{section.id}-heading")
    inner = join(*section.body, *(_show(part, level + 1) for part in section.parts))
    return tag("section", heading, inner, id=section.id, aria_labelledby=f"{section.id}-heading")
