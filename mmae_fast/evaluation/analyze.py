"""Matrix entropies of representations: layer by layer, head by head, and during training.

``mmae analyze`` takes checkpoints of this program, models of timm and files of features, and, for
curves, run folders.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmae_fast.evaluation.config import AnalyzeConfig
from mmae_fast.evaluation.layers import FEATURE_FILES, Layer, look_at, read_features
from mmae_fast.measures import ORDERS, shared_information, spectral_measures
from mmae_fast.training.config import UserError
from mmae_fast.training.runs import read_metrics


def run_analysis(config: AnalyzeConfig, console: Console | None = None) -> Path:
    """Analyse every source; print tables, write ``analysis.json`` and figures, return its path.

    Raises: UserError: a source that is none, images that do not fit, damaged files.
    """
    from mmae_fast.evaluation.plots import (  # matplotlib, when all else is done
        draw_spectra,
        draw_table,
    )

    console = console or Console()
    if not config.sources:
        raise UserError("nothing to analyse: name a run, a checkpoint, a timm model or a file")
    if config.count < 2:
        raise UserError(f"count must be >= 2, got {config.count}")
    runs = {s: Path(s) for s in config.sources if config.data is None and _is_run(Path(s))}
    content: dict[str, Any] = {}
    for source in config.sources:
        if source in runs:
            continue
        if Path(source).suffix in FEATURE_FILES and not Path(source).is_dir():
            layers, views = read_features(Path(source), config.count), None
        else:
            layers, views = look_at(source, config)
        name = _unique(Path(source).name.removesuffix(Path(source).suffix) or source, content)
        content[name] = {
            "source": source,
            "samples": len(next(iter(layers[0].pools.values()))),
            "layers": [measure(layers, views, i, config.center) for i in range(len(layers))],
        }
    figures = []
    for name, found in content.items():
        for pool in ("cls", "mean"):
            rows = {f["layer"]: row(f, pool) for f in found["layers"] if pool in f}
            if not rows:
                continue
            title = f"{name}, {'class token' if pool == 'cls' else 'mean of the tokens'}"
            console.print(layer_table(title, rows))
            figures.append(config.out / f"{name}-{pool}.png")
            draw_table(figures[-1], title, rows, _columns(rows))
            figures.append(config.out / f"{name}-{pool}-spectra.png")
            draw_spectra(figures[-1], title, rows)
        heads = {
            f["layer"]: {str(i): h["effective_rank"] for i, h in enumerate(f["heads"], 1)}
            for f in found["layers"]
            if f["heads"]
        }
        if heads:
            figures.append(config.out / f"{name}-heads.png")
            columns = [(key, f"head {key}") for key in max(heads.values(), key=len)]
            draw_table(figures[-1], f"{name}, effective rank of each head", heads, columns)
    if runs:
        content |= {
            Path(s).name: compare for s, compare in show_runs(runs, config, console).items()
        }
        figures.append(config.out / "curves.png")
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "analysis.json"
    settings = {"data": config.data, "center": config.center, "seed": config.seed}
    path.write_text(json.dumps(_plain({"settings": settings, "sources": content}), indent=1) + "\n")
    console.print(f"Numbers: {path}. Figures: {', '.join(str(figure) for figure in figures)}")
    return path


def _is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").is_file()


def _unique(name: str, taken: dict[str, Any]) -> str:
    return name if name not in taken else _unique(f"{name}-2", taken)


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- Measures ------------------------------------------------------------------------------------


def measure(
    layers: list[Layer], views: tuple[list[Layer], ...] | None, index: int, center: bool
) -> dict[str, Any]:
    """All measures of one layer.

    ``cls`` and ``mean``: ``spectral_measures`` of the whole images' features, ``views_…`` what the
    two views share, ``next_…`` what this layer and the next share. ``heads``: the first two of
    each head. ``tokens``: mean and standard deviation over the images of the tokens' entropy.
    """
    layer = layers[index]
    following = layers[index + 1] if index + 1 < len(layers) else None
    out: dict[str, Any] = {"layer": layer.name, "heads": [], "tokens": {}}
    for pool, z in layer.pools.items():
        out[pool] = spectral_measures(z, center)
        if views is not None:
            out[pool] |= _shared("views", *(view[index].pools[pool] for view in views), center)
        if following is not None and len(following.pools.get(pool, ())) == len(z):
            out[pool] |= _shared("next", z, following.pools[pool], center)
    for alpha, values in layer.token_entropies.items():
        out["tokens"][f"token_entropy_{alpha}_mean"] = values.mean().item()
        out["tokens"][f"token_entropy_{alpha}_std"] = values.std().item()
    for i, z in enumerate(layer.heads if layer.heads is not None else ()):
        out["heads"].append(spectral_measures(z.contiguous(), center))
        if views is not None:
            pair = (view[index].heads[i].contiguous() for view in views)
            out["heads"][-1] |= _shared("views", *pair, center)
    return out


def _shared(prefix: str, z1: Tensor, z2: Tensor, center: bool) -> dict[str, float]:
    shared = shared_information(z1, z2, center)
    names = [
        f"{key}_{alpha}" for alpha in ORDERS for key in ("mutual_information", "joint_entropy")
    ]
    return {f"{prefix}_{name}": shared[name] for name in names}


# --- Tables --------------------------------------------------------------------------------------


def row(found: dict[str, Any], pool: str) -> dict[str, Any]:
    """Measures of a layer's pool beside those of its tokens."""
    return found[pool] | found["tokens"]


