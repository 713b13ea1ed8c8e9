"""`gamayun align`: the table of a result, and a picture of each parallel set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gamayun_jax.report.figures import axes, colours_of, label_ends, styled
from gamayun_jax.report.read_run import INK, PAPER


def best_layer(result: Mapping[str, Any], name: str, kind: str = "plain") -> int:
    """The layer with the greatest mean accuracy, the first of equals."""
    return int(np.argmax(result["sets"][name]["retrieval"][kind]["mean"]))


@styled
def alignment_figure(result: Mapping[str, Any], name: str) -> Any:
    """Accuracy@1 by layer, each language's mean over the others; heat maps of all pairs
    at the best layers, plain and with languages' means taken off."""
    told, layers = result["sets"][name], result["layers"]
    languages = told["languages"]
    figure, grid = axes(11.0, 7.6, 2, 2)
    for column, kind in enumerate(("plain", "centred")):
        found = told["retrieval"][kind]
        curve, heat = grid[column], grid[2 + column]
        lines = {}
        for k in languages:
            rest = [j for j in languages if j != k]
            ways = [found["accuracy"][k][j] for j in rest]
            ways += [found["accuracy"][j][k] for j in rest]
            lines[k] = np.mean(ways, axis=0)
        colours = colours_of(languages)
        for k, line in lines.items():
            curve.plot(layers, line, color=colours[k], lw=1.0)
        curve.plot(layers, found["mean"], color=INK, lw=2.2)
        curve.axhline(told["chance"], color=INK, lw=0.8, linestyle=(0, (4, 3)))
        curve.set_ylim(0, 1.06 * max(told["chance"], *map(np.max, lines.values())))
        title = (
            "states as they are" if kind == "plain" else "mean of language taken off"
        )
        curve.set_title(f"{name}: accuracy@1, {title}; thick: mean, dashed: chance")
        curve.set_xlabel("layer (0: embedding)")
        curve.xaxis.get_major_locator().set_params(integer=True)
        curve.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
        label_ends(curve, [(k, y[-1], colours[k]) for k, y in lines.items()], 0.45)
        layer = best_layer(result, name, kind)
        matrix = np.full((len(languages), len(languages)), np.nan)
        for i, a in enumerate(languages):
            for j, b in enumerate(languages):
                if a != b:
                    matrix[i, j] = found["accuracy"][a][b][layer]
        top = float(np.nanmax(matrix))
        image = heat.imshow(matrix, cmap="viridis", vmin=0, vmax=max(top, 1e-9))
        heat.grid(visible=False)
        heat.set_xticks(range(len(languages)), languages)
        heat.set_yticks(range(len(languages)), languages)
        heat.set(xlabel="retrieved from", ylabel="query", title=f"layer {layer}")
        for (i, j), value in np.ndenumerate(matrix):
            if i != j:
                dark = value < 0.6 * top
                text = f"{100 * value:.0f}"
                colour = PAPER if dark else INK
                heat.text(j, i, text, ha="center", va="center", color=colour, size=7)
        bar = figure.colorbar(image, ax=heat, shrink=0.9)
        bar.ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    return figure


def write_figures(result: Mapping[str, Any], out: Path) -> None:
    """OUT/<set>.png of each set of an alignment.json."""
    for name in result["sets"]:
        alignment_figure(result, name).savefig(out / f"{name}.png", dpi=150)


def table(result: Mapping[str, Any]) -> str:
    """Text for the terminal: by language, retrieval with all others at the best layers,
    and parity; then the consistency of answers."""
    lines = []
    for name, told in result["sets"].items():
        best = {kind: best_layer(result, name, kind) for kind in ("plain", "centred")}
        lines.append(
            f"{name}: {told['units']} units, chance {told['chance']:.4f}; accuracy@1 "
            f"at layer {best['plain']}, centred at layer {best['centred']}, of "
            f"{result['layers'][-1]}"
        )
        lines.append(
            f"{'':6}{'from':>8}{'to':>8}{'centred from':>14}{'to':>8}{'parity':>9}"
        )
        for k in told["languages"]:
            cells = []
            for kind, layer in best.items():
                accuracy = told["retrieval"][kind]["accuracy"]
                rest = [j for j in told["languages"] if j != k]
                cells.append(float(np.mean([accuracy[k][j][layer] for j in rest])))
                cells.append(float(np.mean([accuracy[j][k][layer] for j in rest])))
            parity = told["parity"].get(k)
            last = f"{parity:9.3f}" if parity is not None else f"{'-':>9}"
            a, b, c, d = cells
            lines.append(f"{k:6}{a:8.3f}{b:8.3f}{c:14.3f}{d:8.3f}{last}")
        both = (told["retrieval"][kind]["mean"][layer] for kind, layer in best.items())
        plain, centred = both
        lines.append(f"{'mean':6}{plain:8.3f}{plain:8.3f}{centred:14.3f}{centred:8.3f}")
    for name, told in result["consistency"].items():
        shown = {k: "-" if v is None else f"{v:.3f}" for k, v in told["mean"].items()}
        lines.append(
            f"{name} ({told['metric']}): two languages pick the same in "
            f"{shown['same']} of items (by accuracy alone {shown['expected']}, chance "
            f"{shown['chance']}), in {shown['same_wrong']} where both are wrong "
            f"(chance {shown['chance_wrong']})"
        )
    return "\n".join(lines)
