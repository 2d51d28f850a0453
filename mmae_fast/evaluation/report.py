"""Report of a comparison of methods: figures as PNG and one self-contained HTML page.

Reads what was found (``demo.json`` or ``report.json``, and the ``metrics.jsonl`` of the runs), and
needs no model, so that a report can be made again from its folder.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmae_fast.evaluation.page import group_of, groups_of, render
from mmae_fast.training.runs import read_metrics

Record = dict[str, Any]
Curves = list[tuple[str, list[Record]]]  # group of each run -> records of metrics.jsonl

STYLE = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3ad",
    "axes.labelcolor": "#2b323a",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "xtick.color": "#59636e",
    "ytick.color": "#59636e",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def write_report(folder: Path, source: str = "demo.json") -> Path:
    """Draw the figures of what ``folder / source`` says and write ``report.html`` beside it.

    ``reconstructions.png`` is shown where the content's ``reconstructions`` does not deny it.
    """
    content = json.loads((folder / source).read_text())
    results = content["results"]
    curves = [(group_of(r), read_metrics(folder / r["run"] / "metrics.jsonl")) for r in results]
    colours = {group: colour for group, (_, colour) in groups_of(results).items()}
    names = {group: name for group, (name, _) in groups_of(results).items()}
    paint = _Paint(names, colours)
    figures = ["entropy", "loss"]
    draw_entropy(folder / "entropy.png", curves, paint, content["embed_dim"])
    draw_loss(folder / "loss.png", curves, paint)
    if any("spectrum" in result for result in results):
        draw_spectrum(folder / "spectrum.png", results, paint)
        figures.append("spectrum")
    if content.get("reconstructions", True):
        figures.append("reconstructions")
    path = folder / "report.html"
    path.write_text(render(folder, content, figures), encoding="utf-8")
    return path


class _Paint:
    """Colour of each group's lines, and a label for the first of them."""

    def __init__(self, names: dict[str, str], colours: dict[str, str]) -> None:
        self._names, self._colours = names, colours

    def __call__(self, axis: Axes, group: str) -> dict[str, Any]:
        shown = {line.get_label() for line in axis.get_lines()}
        name = self._names[group]
        return {"color": self._colours[group], "label": None if name in shown else name}


# --- Figures -------------------------------------------------------------------------------------


def draw_entropy(path: Path, curves: Curves, paint: _Paint, dim: int) -> None:
    """Effective rank and matrix entropy of the held-out features over the epochs."""
    with _two_panels(path) as (left, right):
        _lines(left, curves, paint, "effective_rank")
        _lines(right, curves, paint, "matrix_entropy")
        left.set(title="Effective rank", ylabel=f"exp(H₁), of at most {dim}")
        right.set(title="Matrix entropy", ylabel="H₁ (nats)")
        left.set_ylim(bottom=0)
        right.set_ylim(bottom=0)


def draw_loss(path: Path, curves: Curves, paint: _Paint) -> None:
    """Reconstruction loss, and what the regulariser adds to it, over the epochs.

    The loss itself where no run reconstructs.
    """
    with _two_panels(path) as (left, right):
        if not any("recon_loss" in record for _, records in curves for record in records):
            _lines(left, curves, paint, "loss")
            left.set(title="Loss", ylabel="of two branches")
            right.set_visible(False)
            return
        _lines(left, curves, paint, "recon_loss")
        _lines(right, curves, paint, "regularizer")
        left.set(title="Reconstruction loss", ylabel="mean squared error, masked patches")
        right.set(title="Regulariser", ylabel="term added to the loss")


def draw_spectrum(path: Path, results: list[Record], paint: _Paint) -> None:
    """Eigenvalues of the test features' density matrix, and their running sum."""
    with _two_panels(path) as (left, right):
        for result in results:
            values = result.get("spectrum", [])
            style = paint(left, group_of(result))
            ranks = range(1, len(values) + 1)
            left.semilogy(ranks, values, **style)
            right.semilogx(ranks, list(itertools.accumulate(values)), **style)
        left.set(title="Eigenvalues of ρ", xlabel="index", ylabel="eigenvalue (they sum to 1)")
        left.set_ylim(bottom=1e-7)
        right.set(title="Running sum", xlabel="eigenvalues counted", ylabel="share of the trace")
        right.set_ylim(0, 1.03)


@contextmanager
def _two_panels(path: Path) -> Iterator[tuple[Axes, Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), dpi=160, layout="constrained")
        left, right = figure.subplots(1, 2)
        yield left, right
        if left.get_legend_handles_labels()[0]:
            left.legend()
        figure.savefig(path, facecolor="white")


def _lines(axis: Axes, curves: Curves, paint: _Paint, key: str) -> None:
    for group, records in curves:
        points = [(record["epoch"], record[key]) for record in records if key in record]
        if points:
            axis.plot(*zip(*points, strict=True), **paint(axis, group))
    axis.set_xlabel("epoch")
    axis.set_xlim(left=0)
