"""Pages in a real browser: what it complains of, and how they are laid out."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

WIDTHS = (390, 1280)  # a phone, a desktop
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")

# In a frame as wide as a screen: a browser's own window is never as narrow as a phone.
WATCH = """<script>
window.problems = [];
addEventListener("error", (e) => problems.push(`error: ${e.message}`));
addEventListener("unhandledrejection", (e) => problems.push(`rejected: ${e.reason}`));
addEventListener("securitypolicyviolation", (e) =>
  problems.push(`refused: ${e.violatedDirective} ${e.blockedURI}`));
</script>"""
LOOK = """<script>
const overflow = (doc) => doc.documentElement.scrollWidth - doc.defaultView.innerWidth;
const name = (x) => x.getAttribute("aria-label") || x.outerHTML.slice(0, 80);
const shown = (x) => !x.closest("details:not([open])");
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const doc = frame.contentDocument, view = frame.contentWindow;
    doc.querySelectorAll("details").forEach((x) => (x.open = true));
    const plot = doc.querySelector(".plot:has(path.line)");
    if (plot) {
      const box = plot.getBoundingClientRect();
      const init = { clientX: box.left + box.width / 2, clientY: box.top + 1 };
      plot.dispatchEvent(new view.PointerEvent("pointermove", init));
    }
    const told = doc.getElementById("told");
    const spills = [...doc.querySelectorAll("td, th")].filter((x) => {
      const box = x.getBoundingClientRect();
      return box.width && x.scrollWidth > Math.ceil(box.width) + 1;
    });
    return {
      problems: view.problems, width: view.innerWidth, overflow: overflow(doc),
      told: told && !told.hidden ? told.textContent : null, plots: Boolean(plot),
      drawn: doc.querySelectorAll("svg.chart, img").length,
      empty: [...doc.querySelectorAll("svg, img")].filter(shown).filter((x) => {
        const box = x.getBoundingClientRect();
        return box.width < 1 || box.height < 1;
      }).map(name),
      bare: [...doc.querySelectorAll("svg.chart")].filter(
        (x) => !x.querySelector("circle, path.line, path.bar, path[style]")).map(name),
      cut: [...doc.querySelectorAll(".scroll:has(table)")]
        .filter((x) => x.scrollWidth > x.clientWidth + 1)
        .map((x) => x.textContent.slice(0, 60)),
      spills: spills.map((x) => x.textContent.slice(0, 40)),
    };
  });
  document.body.replaceChildren(JSON.stringify(found));
});
</script>"""


def seen(page: Path, folder: Path) -> list[dict]:
    """What a browser finds of a page at each of WIDTHS.

    Args:
      folder: for what is written on the way.
    """
    text = page.read_text("utf-8")
    # The page's own policy stands, but for the script that watches.
    watched = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", text, count=1)
    watched = watched.replace("<title>", f"{WATCH}<title>", 1)
    assert watched.count("window.problems") == 1
    frames = "".join(
        f'<iframe width="{w}" height="900" srcdoc="{html.escape(watched)}"></iframe>'
        for w in WIDTHS
    )
    host = folder / "host.html"
    host.write_text(f"<!doctype html><body>{frames}{LOOK}", encoding="utf-8")
    assert BROWSER is not None
    out = subprocess.run(
        [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu",
            f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000",
            "--window-size=1400,1000", "--dump-dom", host.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    body = re.search(r"<body>(.*?)</body>", out, re.DOTALL)
    assert body is not None, out[-2000:]
    return json.loads(html.unescape(body[1]))


def check(page: Path, folder: Path) -> list[dict]:
    """Fail on what a reader would stumble over; returns what was seen."""
    found = seen(page, folder)
    for view, width in zip(found, WIDTHS, strict=True):
        assert view["problems"] == []
        assert view["width"] == width
        assert view["overflow"] <= 0, f"{width}: wider than the screen"
        assert view["empty"] == [], f"{width}: figures without a size"
        assert view["bare"] == [], f"{width}: figures without a mark"
        assert view["cut"] == [], f"{width}: tables that are cut"
        assert view["spills"] == [], f"{width}: cells that are cut"
        assert bool(view["told"]) == view["plots"], "no values under the pointer"
    return found
