"""HTML as text that is escaped unless it was made here: what a run says of itself never becomes part of the page's code."""

import html
import re
from collections.abc import Sequence

_NUMBER = re.compile(r"[-+\d.,%]*( ?[kMGTPE])?")
VOID = ("br", "col", "hr", "input", "link", "meta")


class Html(str):
    """Text that is HTML already. Only `tag`, `join` and `raw` make it."""

    __slots__ = ()


Child = str | Html


def raw(text: str) -> Html:
    """Declares `text` to be HTML: for code and pictures that this package wrote itself, never for what a run holds."""
    return Html(text)


def join(*children: Child) -> Html:
    """The children one after the other, plain text escaped."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child, quote=False) for child in children))


def tag(name: str, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """An element. Plain text among the children is escaped, and so are the attributes' values.

    Args:
      name: of the element.
      children: text and elements in it.
      attributes: `class_` stands for class, `for_` for for, and _ within a name for -; True is an attribute without a value, None and
        False are left out.
    """
    written = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    opening = f"<{' '.join(written)}>"
    return Html(opening if name in VOID else f"{opening}{join(*children)}</{name}>")


def paragraph(*children: Child) -> Html:
    """A paragraph."""
    return tag("p", *children)


def table(caption: str, header: Sequence[Child], rows: Sequence[Sequence[Child]]) -> Html:
    """A table that scrolls sideways when it has no room; the first cell of a row is its heading, columns of numbers stand at the right.

    Args:
      caption: what it shows.
      header: names of the columns; all of them empty for a list of facts.
      rows: cells, as many as names.
    """
    classes = ["number" if all(_NUMBER.fullmatch(cell) for cell in column) else None for column in zip(*rows, strict=True)]
    classes[:1] = [None]
    head = tag("tr", *(tag("th", name, scope="col", class_=kind) for name, kind in zip(header, classes, strict=True)))
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, class_=kind) for cell, kind in zip(row[1:], classes[1:], strict=True)),
        )
        for row in rows
    ]
    head = tag("thead", head) if any(header) else ""
    whole = tag("table", tag("caption", caption), head, tag("tbody", *body))
    # a box that scrolls must be reachable by keyboard, and then it needs a name
    return tag("div", whole, class_="wide", tabindex=0, role="region", aria_label=caption)


def details(summary: str, *children: Child) -> Html:
    """Something that opens when asked for."""
    return tag("details", tag("summary", summary), *children)


def identifier(*parts: str) -> str:
    """An id, or the name of a file, of words: letters, digits and - alone."""
    return "-".join(filter(None, (re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)))


def sentence_list(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