def _columns(rows: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    from mmae_fast.evaluation.plots import LAYER_COLUMNS

    return [column for column in LAYER_COLUMNS if any(column[0] in r for r in rows.values())]


def layer_table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    """The measures of each layer, for the terminal; entropies and information in nats."""
    table = Table(
        title=title,
        caption="nats, but for ranks and slope; views, next: mutual information of two views, of "
        "this layer and the next; tokens: H₁ of an image's tokens, mean ± deviation over images",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    table.add_column("layer", no_wrap=True)
    columns = [column for column in _columns(rows) if not column[0].endswith("_std")]
    for _, heading in columns:
        table.add_column(heading, justify="right")
    for name, values in rows.items():
        table.add_row(name, *(_cell(values, key) for key, _ in columns))
    return table


def _cell(values: dict[str, Any], key: str) -> str:
    value = values.get(key, math.nan)
    deviation = values.get(key.replace("_mean", "_std")) if key.endswith("_mean") else None
    text = f"{value:.2f}" if math.isfinite(value) else "–"
    return text if deviation is None else f"{text}±{deviation:.2f}"


# --- Runs ----------------------------------------------------------------------------------------


def show_runs(runs: dict[str, Path], config: AnalyzeConfig, console: Console) -> dict[str, Any]:
    """Table and figure of what was monitored while each run was training."""
    from mmae_fast.evaluation.plots import CYCLE, Curve, draw_information

    found = {}
    for source, path in runs.items():
        records = [r for r in read_metrics(path / "metrics.jsonl") if "backbone_entropy_1" in r]
        if not records:
            raise UserError(f"{path} was not monitored (monitor_every 0, or an older run)")
        found[source] = records
    parts = tuple(
        part
        for part in ("projector", "backbone")
        if any(f"{part}_entropy_1" in records[0] for records in found.values())
    )
    table = Table(
        title="First and last measurement",
        caption="nats, but for the rank; MI: mutual information of two views",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    for heading in ("run", "features", "MI α=1", "MI α=2", "joint H₁", "joint H₂", "eff. rank"):
        table.add_column(heading, justify="left" if heading in ("run", "features") else "right")
    names = [f"mutual_information_{a}" for a in ORDERS] + [f"joint_entropy_{a}" for a in ORDERS]
    for source, records in found.items():
        for part in parts:
            if f"{part}_entropy_1" not in records[0]:
                continue
            keys = [f"{part}_{name}" for name in [*names, "effective_rank"]]
            cells = [f"{records[0][key]:.2f}→{records[-1][key]:.2f}" for key in keys]
            table.add_row(Path(source).name, part, *cells)
    console.print(table)
    curves = [
        Curve(Path(source).name, CYCLE[i % len(CYCLE)], records)
        for i, (source, records) in enumerate(found.items())
    ]
    draw_information(config.out / "curves.png", curves, parts)
    return {
        f"{Path(source).name} (training)": {"source": source, "curves": records}
        for source, records in found.items()
    }
