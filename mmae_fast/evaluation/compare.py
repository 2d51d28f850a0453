"""Runs compared on one page, from what lies in their folders; evaluated first where asked."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from pathlib import Path
from typing import Any

from mmae_fast.evaluation.config import EvalConfig, ReportConfig
from mmae_fast.evaluation.evaluate import OpenRun, classify, open_run, run_features
from mmae_fast.evaluation.page import group_of
from mmae_fast.evaluation.report import write_report
from mmae_fast.training.config import METHODS, PretrainConfig, UserError, from_dict
from mmae_fast.training.models import MaskedAutoencoder
from mmae_fast.training.reconstruct import reconstructions, save_reconstructions
from mmae_fast.training.runs import PLACE, flatten, read_metrics, read_run
from mmae_fast.training.watch import HELD_OUT

RESULT = "result.json"  # of a run: what ``classify`` found, and the speed
PICTURED = 10
# What ``mmae probe``, ``knn`` and ``finetune`` leave in a run folder -> key of a result.
MEASURED = {
    "linear_probe_lbfgs_cls.json": "linear_probe",
    "linear_probe_lars_cls.json": "linear_probe_lars",
    "knn_cls.json": "knn",
    "finetune.json": "finetune",
}
# Settings in which runs may differ and be the same but for the seed.
SAME = {*PLACE, "seed", "data.cache", "log_every", "monitor_every", "save_every", "max_skipped"}
# Settings that the page shows, and their names there.
SETTINGS = {
    "data.train": "data",
    "model.patch_size": "patch",
    "model.embed_dim": "width",
    "model.depth": "blocks",
    "model.mask_ratio": "masked",
    "epochs": "epochs",
    "batch_size": "batch",
    "base_lr": "lr per 256 images",
    "weight_decay": "weight decay",
    "min_crop": "smallest crop",
    "loss.weight": "weight of the regulariser",
    "loss.mu": "mu",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder and what it was to do."""

    folder: Path
    config: PretrainConfig
    content: dict[str, Any]  # of config.json

    @property
    def name(self) -> str:
        return METHODS[self.config.loss.method][1]


def compare_runs(config: ReportConfig) -> Path:
    """Write the page and return its path.

    Raises: UserError: a folder that holds no pretraining, no run at all.
    """
    if not config.runs:
        raise UserError("nothing to compare: name one or more run folders")
    runs = [read(folder) for folder in config.runs]
    groups = group(runs)
    config.out.mkdir(parents=True, exist_ok=True)
    opened: list[tuple[str, OpenRun]] = []
    if config.evaluate:
        opened = [(name, evaluate(run, config)) for name, run in zip(groups, runs, strict=True)]
    results = [collect(*pair, config.out) for pair in zip(runs, groups, strict=True)]
    content = describe(config, runs, results)
    content["reconstructions"] = draw(config.out / "reconstructions.png", opened)
    (config.out / "report.json").write_text(json.dumps(content, indent=2) + "\n")
    return write_report(config.out, "report.json")


def read(folder: Path) -> Run:
    content = read_run(folder)
    if "checkpoint" in content.get("config", {}):
        raise UserError(
            f"{folder} is a fine-tuning; name the run that it started from, where its accuracy is"
        )
    return Run(folder, from_dict(PretrainConfig, content["config"]), content)


def group(runs: list[Run]) -> list[str]:
    """Group of each run: its method, or "name, setting=value" where settings of it differ."""
    flat = [
        {k: v for k, v in flatten(run.content["config"]).items() if k not in SAME} for run in runs
    ]
    groups = []
    for run, settings in zip(runs, flat, strict=True):
        same = [f for r, f in zip(runs, flat, strict=True) if r.name == run.name]
        differing = [key for key in settings if any(f.get(key) != settings[key] for f in same)]
        told = ", ".join(f"{key.split('.')[-1]}={_text(settings[key])}" for key in differing)
        groups.append(f"{run.name}, {told}" if told else run.config.loss.method)
    return groups


