"""Figures of representations: what two views share during training, layers and spectra."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmae_fast.evaluation.page import CYCLE as CYCLE  # for those who draw by these functions
from mmae_fast.evaluation.report import STYLE

# Key in metrics.jsonl after ``backbone_`` or ``projector_``; title; axis.
PANELS = (
    ("mutual_information", "Mutual information", "nats"),
    ("joint_entropy", "Joint entropy", "nats"),
    ("effective_rank", "Effective rank", "exp(H₁)"),
)
# Key of a layer's measures, and its name in the table and the heat map; "views" and "next" are the
# mutual information of two views, and of this layer and the next.
LAYER_COLUMNS = (
    ("entropy_1", "H₁"),
    ("entropy_2", "H₂"),
    ("effective_rank", "eff.\nrank"),
    ("rankme", "RankMe"),
    ("slope", "slope"),
    ("views_mutual_information_1", "views\nα = 1"),
    ("views_mutual_information_2", "views\nα = 2"),
    ("next_mutual_information_1", "next\nα = 1"),
    ("token_entropy_1_mean", "tokens\nH₁"),
    ("token_entropy_1_std", "tokens\nstd"),
)


@dataclass(frozen=True)
class Curve:
    """One training in a figure."""

    label: str | None  # none: another seed of what is labelled already
    colour: str
    records: list[dict[str, Any]]  # of metrics.jsonl


def draw_information(path: Path, curves: list[Curve], parts: tuple[str, ...]) -> None:
    """Mutual information, joint entropy and effective rank over the epochs.

    One row for each of ``parts``: "projector", "backbone". Full lines α = 1, dotted lines α = 2.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 0.9 + 3 * len(parts)), dpi=150, layout="constrained")
        rows = figure.subplots(len(parts), len(PANELS), squeeze=False)
        for part, row in zip(parts, rows, strict=True):
            for axis, (key, title, unit) in zip(row, PANELS, strict=True):
                for curve in curves:
                    _information_line(axis, curve, f"{part}_{key}")
                axis.set(title=f"{title}, {part}", ylabel=unit, xlabel="epoch")
                axis.set_xlim(left=0)
        labelled = {
            line.get_label(): line
            for axis in rows.flat
            for line in axis.get_lines()
            if not line.get_label().startswith("_")
        }
        figure.legend(
            labelled.values(),
            labelled.keys(),
            loc="outside upper left",
            ncols=len(labelled),
            title="two views; α = 1 full lines, α = 2 dotted",
            title_fontsize=9,
            alignment="left",
        )
        _save(figure, path)


def _information_line(axis: Axes, curve: Curve, key: str) -> None:
    styles = {key: "-"} if key.endswith("rank") else {f"{key}_1": "-", f"{key}_2": ":"}
    for name, style in styles.items():
        points = [(record["epoch"], record[name]) for record in curve.records if name in record]
        label = curve.label if style == "-" else None
        if points:
            axis.plot(*zip(*points, strict=True), style, color=curve.colour, label=label)


def draw_table(
    path: Path, title: str, rows: dict[str, dict[str, Any]], columns: list[tuple[str, str]]
) -> None:
    """Heat map: a row for each layer, a column (key, heading) for each measure."""
    cells = [[row.get(key, math.nan) for key, _ in columns] for row in rows.values()]
    shades = zip(*(_shades(column) for column in zip(*cells, strict=True)), strict=True)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        size = (2.2 + 1.05 * len(columns), 1.1 + 0.34 * len(rows))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axis = figure.subplots()
        axis.imshow(list(shades), aspect="auto", cmap="Blues", vmin=-0.15, vmax=1.8)
        for y, row in enumerate(cells):
            for x, value in enumerate(row):
                text = f"{value:.3g}" if math.isfinite(value) else "–"
                axis.text(x, y, text, ha="center", va="center", fontsize=8.5, color="#20262d")
        axis.set_xticks(range(len(columns)), [name for _, name in columns], fontsize=8.5)
        axis.set_yticks(range(len(rows)), list(rows), fontsize=8.5)
        axis.tick_params(length=0)
        axis.set_title(f"{title} (shaded within each column)", fontsize=10, loc="left")
        _save(figure, path)


def _shades(column: tuple[float, ...]) -> list[float]:
    """A column on a scale from 0 to 1; NaN stays NaN."""
    known = [value for value in column if math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    scale = 1 / (high - low) if high > low else 0.0
    return [0.5 + (value - (low + high) / 2) * scale for value in column]


def draw_spectra(path: Path, title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Eigenvalues of each layer on logarithmic axes, with the power law where it was fitted."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
        axis = figure.subplots()
        colours = matplotlib.colormaps["viridis"]
        for position, (name, row) in enumerate(rows.items()):
            colour = colours(0.9 * position / max(1, len(rows) - 1))
            values = row["spectrum"]
            axis.loglog(range(1, len(values) + 1), values, color=colour, label=name, linewidth=1.3)
            first, last = row["fit_range"]
            if math.isfinite(row["slope"]):
                logs = [math.log(value) for value in values[first - 1 : last]]
                indices = [math.log(i) for i in range(first, last + 1)]
                level = sum(logs) / len(logs) + row["slope"] * sum(indices) / len(indices)
                ends = [math.exp(level - row["slope"] * math.log(i)) for i in (first, last)]
                axis.plot((first, last), ends, "--", color=colour, linewidth=0.9)
        axis.set(title=title, xlabel="index", ylabel="eigenvalue of ρ (they sum to 1)")
        axis.set_ylim(bottom=1e-9)
        axis.legend(fontsize=8, ncols=2)
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
