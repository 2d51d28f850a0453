"""The page of a report: findings in words, table, figures, settings, in one HTML file."""

from __future__ import annotations

import base64
import html
import math
import statistics
from pathlib import Path
from typing import Any

from mmae_fast.training.config import METHODS

Result = dict[
    str, Any
]  # method, seed, run; ``group`` where it is not the method; what was measured
Cell = tuple[float, float] | None  # mean and standard deviation over the seeds; none: not measured

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
# Of groups that are no method by themselves: the same method with several settings.
CYCLE = ("#1f6fb2", "#d9822b", "#3a8f5c", "#9b4f96", "#c0504d", "#6b7785", "#1b8a8f", "#8a6d3b")
# Key in a result, heading, format, and whether the largest value is marked as the best.
COLUMNS = (
    ("linear_probe", "linear probe", "{:.2%}", True),
    ("linear_probe_lars", "linear probe (LARS)", "{:.2%}", True),
    ("knn", "kNN", "{:.2%}", True),
    ("finetune", "fine-tuning", "{:.2%}", True),
    ("effective_rank", "effective rank", "{:.2f}", False),
    ("images_per_second", "img/s", "{:,.0f}", False),
    ("regularizer_share", "regulariser’s share of a step", "{:.2%}", False),
    ("epoch_data_wait_share", "waited for data, of an epoch", "{:.1%}", False),
)
# Shown only where some run has them.
OPTIONAL = ("linear_probe_lars", "finetune", "epoch_data_wait_share")
FIGURES = (
    ("entropy.png", "Effective rank and matrix entropy during training", "entropy"),
    ("loss.png", "Loss", "loss"),
    ("spectrum.png", "Spectrum of the features", "spectrum"),
    ("reconstructions.png", "Reconstructions", "reconstructions"),
)


def group_of(result: Result) -> str:
    """What a run is shown as: its method, or one of several settings of it."""
    return result.get("group", result["method"])


def groups_of(results: list[Result]) -> dict[str, tuple[str, str]]:
    """Name and colour of each group, in the order of the runs."""
    groups = dict.fromkeys(group_of(result) for result in results)
    return {
        group: (METHODS[group][1], COLOURS[group])
        if group in METHODS
        else (group, CYCLE[i % len(CYCLE)])
        for i, group in enumerate(groups)
    }


def columns_of(results: list[Result]) -> list[tuple[str, str, str, bool]]:
    """The columns to show."""
    measured = {key for result in results for key in result}
    return [c for c in COLUMNS if c[0] not in OPTIONAL or c[0] in measured]


def summarise(results: list[Result]) -> dict[str, dict[str, Cell]]:
    """Mean and standard deviation over the seeds, by group and column; 0 for one seed.

    None where a run of the group was not measured.
    """
    table: dict[str, dict[str, Cell]] = {}
    for group in groups_of(results):
        runs = [result for result in results if group_of(result) == group]
        table[group] = {
            key: _mean([run[key] for run in runs]) if all(key in run for run in runs) else None
            for key, *_ in COLUMNS
        }
    return table


