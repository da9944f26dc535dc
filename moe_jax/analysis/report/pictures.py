"""Pictures of the report: each one drawn once and kept twice, as a PNG on white and as SVG in the page, whose colours follow the page.

Text stays text in the SVG; heat maps are images of one pixel a cell in it. What a picture shows is said in words too: as its label for
those who do not see it, and below it.
"""

import base64
import contextlib
import io
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moe_jax.analysis.figure import make_figure
from moe_jax.analysis.report import palette
from moe_jax.analysis.report.markup import Html, identifier, join, raw, tag

DPI = 150  # of the PNG files
POINTS = 500  # of a curve; longer ones are thinned
PANELS = 3  # beside each other
WIDTH = 9.4  # inches of the page's column, that is `6.25rem` each
FRAMES = "frames"  # name of the image that a slider changes
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "figure.titlesize": 11.0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": palette.GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "axes.unicode_minus": True,
    "text.parse_math": False,  # names are names, whatever they are
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), palette.INK),
}


@dataclass(frozen=True, eq=False)
class Frame:
    """One image of several that share axes and colours.

    Attributes:
      rgba: uint8 [rows, columns, 4].
      label: which one it is, e.g. its step.
      finding: what it shows, a sentence.
    """

    rgba: np.ndarray
    label: str
    finding: str


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """The look of the pictures made within. Raises ConfigError when matplotlib is not installed."""
    make_figure(1, 1)
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


class Gallery:
    """Keeps the pictures of one page: PNG files in a folder, the SVG in what `show` returns."""

    def __init__(self, folder: str | os.PathLike, prefix: str = ""):
        """
        Args:
          folder: of the PNG files; made if absent.
          prefix: of their names and of all ids, one for each run of the page.
        """
        self.folder, self.prefix = pathlib.Path(folder), prefix
        self.folder.mkdir(parents=True, exist_ok=True)

    def show(self, figure, name: str, finding: str, frames: Sequence[Frame] = ()) -> Html:
        """Writes a picture and returns it as an element of the page.

        Args:
          figure: of `make_figure`; its title says what is shown.
          name: of the file, without its ending.
          finding: what is to be seen in it, in words.
          frames: images to take the place of the one named `FRAMES`, the last one being that which the figure has; a slider chooses.
        """
        name = identifier(self.prefix, name)
        figure.get_layout_engine().execute(figure)  # once for both files
        figure.set_layout_engine("none")
        title = figure.get_suptitle()
        if frames:  # a file has the last one alone
            _entitle(figure, f"{title}. {frames[-1].label}")
        figure.savefig(self.folder / f"{name}.png", dpi=DPI, facecolor="white")
        _entitle(figure, title)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="none", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        svg = inline_svg(buffer.getvalue(), name, f"{title}. {finding}", frames)
        controls, caption = "", [finding]
        if len(frames) > 1:
            controls, caption = (
                _slider(name, frames),
                [tag("span", finding, class_=f"on-{where}") for where in ("screen", "paper")],
            )
        caption = tag("figcaption", *caption, aria_hidden="true")  # the picture's label says it too
        return tag(
            "figure", controls, tag("div", svg, class_="plot"), caption, id=f"figure-{name}", data_frames=len(frames) > 1
        )


def inline_svg(text: str, name: str, label: str, frames: Sequence[Frame] = ()) -> Html:
    """Matplotlib's SVG as an element of a page: no address, no style sheet, ids of its own, colours that are the page's.

    Args:
      text: of the file.
      name: that no other picture of the page has.
      label: what it shows, in words.
      frames: as in `Gallery.show`.
    """
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<defs>\s*<style.*?</defs>|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(rf'<image[^>]*id="{FRAMES}"[^>]*/>', lambda found: _images(found[0], frames), body)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    body = re.sub(r'(?<= id=")(?=[^"])|(?<=url\(#)|(?<=href="#)', f"{name}-", body)
    body = re.sub(
        r"font-family: [^;\"]*;? ?|(?<=font: )([\w. ]*?px) [^;\"]*",
        lambda found: f"{found[1]} inherit" if found[1] else "",
        body,
    )
    body = re.sub(r' transform="rotate\(-?0(?:\.0)? [^"]*"', "", body)
    body = re.sub(r"<[^>]*>", lambda element: _rounded(element[0]), body)
    for color, variable in palette.variables().items():
        body = body.replace(color, variable)
    body = re.sub(r">\s+<", "><", body)
    attributes = {"viewBox": f"0 0 {width} {height}", "style": f"--inches:{float(width) / 72:.2f}"}
    return tag("svg", raw(re.sub(r"\s*\n\s*", " ", body)), role="img", aria_label=label, **attributes)


