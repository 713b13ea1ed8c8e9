"""What every page is made of: tables, sections, style, the frame.

A page is one file that loads nothing. Names are data: a text gets into it only through
`esc` (runs.py), or through matplotlib, which escapes it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable

from gamayun_jax.report.figures import DARK, LIGHT
from gamayun_jax.report.read_run import esc


def td(text: str, value: float | None = None, kind: str = "") -> str:
    """A cell of HTML, sorted by `value`."""
    return f'<td class="{kind}" data-v="{"" if value is None else value}">{text}</td>'


def html_table(heads: Iterable[str], body: Iterable[str], foot: Iterable[str]) -> str:
    """A table that sorts by a click on a heading; `body` and `foot` are HTML rows."""
    cells = "".join(f'<th scope="col" tabindex="0">{esc(h)}</th>' for h in heads)
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>'
        f"{''.join(body)}</tbody><tfoot>{''.join(foot)}</tfoot></table></div>"
    )


def section(title: str, text: str, *content: str) -> str:
    """A heading and a paragraph, whose text is HTML already, and what follows."""
    return f"<h2>{esc(title, 120)}</h2><p>{text}</p>{''.join(content)}"


def html_page(title: str, kind: str, parts: Iterable[str]) -> str:
    """A self-contained page of HTML parts; `title` and `kind` are escaped here."""
    title, kind = esc(title, 200), esc(kind, 60)
    digest = base64.b64encode(hashlib.sha256(SORT.encode()).digest()).decode()
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'\">"
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}: {kind.lower()}</title><style>{CSS}</style></head><body>"
        f"<h1>{title}</h1><p>{kind}</p>{''.join(parts)}"
        f"<script>{SORT}</script></body></html>\n"
    )


def variables(colours: Iterable[str]) -> str:
    return "".join(f"--c{i}:{c};" for i, c in enumerate(colours))


CSS = (
    f"""
:root{{color-scheme:light dark;--fg:#1d2530;--bg:#fff;--soft:#5d6877;--line:#dde2e8;
--good:#0b7a55;--bad:#c02a22;--card:#f4f6f8;{variables(LIGHT)}}}
@media(prefers-color-scheme:dark){{:root{{--fg:#e3e8ee;--bg:#13171c;--soft:#9ba7b5;
--line:#2d3540;--good:#4fd0a0;--bad:#ff8277;--card:#1c2229;{variables(DARK)}}}}}
"""
    + """
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif;
color:var(--fg);background:var(--bg);max-width:1080px;margin:0 auto;
padding:1.6rem 1rem 4rem;overflow-wrap:anywhere}
h1{font-size:1.8rem;line-height:1.2;margin:0}h2{font-size:1.25rem;margin:3rem 0 .2rem}
p{color:var(--soft);margin:.2rem 0 .8rem;max-width:80ch}
small{color:var(--soft);font-size:.8em}.scroll{overflow-x:auto;margin:.6rem 0}
svg{display:block;width:100%;min-width:640px;height:auto}.grid svg{min-width:0}
svg *{stroke-linejoin:round;stroke-linecap:butt}svg text{font-family:inherit}
.grid{display:grid;gap:.4rem 1.4rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
table{border-collapse:collapse;font-size:.875rem;width:100%;
font-variant-numeric:tabular-nums}
th,td{padding:.28rem .55rem;text-align:right;border-bottom:1px solid var(--line);
white-space:nowrap}th{color:var(--soft);font-weight:600;cursor:pointer}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;
background:var(--bg)}
th[aria-sort=ascending]:after{content:" ▲"}th[aria-sort=descending]:after{content:" ▼"}
tfoot td{font-weight:600;border-bottom:0}
tfoot tr:first-child td{border-top:2px solid var(--line)}
i{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.45em}
.better{color:var(--good)}.worse{color:var(--bad)}.same{color:var(--soft)}
.cards,.legend{display:flex;flex-wrap:wrap;gap:.6rem;margin:1.2rem 0}
.cards div{background:var(--card);border-radius:.5rem;padding:.5rem .9rem}
.cards span{color:var(--soft);font-size:.8rem}
.cards b{display:block;font-size:1.1rem;font-weight:600}
.legend{gap:.1rem 1.2rem;margin:.3rem 0;font-size:.875rem;max-width:none}
.legend svg{display:inline-block;width:2.4em;min-width:0;margin-right:.4em}
.gap{border:1px dashed var(--line);border-radius:.5rem;padding:.6rem .9rem}
.chain{list-style:none;padding:0;margin:.8rem 0}.chain .stage{border-color:var(--c0)}
.chain>li{border-left:3px solid var(--line);padding:.3rem 0 .3rem 1rem}
.chain .from{color:var(--soft);font-style:italic}.chain p{margin:0;font-size:.875rem}
.chain span{display:inline-block;background:var(--card);border-radius:.4rem;
padding:0 .5rem;margin:.1rem .3rem .1rem 0;font-size:.8rem}
"""
)
SORT = """
document.querySelectorAll("table").forEach(t=>[...t.tHead.rows[0].cells].forEach((h,i)=>{
const go=()=>{const d=h.getAttribute("aria-sort")=="ascending"?-1:1;
const v=r=>r.cells[i].dataset.v;
[...t.tHead.rows[0].cells].forEach(x=>x.removeAttribute("aria-sort"));
h.setAttribute("aria-sort",d>0?"ascending":"descending");
[...t.tBodies[0].rows].sort((a,b)=>(v(a)=="")-(v(b)=="")||d*(v(a)-v(b)))
.forEach(r=>t.tBodies[0].append(r))};
h.onclick=go;h.onkeydown=e=>{if(e.key=="Enter")go()}}))
"""
