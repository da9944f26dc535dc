"""Colours, once: of the pictures on white, of the page in light and in dark, of the experts of a text."""

INK = "#1b2430"  # text and axes; on the page the colour of its text
GRID = "#d3dae2"
FLOOR = "#6b7683"  # what a figure is compared with: noise floors, nulls, equal shares
NOTHING = "#6c7784"  # cells of a heat map without a value, whose colours are the same in both schemes
# curves and marks, at least 3:1 on the ground of their scheme
LIGHT = ("#1f6fd6", "#c2570c", "#15803d", "#8b3fd9", "#c81e5b", "#0e7490", "#7c6a0a", "#57606a")
DARK = ("#6cb0ff", "#ffa657", "#56d364", "#c89bff", "#ff7eb0", "#4fd1e0", "#d9c04f", "#b1bac4")
GRID_DARK, FLOOR_DARK = "#333c47", "#98a3b0"

MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")

HUES = (210, 30, 130, 280, 350, 180, 55, 245)  # degrees, of the experts of a text, neighbours far apart
LINES = ("none", "solid", "dotted", "double", "dashed", "wavy")  # above the letters, after the hues are used up


def series(i: int) -> str:
    """The colour of the i-th curve on white; they come round again."""
    return LIGHT[i % len(LIGHT)]


def mark(i: int) -> str:
    """The mark of the i-th curve."""
    return MARKS[i % len(MARKS)]


def dash(i: int) -> str:
    """The line style of the i-th curve: another one when the colours come round again."""
    return DASHES[i // len(LIGHT) % len(DASHES)]


def variables() -> dict[str, str]:
    """What stands on the page for each colour of a picture, by the colour."""
    names = {color: f"var(--s{i})" for i, color in enumerate(LIGHT)}
    return names | {INK: "currentColor", GRID: "var(--grid)", FLOOR: "var(--floor)"}