def new_figure(title: str, width: float, height: float):
    """A figure with a title, inches."""
    figure = make_figure(max(width, 0.4 + 0.093 * len(title)), height)
    _entitle(figure, title)
    return figure


def panels(title: str, count: int, width: float = 0.0, height: float = 2.5, columns: int = PANELS, **shared):
    """(figure, axes in a list): `count` axes beside and below each other.

    Args:
      title: of all.
      count: of axes.
      width: inches of one; 0 is what fills the page's column, or half of it for one alone.
      height: inches of one.
      columns: axes beside each other, at most.
      shared: what `Figure.subplots` takes.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(title, columns * (width or WIDTH / max(columns, 2)), height * rows + 0.35)
    axes = figure.subplots(rows, columns, squeeze=False, **shared).ravel().tolist()
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def thinned(*arrays: np.ndarray) -> list[np.ndarray]:
    """Arrays of one length, at most `POINTS` long: evenly spaced entries, the first and the last among them."""
    keep = np.unique(np.linspace(0, len(arrays[0]) - 1, POINTS).round().astype(int)) if len(arrays[0]) else []
    return [array[keep] for array in arrays]


def heat_map(ax, values, color_map: str, norm, *, name: str | None = None, y_label: str = "layer", most: int = 16):
    """An image of one pixel a cell, experts numbered along it, at most `most` of them."""
    rows, columns = values.shape
    image = ax.imshow(values, cmap=color_map, norm=norm, aspect="auto", interpolation="none")
    image.set_gid(name)
    ax.set_xticks(ticks(columns, most))
    ax.set_yticks(ticks(rows, most))
    ax.grid(False)
    ax.set_xlabel("expert")
    ax.set_ylabel(y_label)
    return image


def color_bar(figure, image, axes, label: str, **settings):
    """The colours of heat maps beside them: a strip a sixth of an inch wide, whatever their height."""
    height = figure.get_size_inches()[1]
    return figure.colorbar(image, ax=axes, label=label, aspect=6 * height, fraction=0.05, **settings)


def ticks(count: int, most: int = 16) -> range:
    """Places of at most `most` numbered entries."""
    return range(
        0, count, next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 1000) if count <= most * step)
    )


def _rounded(element):
    """Numbers of an element's attributes to two decimals; not its image, nor what stands between elements."""
    return element if "base64" in element else re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", element)


def _entitle(figure, title):
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")


def _images(image, frames):
    """The image of the SVG once for each frame; the last one is shown until another is asked for, and on paper."""
    return join(*(raw(_image(image, frame, last=frame is frames[-1])) for frame in frames)) if frames else image


def _image(image, frame, last):
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, frame.rgba, format="png", metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    image = re.sub(r'href="[^"]*"', f'href="data:image/png;base64,{data}"', image)
    return re.sub(rf' id="{FRAMES}"', f' class="frame{" shown last" if last else ""}"', image)


def _slider(name, frames):
    """A range, the label of the frame that is shown, and all labels for the page's code; without it the last one stands."""
    last = frames[-1]
    entries = [tag("li", frame.label, data_finding=frame.finding) for frame in frames]
    control = tag(
        "input",
        type="range",
        id=f"{name}-range",
        min=0,
        max=len(frames) - 1,
        value=len(frames) - 1,
        step=1,
        autocomplete="off",
        aria_valuetext=last.label,
    )
    label = tag("label", "Shown: ", for_=f"{name}-range")
    shown = tag("output", last.label, for_=f"{name}-range", class_="on-screen")
    return tag(
        "div",
        tag("p", label, shown, tag("span", last.label, class_="on-paper"), class_="shown-label"),
        tag("div", control, class_="control"),
        tag("ol", *entries, hidden=True),
        class_="slider",
    )
