"""Report of a comparison of methods: figures as PNG and one self-contained HTML page.

Reads what the demo wrote (``demo.json`` and the ``metrics.jsonl`` of its runs), and needs no model,
so that a report can be made again from its folder.
"""

from __future__ import annotations

import base64
import html
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mmae_fast.config import METHODS
from mmae_fast.runs import read_metrics

Curves = dict[tuple[str, int], list[dict[str, Any]]]  # (method, seed) -> records of metrics.jsonl

# One colour per method in every figure and table; told apart under colour blindness too.
COLOURS = {
    "mae": "#6b7785",
    "u_mae": "#d9822b",
    "m_mae": "#1f6fb2",
    "von_neumann": "#3a8f5c",
    "renyi": "#9b4f96",
    "barlow_twins": "#1b8a8f",
    "spectral": "#c0504d",
    "simclr": "#8a6d3b",
}
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
# Key in a result, heading, format, and whether the largest value is marked as the best.
COLUMNS = (
    ("linear_probe", "linear probe", "{:.2%}", True),
    ("knn", "kNN", "{:.2%}", True),
    ("effective_rank", "effective rank", "{:.2f}", False),
    ("images_per_second", "img/s", "{:,.0f}", False),
    ("regularizer_share", "regulariser’s share of a step", "{:.2%}", False),
)
FIGURES = (
    ("entropy.png", "Effective rank and matrix entropy during training", "entropy"),
    ("loss.png", "Loss", "loss"),
    ("spectrum.png", "Spectrum of the features", "spectrum"),
    ("reconstructions.png", "Reconstructions", "reconstructions"),
)


def write_report(folder: Path) -> Path:
    """Draw the figures of a demo folder and write its ``report.html``."""
    demo = json.loads((folder / "demo.json").read_text())
    curves = {
        (result["method"], result["seed"]): read_metrics(folder / result["run"] / "metrics.jsonl")
        for result in demo["results"]
    }
    draw_entropy(folder / "entropy.png", curves, demo["embed_dim"])
    draw_loss(folder / "loss.png", curves)
    draw_spectrum(folder / "spectrum.png", demo["results"])
    path = folder / "report.html"
    path.write_text(render(folder, demo), encoding="utf-8")
    return path


# --- Figures -------------------------------------------------------------------------------------


def draw_entropy(path: Path, curves: Curves, dim: int) -> None:
    """Effective rank and matrix entropy of the held-out features over the epochs."""
    with _two_panels(path) as (left, right):
        _lines(left, curves, "effective_rank")
        _lines(right, curves, "matrix_entropy")
        left.set(title="Effective rank", ylabel=f"exp(H₁), of at most {dim}")
        right.set(title="Matrix entropy", ylabel="H₁ (nats)")
        left.set_ylim(bottom=0)
        right.set_ylim(bottom=0)


def draw_loss(path: Path, curves: Curves) -> None:
    """Reconstruction loss, and what the regulariser adds to it, over the epochs."""
    with _two_panels(path) as (left, right):
        _lines(left, curves, "recon_loss")
        _lines(right, curves, "regularizer")
        left.set(title="Reconstruction loss", ylabel="mean squared error, masked patches")
        right.set(title="Regulariser", ylabel="term added to the loss")


def draw_spectrum(path: Path, results: list[dict[str, Any]]) -> None:
    """Eigenvalues of the test features' density matrix, and their running sum."""
    with _two_panels(path) as (left, right):
        for result in results:
            values = result["spectrum"]
            label = METHODS[result["method"]][1] if result["seed"] == 0 else None
            style = {"color": COLOURS[result["method"]], "label": label}
            ranks = range(1, len(values) + 1)
            left.semilogy(ranks, values, **style)
            right.semilogx(ranks, list(itertools.accumulate(values)), **style)
        left.set(title="Eigenvalues of ρ", xlabel="index", ylabel="eigenvalue (they sum to 1)")
        left.set_ylim(bottom=1e-7)
        right.set(title="Running sum", xlabel="eigenvalues counted", ylabel="share of the trace")
        right.set_ylim(0, 1.03)


def save_reconstructions(
    path: Path, original: Tensor, masked: Tensor, restored: dict[str, Tensor], mask_ratio: float
) -> None:
    """One row of originals, one of masked images, one per model; pixels in [0, 1], NaN hidden."""
    rows = {"original": original, f"masked {mask_ratio:.0%}": masked, **restored}
    count = len(original)
    figure = Figure(figsize=(1.3 + 0.82 * count, 0.12 + 0.86 * len(rows)), dpi=160)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            _show(axis, image)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
    figure.subplots_adjust(0.16, 0.01, 0.995, 0.99, 0.06, 0.06)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def _show(axis: Axes, image: Tensor) -> None:
    axis.set(xticks=[], yticks=[], facecolor="#cfd6de")  # what NaN, a hidden patch, looks like
    for spine in axis.spines.values():
        spine.set_visible(False)
    if len(image) == 1:
        axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
    else:  # matplotlib draws a hidden pixel of a colour image only through transparency
        alpha = (~image[0].isnan()).float().numpy()
        axis.imshow(image[:3].nan_to_num().permute(1, 2, 0).numpy(), alpha=alpha)


