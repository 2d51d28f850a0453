"""Figures and page of the experiment, from its results and from nothing else."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from mmae_fast.evaluation.page import COLOURS, format_cell
from mmae_fast.evaluation.plots import Curve, draw_information
from mmae_fast.training.config import METHODS
from mmae_fast.training.watch import MONITORED

MASKED, TWO_BRANCH = ("mae", "u_mae", "m_mae"), ("barlow_twins", "spectral")


def draw(out: Path, preset: str, results: list[dict[str, Any]]) -> None:
    """One figure for the two-branch methods (projector and backbone), one for the masked ones."""
    for family, methods in (("two-branch", TWO_BRANCH), ("masked", MASKED)):
        curves = [
            Curve(
                METHODS[result["method"]][1] if result["seed"] == 0 else None,
                COLOURS[result["method"]],
                result["curves"],
            )
            for result in results
            if result["method"] in methods
        ]
        parts = ("projector", "backbone") if methods is TWO_BRANCH else ("backbone",)
        if curves:
            draw_information(out / f"{preset}-{family}.png", curves, parts)


COLUMNS = (
    ("linear_probe", "linear probe", "{:.2%}"),
    ("knn", "kNN", "{:.2%}"),
    ("effective_rank", "effective rank", "{:.1f}"),
    ("mutual_information_1", "MI α=1", "{:.3f}"),
    ("mutual_information_2", "MI α=2", "{:.3f}"),
    ("joint_entropy_1", "joint H₁", "{:.3f}"),
    ("images_per_second", "img/s", "{:,.0f}"),
    ("monitor_share", "monitoring", "{:.2%}"),
)


def last_monitored(result: dict[str, Any]) -> dict[str, float]:
    return [record for record in result["curves"] if "backbone_entropy_1" in record][-1]


def cells(results: list[dict[str, Any]]) -> list[str]:
    """Mean ± standard deviation over the seeds, column by column."""
    row = []
    for key, _, form in COLUMNS:
        values = [
            result[key] if key in result else last_monitored(result)[f"backbone_{key}"]
            for result in results
        ]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        row.append(format_cell(form, (statistics.fmean(values), deviation)))
    return row


def by_method(content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in content["results"]:
        groups.setdefault(result["method"], []).append(result)
    return groups


def table(content: dict[str, Any]) -> list[str]:
    """The results in Markdown."""
    lines = [
        f"| | seeds | epochs | {' | '.join(name for _, name, _ in COLUMNS)} |",
        f"|---|---:|---:|{'---:|' * len(COLUMNS)}",
    ]
    for method, results in by_method(content).items():
        epochs = content["recipes"][method]["epochs"]
        row = " | ".join(cells(results))
        lines.append(f"| {METHODS[method][1]} | {len(results)} | {epochs:g} | {row} |")
    raw = content["raw_pixels"]
    known = [form.format(raw[key]) if key in raw else "–" for key, _, form in COLUMNS]
    lines.append(f"| raw pixels | – | – | {' | '.join(known)} |")
    return lines


def findings(content: dict[str, Any]) -> list[str]:
    """What came out, in sentences made from the numbers, favourable or not."""
    groups, said = by_method(content), []
    for method in TWO_BRANCH:
        for result in groups.get(method, []):
            first, last = result["curves"][0], last_monitored(result)
            moves = []
            for name, key in (
                ("mutual information", "mutual_information"),
                ("joint entropy", "joint_entropy"),
            ):
                for alpha in (1, 2):
                    a, b = (record[f"projector_{key}_{alpha}"] for record in (first, last))
                    verb = "rises" if b > a else "falls"
                    moves.append(f"{name} (α = {alpha}) {verb} from {a:.2f} to {b:.2f}")
            said.append(f"{METHODS[method][1]}, projector, in nats: {'; '.join(moves)}.")
    if {"mae", "m_mae"} <= groups.keys():
        for other in ("u_mae", "m_mae"):
            if other not in groups:
                continue
            gaps = [
                100 * (b["linear_probe"] - a["linear_probe"])
                for a, b in zip(groups["mae"], groups[other], strict=True)
            ]
            mean = statistics.fmean(gaps)
            spread, about = "", "one seed"
            if len(gaps) > 1:
                spread = f" ± {statistics.stdev(gaps):.2f}"
                about = f"mean ± standard deviation of {len(gaps)} seeds"
            rank = statistics.fmean(r["effective_rank"] for r in groups[other])
            base = statistics.fmean(r["effective_rank"] for r in groups["mae"])
            said.append(
                f"{METHODS[other][1]} against MAE, seed by seed: linear probe {mean:+.2f}{spread} "
                f"points ({about}); effective rank {rank:.1f} "
                f"against {base:.1f}."
            )
    best = max(statistics.fmean(r["linear_probe"] for r in runs) for runs in groups.values())
    raw = content["raw_pixels"]["linear_probe"]
    verdict = "above" if best > raw else "not above"
    said.append(
        f"The best linear probe, {best:.2%}, is {verdict} that of the raw pixels, {raw:.2%}. Runs "
        "of minutes neither confirm nor refute results published for ImageNet and 200 epochs."
    )
    return said


def section(out: Path, name: str, title: str, hardware: str) -> list[str]:
    path = out / f"{name}.json"
    lines = [f"## {title}: `make experiment-{name}`", ""]
    if not path.exists():
        return [*lines, f"Not yet measured (made for {hardware}).", ""]
    content = json.loads(path.read_text())
    spent = [result.get("seconds") for result in content["results"]]
    total = f", {sum(spent) / 60:.0f} minutes in all" if all(spent) else ""
    system = content["versions"]
    machine = system["gpu"] or f"{system['cpu']} ({system['threads']} threads)"
    if content["quick"]:
        lines += ["**A quick run: its numbers mean nothing.**", ""]
    lines += [
        f"{content['data']}, {content['images'][0]:,} + {content['images'][1]:,} images; {machine}"
        f"{total}; PyTorch {system['torch']}, {content['date']}.",
        "",
        *table(content),
        "",
        f"MI and joint entropy: of the encoder's features of two views of {MONITORED} held-out "
        "images at the end, in nats; rows normalised, not centred. Monitoring: its measured share "
        "of the training time. "
        f"± is the standard deviation over seeds. {content['protocol']}.",
        "",
        *(f"- {sentence}" for sentence in findings(content)),
        "",
    ]
    for family in ("two-branch", "masked"):
        figure = f"{name}-{family}.png"
        if (out / figure).exists():
            lines += [f"![Information of two views, {family} methods]({out.name}/{figure})", ""]
    first = next(iter(content["recipes"].values()))
    model = first["model"]
    return [
        *lines,
        f"Encoder: {model['depth']} blocks, {model['embed_dim']} wide, patches of "
        f"{model['patch_size']} pixels; batch {first['batch_size']}, AdamW, lr "
        f"{first['base_lr'] * first['batch_size'] / 256:g}, {first['precision']}. All settings, "
        f"runs and curves: [{name}.json]({out.name}/{name}.json).",
        "",
    ]


def write_page(out: Path, presets: dict[str, tuple[str, str]]) -> Path:
    """``experiments.md`` beside the folder, from the JSON files in it and from nothing else.

    presets: title and hardware of each experiment, by name.
    """
    lines = [
        "# Information during training",
        "",
        "Matrix mutual information and joint entropy of two views, and effective rank, while an "
        "encoder learns CIFAR-10 without labels; then linear probe and kNN of the frozen encoder. "
        "Quantities and question are those of *Information Flow in Self-Supervised Learning* "
        "(arXiv:2309.17281, figures 1 and 2). Written by `benchmarks/experiment.py`.",
        "",
    ]
    for name, (title, hardware) in presets.items():
        lines += section(out, name, title, hardware)
    path = out.parent / f"{out.name}.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path