def evaluate(run: Run, config: ReportConfig) -> OpenRun:
    """Probe a run, unless its last checkpoint was, and leave the result in its folder."""
    opened = open_run(EvalConfig(run.folder, device=config.device))
    path, step = run.folder / RESULT, opened.meta["step"]
    if not path.exists() or json.loads(path.read_text()).get("step", step) != step:
        features = run_features(EvalConfig(run.folder), opened)
        result = {"method": run.config.loss.method, "seed": run.config.seed, "run": run.folder.name}
        result |= classify(features) | medians(run.folder)
        result |= {"test_images": len(features.test), "step": step}
        path.write_text(json.dumps(result, indent=2) + "\n")
    return opened


def medians(run: Path) -> dict[str, float]:
    """Medians over a training of what its speed was and what its parts cost."""
    records = read_metrics(run / "metrics.jsonl")
    found = {}
    keys = ("images_per_second", "regularizer_share", "monitor_share", "epoch_data_wait_share")
    for key in keys:
        values = [record[key] for record in records if key in record]
        if values:
            found[key] = statistics.median(values)
    return found


def collect(run: Run, group: str, out: Path) -> dict[str, Any]:
    """Everything that was measured of a run."""
    result: dict[str, Any] = medians(run.folder)
    path = run.folder / RESULT
    if path.exists():
        result |= json.loads(path.read_text())
    protocols = [result["protocol"]] if "protocol" in result else []
    for name, key in MEASURED.items():
        path = run.folder / name
        if path.exists():
            found = json.loads(path.read_text())
            result[key] = found["accuracy"]
            protocols.append(found["protocol"])
    return result | {
        "method": run.config.loss.method,
        "group": group,
        "seed": run.config.seed,
        "run": os.path.relpath(run.folder, out),
        "protocols": protocols,
    }


def draw(path: Path, opened: list[tuple[str, OpenRun]]) -> bool:
    """Reconstructions of the first masked autoencoder of each group that took the same images."""
    restored, first = {}, None
    for name, run in opened:
        if not isinstance(run.model, MaskedAutoencoder) or name in restored:
            continue
        images = (run.test or run.train).images[:PICTURED]
        size = (images.shape, run.model.patch_embed.grid_size, run.model.mask_ratio)
        original, masked, pixels = reconstructions(run.model, images, run.mean, run.std)
        if first is None:
            first = size, original, masked
        if size == first[0] and (original - first[1]).abs().max() < 1e-4:
            restored[name] = pixels
    if first is None:
        return False
    named = {
        METHODS[name][1] if name in METHODS else name.replace(", ", "\n"): pixels
        for name, pixels in restored.items()
    }
    save_reconstructions(path, first[1], first[2], named, first[0][2])
    return True


def describe(
    config: ReportConfig, runs: list[Run], results: list[dict[str, Any]]
) -> dict[str, Any]:
    """Everything that the page says, as written to ``report.json``."""
    flat = [flatten(run.content["config"]) for run in runs]
    told = {name: _common([f.get(key) for f in flat]) for key, name in SETTINGS.items()}
    versions = [run.content.get("versions", {}) for run in runs]
    protocols = dict.fromkeys(p for result in results for p in result["protocols"])
    protocols = [p for p in protocols if not any(p in other for other in protocols if other != p)]
    counts = [sum(group_of(r) == group_of(result) for r in results) for result in results]
    tested = {result.get("test_images") for result in results}
    content = {
        "title": f"{len(runs)} run{'s' if len(runs) > 1 else ''} compared",
        "lead": (
            "Pretrained encoders, from what lies in their run folders. A dash: not measured"
            + ("." if config.evaluate else "; mmae report --evaluate measures it.")
        ),
        "demonstration": False,
        "results": results,
        "seeds": max(counts),
        "embed_dim": max(run.config.model.embed_dim for run in runs),
        "held_out": f"at most {HELD_OUT}",
        "protocol": " ".join(f"{protocol}." for protocol in protocols),
        "settings": {"runs": ", ".join(str(run.folder) for run in runs)} | told,
        "versions": {key: _common([v.get(key) for v in versions]) for key in versions[0]},
        "command": " ".join(["mmae report", *(str(run.folder) for run in runs)])
        + " --evaluate" * config.evaluate,
    }
    if len(tested) == 1 and None not in tested:
        content["test_images"] = tested.pop()
        content["held_out"] = min(HELD_OUT, content["test_images"])
    return content


def _common(values: list[Any]) -> str | None:
    """One value, or all that there are."""
    known = dict.fromkeys(_text(value) for value in values if value is not None)
    return " | ".join(known) or None


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
