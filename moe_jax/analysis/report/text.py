"""What tokens look like, and passages whose every token has the colour of its first expert."""

import json
from collections.abc import Sequence

import numpy as np

from moe_jax.analysis.report.heat_maps import LAYERS
from moe_jax.analysis.report.markup import Html, identifier, join, paragraph, tag
from moe_jax.analysis.report.runs import Run, evenly
from moe_jax.analysis.report.style import expert_colors
from moe_jax.data.tokenizers import Tokenizer

TOKENS = 400  # of a passage
LEGEND = 64  # experts of a legend
STAND_INS = {"\n": "⏎", "\r": "␍", "\t": "⇥", " ": "␣"}


def piece(tokenizer: Tokenizer | None, token: int) -> str:
    """The text that an id stands for; a byte that is no character alone as \\xNN, end of text and unknown ids by name."""
    if tokenizer is None:
        return f"#{token}"
    if token == tokenizer.eot:
        return "⟨end⟩"
    text = tokenizer.decode([token])
    return f"\\x{token:02x}" if text == "\ufffd" and tokenizer.kind == "bytes" else text


def visible(text: str) -> str:
    """The text with white space and control characters as signs."""
    return "".join(STAND_INS.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text) or "⟨nothing⟩"


def passages(run: Run, prefix: str) -> list[Html]:
    """A passage of each domain from the last observation's sample, a control for the layer, a legend.

    Args:
      run: with an observation.
      prefix: of the ids.
    """
    seen = run.last
    shown = evenly(range(len(run.layers)), LAYERS)
    labels = [f"layer {run.layers[i]}" for i in shown]
    group = identifier(prefix, "passages")
    control = tag(
        "input",
        type="range",
        id=f"{group}-layer",
        min=0,
        max=len(shown) - 1,
        value=len(shown) - 1,
        step=1,
        autocomplete="off",
        aria_valuetext=labels[-1],
    )
    which = tag(
        "p",
        tag("label", "Colours of ", for_=f"{group}-layer"),
        tag("output", labels[-1], for_=f"{group}-layer"),
        class_="shown-label",
    )
    box = tag("label", tag("input", type="checkbox", autocomplete="off"), " show the experts' numbers in the text")
    parts = [
        which,
        tag("div", control, class_="control", hidden=len(shown) == 1),
        tag("div", box, class_="control"),
        _legend(seen.about.num_experts),
    ]
    for x, domain in enumerate(seen.about.domains):
        rows = np.flatnonzero((seen.row_domain_R == x) & seen.row_valid_RS.any(1))
        if len(rows):
            parts += _passage(run, rows, shown, domain)
    words = (
        "The beginning of what was read of each domain. A token has the colour of its first expert, the one of the highest"
        " score; its number appears over the token, too."
    )
    return [paragraph(words), tag("div", *parts, data_layers=json.dumps(labels), data_colors=expert_colors())]


def first_experts(choice_TLM: np.ndarray, num_experts: int) -> np.ndarray:
    """The first expert of each token, [T, L]; -1 where a token has none."""
    there_TLM = choice_TLM < num_experts
    first_TL = np.take_along_axis(choice_TLM, there_TLM.argmax(-1)[..., None], -1)[..., 0].astype(np.int64)
    return np.where(there_TLM.any(-1), first_TL, -1)


def _passage(run, rows, shown, domain):
    """The name, what is to be seen in the layer shown, and the text: a box for each row, as rows do not go on from each other."""
    seen, boxes, firsts, room = run.last, [], [], TOKENS
    for row in rows:
        valid_S = seen.row_valid_RS[row]
        tokens = seen.row_tokens_RS[row][valid_S][:room].tolist()
        first_TL = first_experts(seen.row_choice_RSLM[row][valid_S], seen.about.num_experts)[:room, shown]
        firsts.append(first_TL)
        boxes.append([_span(run.tokenizer, token, first_L) for token, first_L in zip(tokens, first_TL.tolist(), strict=True)])
        room -= len(tokens)
        if room <= 0:
            break
    notes = [_note(first_T) for first_T in np.concatenate(firsts).T]
    name = tag("p", tag("strong", domain), ": ", tag("span", notes[-1], data_notes=json.dumps(notes)))
    label = f"Text of {domain}, each token in the colour of its expert"
    return [name, *(tag("div", *spans, class_="passage", role="group", aria_label=label) for spans in boxes)]


def _span(tokenizer, token, first_L):
    """One token; characters that show stay, the rest is made to. Lines end after it, so that its number stands before."""
    text = piece(tokenizer, token)
    kept = "".join(c if c.isprintable() or c == "\t" else "⏎\n" if c == "\n" else visible(c) for c in text) or visible(text)
    shown, last = kept.rstrip("\n"), first_L[-1]
    span = tag(
        "span",
        shown,
        class_=f"e{last % expert_colors()}" if last >= 0 else None,
        title=f"expert {last}" if last >= 0 else "no expert",
        data_e=" ".join("-" if expert < 0 else str(expert) for expert in first_L),
        data_n="-" if last < 0 else last,
    )
    return join(span, kept[len(shown) :])


def _note(first_T):
    """Which experts come first how often in a passage."""
    experts, counts = np.unique(first_T[first_T >= 0], return_counts=True)
    if not len(experts):
        return "no token has an expert here."
    order = np.argsort(-counts, kind="stable")[:3]
    most = ", ".join(f"expert {experts[i]} ({counts[i] / len(first_T):.0%})" for i in order)
    return f"{len(experts)} experts come first somewhere, most often {most}."


def _legend(num_experts: int) -> Html:
    """The colours by number."""
    count = min(num_experts, LEGEND)
    entries = [tag("li", tag("span", str(e), class_=f"e{e % expert_colors()}")) for e in range(count)]
    rest = [tag("li", f"… the colours come round again after {expert_colors()} experts")] if num_experts > count else []
    return tag("ul", tag("li", "expert:"), *entries, *rest, class_="legend", aria_label="Colours of the experts")


def token_list(tokenizer: Tokenizer | None, tokens: Sequence[tuple[int, str]]) -> Html:
    """Ids as signs in boxes, each with what is said of it when pointed at."""
    return join(*(tag("span", visible(piece(tokenizer, token)), class_="token", title=note) for token, note in tokens))
