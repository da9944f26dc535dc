"""The few lines of the page that move its sliders; without them it shows the last of everything."""

from moe_jax.analysis.report.markup import Html, raw

_SCRIPT = """
document.documentElement.classList.add("js");
for (const figure of document.querySelectorAll("figure[data-frames]")) {
  const range = figure.querySelector("input[type=range]"), output = figure.querySelector("output");
  const frames = figure.querySelectorAll(".frame"), entries = figure.querySelectorAll(".slider li");
  const picture = figure.querySelector("svg"), caption = figure.querySelector("figcaption .on-screen");
  const title = picture.getAttribute("aria-label").replace(caption.textContent, "");
  const show = () => {
    const now = Number(range.value), entry = entries[now];
    frames.forEach((frame, i) => frame.classList.toggle("shown", i === now));
    output.textContent = entry.textContent;
    range.setAttribute("aria-valuetext", entry.textContent);
    caption.textContent = entry.dataset.finding;
    picture.setAttribute("aria-label", title + entry.dataset.finding);
  };
  range.addEventListener("input", show);
  show();
}
for (const group of document.querySelectorAll("[data-layers]")) {
  const range = group.querySelector("input[type=range]"), output = group.querySelector("output");
  const labels = JSON.parse(group.dataset.layers), spans = group.querySelectorAll("[data-e]");
  const show = () => {
    const now = Number(range.value);
    output.textContent = labels[now];
    range.setAttribute("aria-valuetext", labels[now]);
    for (const span of spans) {
      const expert = span.dataset.e.split(" ")[now];
      span.className = expert === "-" ? "" : "e" + expert % group.dataset.colors;
      span.title = expert === "-" ? "no expert" : "expert " + expert;
      span.dataset.n = expert;
    }
    for (const note of group.querySelectorAll("[data-notes]")) note.textContent = JSON.parse(note.dataset.notes)[now];
  };
  range.addEventListener("input", show);
  show();
  const numbers = group.querySelector("input[type=checkbox]");
  numbers.addEventListener("change", () => group.classList.toggle("numbered", numbers.checked));
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
"""


def script() -> Html:
    """The content of the page's script element."""
    return raw(_SCRIPT)