def _mean(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def format_cell(form: str, value: Cell) -> str:
    """``mean`` or, over several seeds, ``mean ± deviation``."""
    if value is None:
        return "–"
    mean, deviation = value
    return form.format(mean) + (f" ± {form.format(deviation)}" if deviation else "")


def findings(content: dict[str, Any]) -> list[str]:
    """What came out, in sentences made from the numbers, favourable or not."""
    results = content["results"]
    table, names = summarise(results), groups_of(results)
    accuracy = {
        group: row["linear_probe"][0] for group, row in table.items() if row["linear_probe"]
    }
    order = sorted(accuracy, key=accuracy.get, reverse=True)
    sentences = []
    if order:
        listed = "; ".join(f"{names[group][0]} {accuracy[group]:.2%}" for group in order)
        sentences.append(f"Linear probe: {listed}.")
    if len(accuracy) < len(table):
        missing = "; ".join(names[group][0] for group in table if group not in accuracy)
        sentences.append(f"Not probed: {missing}.")
    if {"mae", "m_mae"} <= accuracy.keys() and "test_images" in content:
        sentences += _compare_with_mae(table, content)
    raw = content.get("raw_pixels")
    if raw and order:
        verdict = (
            "The best features here do better than that in the linear probe."
            if accuracy[order[0]] > raw["linear_probe"]
            else "No method here beats that in the linear probe: a small encoder, a short training."
        )
        sentences.append(
            f"For scale: the same classifiers on raw pixels reach {raw['linear_probe']:.2%} "
            f"(linear) and {raw['knn']:.2%} (kNN). {verdict}"
        )
    if content.get("demonstration", True):
        sentences.append(
            "This is a demonstration of minutes on small images. It neither confirms nor refutes "
            "the published results, which are for ImageNet, 200 epochs and far larger encoders."
        )
    return sentences


def _compare_with_mae(table: dict[str, dict[str, Cell]], content: dict[str, Any]) -> list[str]:
    mae, m_mae = table["mae"], table["m_mae"]
    share, seeds = mae["linear_probe"][0], content["seeds"]
    gap = 100 * (m_mae["linear_probe"][0] - share)
    # 95 % interval of the difference of two accuracies on test sets of this size.
    noise = 196 * math.sqrt(2 * share * (1 - share) / content["test_images"])
    verdict = "level with MAE"
    if abs(gap) >= 0.005:
        verdict = f"{abs(gap):.2f} points {'ahead of' if gap > 0 else 'behind'} MAE"
    sentences = [
        f"M-MAE is {verdict}, with {'one seed' if seeds == 1 else f'{seeds} seeds'}. That is "
        f"{'more than' if abs(gap) > noise else 'within'} the ±{noise:.2f} points by which two "
        f"such accuracies differ through the choice of {content['test_images']:,} test images "
        "alone; what another seed would change is "
        + ("not measured." if seeds == 1 else "in the table.")
    ]
    if mae["effective_rank"] and m_mae["effective_rank"]:
        sentences.append(
            f"Effective rank of the test features: M-MAE {m_mae['effective_rank'][0]:.2f}, MAE "
            f"{mae['effective_rank'][0]:.2f}, of at most {content['embed_dim']}. A higher rank is "
            "what the regulariser asks for; it is not accuracy."
        )
    return sentences


def render(folder: Path, content: dict[str, Any], figures: list[str]) -> str:
    """The page: findings, table, the figures of the given names, settings."""
    tested = f"{content['test_images']:,} test images" if "test_images" in content else "the images"
    held_out = content["held_out"]
    held_out = f"{held_out:,}" if isinstance(held_out, int) else held_out
    captions = {
        "entropy": (
            f"Class tokens of {held_out} held-out, unmasked images, scaled to unit "
            "norm and not centred: ρ = ẐᵀẐ / n, H₁ = −tr(ρ log ρ), effective rank = exp(H₁)."
        ),
        "loss": (
            "Left: what all masked autoencoders have in common. Right: λ times the regulariser; "
            "its curves are different quantities and not to be compared in height. Means over the "
            "steps between two points."
        ),
        "spectrum": (
            f"Eigenvalues of ρ for all {tested}, largest first. A collapsed representation has one "
            "large eigenvalue and nothing after it. The last one is close to zero in any case: the "
            "final LayerNorm takes one dimension away."
        ),
        "reconstructions": (
            "Test images, one mask for all methods. Visible patches are shown as they are; hidden "
            "ones as predicted, with the true mean and standard deviation of the patch put back."
        ),
    }
    drawn = "".join(
        f'<figure><h2>{title}</h2><img alt="{title}" src="data:image/png;base64,'
        f'{base64.b64encode((folder / name).read_bytes()).decode()}">'
        f"<figcaption>{captions[key]}</figcaption></figure>"
        for name, title, key in FIGURES
        if key in figures
    )
    seeds = content["seeds"]
    return PAGE.format(
        title=html.escape(content.get("title", "MAE, U-MAE and M-MAE compared")),
        lead=html.escape(content["lead"]),
        findings="".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(content)),
        table=_results_table(content),
        seeds="One seed" if seeds == 1 else f"{seeds} seeds, mean ± standard deviation",
        protocol=html.escape(content["protocol"]),
        figures=drawn,
        settings=_definitions(content["settings"]),
        versions=_definitions(content["versions"]),
        command=html.escape(content["command"]),
    )


def _results_table(content: dict[str, Any]) -> str:
    results = content["results"]
    table, names, columns = summarise(results), groups_of(results), columns_of(results)
    head = "".join(f"<th>{heading}</th>" for _, heading, *_ in columns)
    best = {}
    for key, _, form, marked in columns:
        values = [form.format(row[key][0]) for row in table.values() if row[key]]
        if marked and values:
            best[key] = max(values)
    rows = ""
    for group, row in table.items():
        name, colour = names[group]
        cells = ""
        for key, _, form, _ in columns:
            marked = row[key] and best.get(key) == form.format(row[key][0])
            tag = '<td class="best">' if marked else "<td>"
            cells += f"{tag}{format_cell(form, row[key])}</td>"
        dot = f'<span class="dot" style="background:{colour}"></span>'
        rows += f"<tr><th>{dot}{html.escape(name)}</th>{cells}</tr>"
    if raw := content.get("raw_pixels"):
        cells = "".join(
            f"<td>{format_cell(form, (raw[key], 0.0) if key in raw else None)}</td>"
            for key, _, form, _ in columns
        )
        rows += f'<tr class="aside"><th>raw pixels</th>{cells}</tr>'
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
<title>{title}</title>
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
<h1>{title}</h1>
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
