"""`gamayun align`: the table of a result, and a picture of each parallel set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gamayun_jax.data.files import atomic
from gamayun_jax.report.figures import (
    INK,
    PAPER,
    axes,
    colours_of,
    label_ends,
    styled,
)
from gamayun_jax.report.formats import fixed
from gamayun_jax.tables import Table

# Hidden states as they are, and with each language's mean taken off.
KINDS = ("plain", "centred")


def best_layer(result: Mapping[str, Any], name: str, kind: str = "plain") -> int:
    """The layer with the greatest mean accuracy, the first of equals."""
    return int(np.argmax(result["sets"][name]["retrieval"][kind]["mean"]))


@styled
def alignment_figure(result: Mapping[str, Any], name: str) -> Any:
    """Accuracy@1 by layer, each language's mean over the others; heat maps of all pairs
    at the best layers, plain and with languages' means taken off."""
    height = 7.6
    figure, grid = axes(
        11.0, height, 2, 2, margins=(0.6, 0.7, 0.3, 0.45), gaps=(0.9, 0.8)
    )
    for column, kind in enumerate(KINDS):
        draw_layers(grid[column], result, name, kind, height / 2 - 0.75)
        draw_pairs(grid[2 + column], result, name, kind)
    return figure


def draw_layers(
    ax: Any, result: Mapping[str, Any], name: str, kind: str, height: float
) -> None:
    """Each language's accuracy by layer, the mean over others, forth and back."""
    of_set = result["sets"][name]
    accuracy, mean = (of_set["retrieval"][kind][k] for k in ("accuracy", "mean"))
    lines = {}
    for k, colour in colours_of(of_set["languages"]).items():
        rest = [j for j in of_set["languages"] if j != k]
        ways = [accuracy[k][j] for j in rest] + [accuracy[j][k] for j in rest]
        lines[k] = np.mean(ways, axis=0), colour
        ax.plot(result["layers"], lines[k][0], color=colour, lw=1.0)
    ax.plot(result["layers"], mean, color=INK, lw=2.2)
    ax.axhline(of_set["chance"], color=INK, lw=0.8, linestyle=(0, (4, 3)))
    most = max(of_set["chance"], *(np.max(y) for y, _ in lines.values()))
    ax.set_ylim(0, 1.06 * most)
    states = "states as they are" if kind == "plain" else "mean of language taken off"
    ax.set_title(f"{name}: accuracy@1, {states}; thick: mean, dashed: chance")
    ax.set_xlabel("layer (0: embedding)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    label_ends(ax, [(k, y[-1], colour) for k, (y, colour) in lines.items()], height)


def draw_pairs(ax: Any, result: Mapping[str, Any], name: str, kind: str) -> None:
    """A heat map of all pairs of languages at the best layer, in percent."""
    of_set, layer = result["sets"][name], best_layer(result, name, kind)
    languages, accuracy = of_set["languages"], of_set["retrieval"][kind]["accuracy"]
    matrix_LL = np.full((len(languages), len(languages)), np.nan)
    for i, a in enumerate(languages):
        for j, b in enumerate(languages):
            if a != b:
                matrix_LL[i, j] = accuracy[a][b][layer]
    top = float(np.nanmax(matrix_LL))
    image = ax.imshow(matrix_LL, cmap="viridis", vmin=0, vmax=max(top, 1e-9))
    ax.grid(visible=False)
    ax.set_xticks(range(len(languages)), languages)
    ax.set_yticks(range(len(languages)), languages)
    ax.set(xlabel="retrieved from", ylabel="query", title=f"layer {layer}")
    for (i, j), value in np.ndenumerate(matrix_LL):
        if i != j:
            colour = PAPER if value < 0.6 * top else INK
            text = f"{100 * value:.0f}"
            ax.text(j, i, text, ha="center", va="center", color=colour, size=7)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.9)
    bar.ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")


def write_figures(result: Mapping[str, Any], out: Path) -> None:
    """OUT/<set>.png of each set of an alignment.json."""
    for name in result["sets"]:
        with atomic(out / f"{name}.png") as temporary:
            alignment_figure(result, name).savefig(temporary, dpi=150, format="png")


def alignment_text(result: Mapping[str, Any]) -> str:
    """Text for the terminal: by language, retrieval with all others at the best layers,
    and parity; then the consistency of answers."""
    parts = []
    for name, of_set in result["sets"].items():
        best = {kind: best_layer(result, name, kind) for kind in KINDS}
        parts.append(
            f"{name}: {of_set['units']} units, chance {of_set['chance']:.4f}; "
            f"accuracy@1 at layer {best['plain']}, centred at layer "
            f"{best['centred']}, of {result['layers'][-1]}"
        )
        rows, languages = [], of_set["languages"]
        for k in languages:
            row = [k]
            for kind, layer in best.items():
                accuracy = of_set["retrieval"][kind]["accuracy"]
                rest = [j for j in languages if j != k]
                for ways in ([(k, j) for j in rest], [(j, k) for j in rest]):
                    row.append(fixed(np.mean([accuracy[a][b][layer] for a, b in ways])))
            rows.append([*row, fixed(of_set["parity"].get(k))])
        means = [
            fixed(of_set["retrieval"][kind]["mean"][layer])
            for kind, layer in best.items()
        ]
        mean = ["mean", *(m for m in means for _ in range(2)), ""]
        heads = ("", "from", "to", "centred from", "to", "parity")
        parts.append(Table(heads, rows, [mean]).text())
    for name, of_task in result["consistency"].items():
        shown = {k: fixed(v) for k, v in of_task["mean"].items()}
        parts.append(
            f"{name} ({of_task['metric']}): two languages pick the same in "
            f"{shown['same']} of items (by accuracy alone {shown['expected']}, chance "
            f"{shown['chance']}), in {shown['same_wrong']} where both are wrong "
            f"(chance {shown['chance_wrong']})"
        )
    return "\n".join(parts)
