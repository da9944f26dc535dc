"""How the page looks, on a screen in light and dark and on paper."""

from moe_jax.analysis.report import palette
from moe_jax.analysis.report.markup import Html, raw


def _scheme(ground, ink, quiet, panel, grid, floor, series, light, saturation):
    """The colours of one scheme."""
    lines = [f"--ground:{ground};--ink:{ink};--quiet:{quiet};--panel:{panel};--grid:{grid};--floor:{floor};"]
    lines += [f"--s{i}:{color};" for i, color in enumerate(series)]
    return "".join(lines) + f"--link:{series[0]};--lightness:{light};--saturation:{saturation};"


LIGHT = _scheme("#ffffff", palette.INK, "#525d6a", "#f4f6f8", palette.GRID, palette.FLOOR, palette.LIGHT, "86%", "75%")
DARK = _scheme("#14181d", "#e4e9ee", "#aab4bf", "#1d232a", palette.GRID_DARK, palette.FLOOR_DARK, palette.DARK, "27%", "50%")

_PAGE = """
*{box-sizing:border-box}
html{font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;scroll-behavior:smooth}
body{margin:0;background:var(--ground);color:var(--ink)}
.page{max-width:84rem;margin:0 auto;padding:1.5rem;display:grid;gap:0 3rem;grid-template-columns:minmax(0,1fr)}
header{grid-column:1/-1}
main{min-width:0}
h1,h2,h3,h4{line-height:1.25;margin:2.2rem 0 .7rem;overflow-wrap:anywhere}
h1{font-size:1.9rem;margin-top:0}
h2{font-size:1.4rem;border-top:1px solid var(--grid);padding-top:1.4rem}
h3{font-size:1.12rem}
h4{font-size:1rem}
p,dl,.passage,details{max-width:48rem}
p{margin:.6rem 0}
a{color:var(--link)}
code,pre,.passage,.token{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
code{overflow-wrap:anywhere}
.lead{color:var(--quiet)}
.missing{border-left:4px solid var(--floor);padding:.4rem .9rem;background:var(--panel)}
nav ol{padding-left:2rem;margin:.4rem 0}
nav ol ol{padding-left:1rem;list-style:none}
nav li{margin:.15rem 0}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:1rem;background:var(--ground);padding:.5rem}
figure{margin:1.4rem 0}
figcaption{max-width:48rem;color:var(--quiet);font-size:.92rem;margin-top:.3rem}
.plot{overflow-x:auto}
.plot svg{display:block;width:calc(var(--inches)*6.25rem);max-width:100%;min-width:min(calc(var(--inches)*6.25rem),36rem);
height:auto;font-family:inherit;stroke-linejoin:round}
.plot svg *{stroke-linecap:butt}
svg .frame{display:none}
svg .frame.shown{display:inline}
.wide{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.92rem}
caption{text-align:left;font-weight:600;padding:.3rem 0}
th,td{padding:.28rem .8rem .28rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid)}
thead th{border-bottom:2px solid var(--floor);vertical-align:bottom}
tbody th{font-weight:500;min-width:4rem}
td:not(.number){min-width:10rem}
.number{font-variant-numeric:tabular-nums;text-align:right}
dt{font-weight:600;margin-top:.6rem}
dd{margin:0}
summary{cursor:pointer;padding:.3rem 0}
.control{display:none}
.js .control{display:block}
input[type=range]{width:min(30rem,100%);accent-color:var(--link);margin:.3rem 0;min-height:1.6rem}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
.shown-label{margin:.2rem 0}
output,.shown-label .on-paper{font-weight:600;font-variant-numeric:tabular-nums}
.on-paper{display:none}
.passage{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.9rem;line-height:1.75;border:1px solid var(--grid);
padding:.7rem .9rem;margin:.6rem 0;border-radius:4px;max-width:60rem}
.passage+.passage{margin-top:.3rem}
.passage span,.legend span,.token{border-radius:2px;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.legend{display:flex;flex-wrap:wrap;gap:.25rem .5rem;padding:0;margin:.5rem 0;list-style:none;font-size:.88rem;max-width:60rem}
.legend span{padding:.05rem .45rem}
.numbered .passage span[data-n]::after{content:attr(data-n);font-size:.62em;vertical-align:super;opacity:.85;margin-right:.1em}
.token{background:var(--panel);border:1px solid var(--grid);padding:0 .25rem;white-space:pre;
margin-right:.15rem;font-size:.86rem}
.control label{margin-right:1rem}
footer{color:var(--quiet);font-size:.9rem;border-top:1px solid var(--grid);margin-top:2.5rem;padding-top:.8rem}
@media (min-width:75rem){
.page{grid-template-columns:15rem minmax(0,1fr)}
.page>nav{position:sticky;top:1rem;align-self:start;max-height:calc(100vh - 2rem);overflow-y:auto;font-size:.9rem}
}
@media print{
html{font-size:10.5pt}
.page{display:block;padding:0;max-width:none}
.control,.skip,.on-screen{display:none!important}
.on-paper{display:inline}
svg .frame{display:none!important}
svg .frame.last{display:inline!important}
figure,tr,.wide,.passage{break-inside:avoid}
.passage{margin-right:2px}
h2,h3,h4{break-after:avoid}
.plot,.wide{overflow:visible}
.plot svg{min-width:0;max-width:100%}
a{color:inherit}
}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
"""


def style_sheet() -> Html:
    """The content of the page's style element."""
    dark = f"@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}"
    paper = f"@media print{{:root{{{LIGHT}}}}}"
    return raw(f":root{{color-scheme:light dark;{LIGHT}}}{dark}{paper}{_PAGE}{_experts()}")


def expert_colors() -> int:
    """Experts of a text that can be told apart by hue and line; the colours come round after as many."""
    return len(palette.HUES) * len(palette.LINES)


def _experts():
    """A class for each of them: a hue behind the letters, and a line above them, clear of underscores, once the hues are used up."""
    rules = []
    for i in range(expert_colors()):
        hue, line = palette.HUES[i % len(palette.HUES)], palette.LINES[i // len(palette.HUES)]
        above = "" if line == "none" else f";text-decoration:overline {line} 2px"
        rules.append(f".e{i}{{background:hsl({hue} var(--saturation) var(--lightness)){above}}}")
    return "\n".join(rules)