@contextmanager
def _two_panels(path: Path) -> Iterator[tuple[Axes, Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), dpi=160, layout="constrained")
        left, right = figure.subplots(1, 2)
        yield left, right
        left.legend()
        figure.savefig(path, facecolor="white")


def _lines(axis: Axes, curves: Curves, key: str) -> None:
    for (method, seed), records in curves.items():
        points = [(record["epoch"], record[key]) for record in records if key in record]
        label = METHODS[method][1] if seed == 0 else None
        axis.plot(*zip(*points, strict=True), color=COLOURS[method], label=label)
    axis.set_xlabel("epoch")
    axis.set_xlim(left=0)


# --- Words and table -----------------------------------------------------------------------------


def summarise(results: list[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard deviation over the seeds, by method and column; 0 for one seed."""
    methods = list(dict.fromkeys(result["method"] for result in results))
    table = {}
    for method in methods:
        runs = [result for result in results if result["method"] == method]
        table[method] = {
            key: (
                statistics.fmean(run[key] for run in runs),
                statistics.stdev(run[key] for run in runs) if len(runs) > 1 else 0.0,
            )
            for key, *_ in COLUMNS
        }
    return table


def format_cell(form: str, value: tuple[float, float]) -> str:
    """``mean`` or, over several seeds, ``mean ± deviation``."""
    mean, deviation = value
    return form.format(mean) + (f" ± {form.format(deviation)}" if deviation else "")


def findings(demo: dict[str, Any]) -> list[str]:
    """What came out, in sentences made from the numbers, favourable or not."""
    table, seeds = summarise(demo["results"]), demo["seeds"]
    names = {method: METHODS[method][1] for method in table}
    accuracy = {method: row["linear_probe"][0] for method, row in table.items()}
    order = sorted(accuracy, key=accuracy.get, reverse=True)
    sentences = [f"Linear probe: {', '.join(f'{names[m]} {accuracy[m]:.2%}' for m in order)}."]
    if {"mae", "m_mae"} <= accuracy.keys():
        gap, share = 100 * (accuracy["m_mae"] - accuracy["mae"]), accuracy["mae"]
        # 95 % interval of the difference of two accuracies on test sets of this size.
        noise = 196 * math.sqrt(2 * share * (1 - share) / demo["test_images"])
        verdict = "level with MAE"
        if abs(gap) >= 0.005:
            verdict = f"{abs(gap):.2f} points {'ahead of' if gap > 0 else 'behind'} MAE"
        sentences.append(
            f"M-MAE is {verdict}, with {'one seed' if seeds == 1 else f'{seeds} seeds'}. That is "
            f"{'more than' if abs(gap) > noise else 'within'} the ±{noise:.2f} points by which two "
            f"such accuracies differ through the choice of {demo['test_images']:,} test images "
            "alone; what another seed would change is "
            + ("not measured." if seeds == 1 else "in the table.")
        )
        rank, base = table["m_mae"]["effective_rank"][0], table["mae"]["effective_rank"][0]
        sentences.append(
            f"Effective rank of the test features: M-MAE {rank:.2f}, MAE {base:.2f}, of at most "
            f"{demo['embed_dim']}. A higher rank is what the regulariser asks for; it is not "
            "accuracy."
        )
    raw = demo["raw_pixels"]
    verdict = (
        "The best features here do better than that in the linear probe."
        if accuracy[order[0]] > raw["linear_probe"]
        else "No method here beats that in the linear probe: a small encoder, a short training."
    )
    sentences.append(
        f"For scale: the same classifiers on raw pixels reach {raw['linear_probe']:.2%} (linear) "
        f"and {raw['knn']:.2%} (kNN). {verdict}"
    )
    sentences.append(
        "This is a demonstration of minutes on small images. It neither confirms nor refutes the "
        "published results, which are for ImageNet, 200 epochs and far larger encoders."
    )
    return sentences


def render(folder: Path, demo: dict[str, Any]) -> str:
    """The page: findings, table, figures, settings."""
    captions = {
        "entropy": (
            f"Class tokens of {demo['held_out']:,} held-out, unmasked images, scaled to unit norm "
            "and not centred: ρ = ẐᵀẐ / n, H₁ = −tr(ρ log ρ), effective rank = exp(H₁)."
        ),
        "loss": (
            "Left: what all methods have in common. Right: λ times the regulariser; its curves are "
            "different quantities and not to be compared in height. Means over the steps between "
            "two points."
        ),
        "spectrum": (
            f"Eigenvalues of ρ for all {demo['test_images']:,} test images, largest first. A "
            "collapsed representation has one large eigenvalue and nothing after it. The last one "
            "is close to zero in any case: the final LayerNorm takes one dimension away."
        ),
        "reconstructions": (
            "Test images, one mask for all methods. Visible patches are shown as they are; hidden "
            "ones as predicted, with the true mean and standard deviation of the patch put back."
        ),
    }
    figures = "".join(
        f'<figure><h2>{title}</h2><img alt="{title}" src="data:image/png;base64,'
        f'{base64.b64encode((folder / name).read_bytes()).decode()}">'
        f"<figcaption>{captions[key]}</figcaption></figure>"
        for name, title, key in FIGURES
    )
    seeds = (
        "One seed" if demo["seeds"] == 1 else f"{demo['seeds']} seeds, mean ± standard deviation"
    )
    return PAGE.format(
        lead=html.escape(demo["lead"]),
        findings="".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(demo)),
        table=_results_table(demo),
        seeds=seeds,
        protocol=html.escape(demo["protocol"]),
        figures=figures,
        settings=_definitions(demo["settings"]),
        versions=_definitions(demo["versions"]),
        command=html.escape(demo["command"]),
    )


def _results_table(demo: dict[str, Any]) -> str:
    table = summarise(demo["results"])
    head = "".join(f"<th>{heading}</th>" for _, heading, *_ in COLUMNS)
    best = {
        key: max(form.format(row[key][0]) for row in table.values())
        for key, _, form, marked in COLUMNS
        if marked
    }
    rows = ""
    for method, row in table.items():
        cells = ""
        for key, _, form, _ in COLUMNS:
            marked = ' class="best"' if best.get(key) == form.format(row[key][0]) else ""
            cells += f"<td{marked}>{format_cell(form, row[key])}</td>"
        dot = f'<span class="dot" style="background:{COLOURS[method]}"></span>'
        rows += f"<tr><th>{dot}{METHODS[method][1]}</th>{cells}</tr>"
    raw = demo["raw_pixels"]
    rows += (
        f'<tr class="aside"><th>raw pixels</th><td>{raw["linear_probe"]:.2%}</td>'
        f"<td>{raw['knn']:.2%}</td><td>{raw['effective_rank']:.2f}</td><td>–</td><td>–</td></tr>"
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _definitions(items: dict[str, Any]) -> str:
    rows = (
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>"
        for key, value in items.items()
        if value is not None
    )
    return f"<dl>{''.join(rows)}</dl>"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>MAE, U-MAE and M-MAE compared</title>
<style>
:root {{ color-scheme: light; }}
body {{ margin: 0; background: #fff; color: #20262d; line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
main {{ max-width: 960px; margin: 0 auto; padding: 48px 24px 64px; }}
h1 {{ font-size: 30px; line-height: 1.2; margin: 0 0 12px; letter-spacing: -0.01em; }}
h2 {{ font-size: 19px; margin: 44px 0 10px; }}
.lead {{ font-size: 17px; color: #46505b; margin: 0 0 8px; max-width: 780px; }}
ul {{ padding-left: 20px; margin: 0; max-width: 800px; }}
li {{ margin: 7px 0; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 9px 12px; text-align: right; border-bottom: 1px solid #e3e7eb; }}
thead th {{ color: #59636e; font-weight: 600; font-size: 13.5px; vertical-align: bottom;
  border-bottom: 2px solid #c4ccd4; }}
tbody th {{ text-align: left; font-weight: 600; white-space: nowrap; }}
.best {{ font-weight: 700; }}
.aside th, .aside td {{ color: #6b7580; font-weight: 400; border-bottom: none; }}
.dot {{ display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 9px; }}
.note, figcaption {{ color: #59636e; font-size: 13.5px; margin: 10px 0 0; max-width: 800px; }}
figure {{ margin: 0; }}
img {{ width: 100%; display: block; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0;
  font-size: 14px; }}
dt {{ color: #59636e; }}
dd {{ margin: 0; }}
code {{ background: #f2f4f7; padding: 2px 6px; border-radius: 4px; font-size: 14px; }}
</style>
</head>
<body><main>
<h1>MAE, U-MAE and M-MAE compared</h1>
<p class="lead">{lead}</p>
<h2>What came out</h2>
<ul>{findings}</ul>
<h2>Results</h2>
{table}
<p class="note">{seeds}. {protocol}</p>
{figures}
<h2>Settings</h2>
{settings}
<h2>Versions and machine</h2>
{versions}
<h2>To reproduce</h2>
<p><code>{command}</code></p>
</main></body>
</html>
"""
