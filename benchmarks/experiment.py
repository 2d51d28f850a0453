"""``python -m benchmarks.experiment``: information during self-supervised training on CIFAR-10.

    python -m benchmarks.experiment small --data FOLDER     two-branch and masked methods, 2 cores
    python -m benchmarks.experiment gpu --data FOLDER       masked methods, ViT-Tiny/4, one GPU
    python -m benchmarks.experiment small --quick --data FOLDER --out DIR     does it run?

FOLDER holds ``cifar10_train.npz`` and ``cifar10_test.npz``, packed JPEGs in four arrays: ``jpeg``
(uint8, all files one after the other), ``offset`` (n + 1 positions in it), ``label`` (n) and
``classes`` (names). ``--data download`` fetches CIFAR-10 through torchvision instead; the
environment variable CIFAR serves as ``--data``.

Every finished run is kept under ``--runs``; the same command again goes on where it was stopped.
Writes ``PRESET.json``, figures and the page ``experiments.md`` beside ``--out``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mmae_fast.demo import PROBE_STEPS, PROBE_TRAIN, classify, run_one
from mmae_fast.evaluation.evaluate import raw_pixels
from mmae_fast.training.checkpoint import pick_device
from mmae_fast.training.config import (
    METHODS,
    DataConfig,
    LossConfig,
    PretrainConfig,
    TwoBranchConfig,
    UserError,
    to_dict,
)
from mmae_fast.training.data import ImageData, load_data
from mmae_fast.training.progress import Board
from mmae_fast.training.recipes import TINY
from mmae_fast.training.runs import PLACE, read_metrics, versions

from .experiment_page import MASKED, TWO_BRANCH, draw, table, write_page

DOCS = Path(__file__).parent.parent / "docs"
FILES = ("cifar10_train.npz", "cifar10_test.npz")


@dataclass(frozen=True)
class Preset:
    """One experiment: a recipe and the number of seeds for each method."""

    title: str
    seeds: dict[str, int]
    recipes: dict[str, PretrainConfig]
    hardware: str


# Small enough for 2 cores: 16 patches of 8 pixels, 4 blocks of width 128.
SMALL = PretrainConfig(
    model=dataclasses.replace(TINY, patch_size=8),
    two_branch=TwoBranchConfig(projector_hidden=512, projector_dim=128),
    epochs=5,
    warmup_epochs=0.5,
    batch_size=256,
    base_lr=2e-3,
    min_crop=0.3,
    log_every=117,  # a tenth of the training
    monitor_every=117,
    save_every=1,
)
# A step on two whole views costs as much as four on visible patches: fewer epochs, finer curves.
SMALL_TWO_BRANCH = dataclasses.replace(SMALL, epochs=2, log_every=39, monitor_every=39)
# The width, depth and heads of ViT-Tiny with patches of 4 pixels.
TINY_VIT = dataclasses.replace(
    SMALL,
    model=dataclasses.replace(
        SMALL.model, patch_size=4, embed_dim=192, depth=12, num_heads=3, decoder_embed_dim=96
    ),
    epochs=200,
    warmup_epochs=20,
    batch_size=2048,
    base_lr=2.5e-4,
    log_every=120,
    monitor_every=240,
    save_every=50,
    precision="bf16",
)
PRESETS = {
    "small": Preset(
        "Two cores",
        dict.fromkeys(TWO_BRANCH, 1) | dict.fromkeys(MASKED, 3),
        dict.fromkeys(TWO_BRANCH, SMALL_TWO_BRANCH) | dict.fromkeys(MASKED, SMALL),
        "two CPU cores",
    ),
    "gpu": Preset(
        "ViT-Tiny/4 on one GPU",
        dict.fromkeys(MASKED, 3),
        dict.fromkeys(MASKED, TINY_VIT),
        "one GPU",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiment", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--data", default=os.environ.get("CIFAR", ""), help="folder, or: download")
    parser.add_argument("--out", type=Path, default=DOCS / "experiments")
    parser.add_argument("--runs", type=Path, help="default: runs/experiment-PRESET")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="a few steps, one seed; needs --out")
    options = parser.parse_args(arguments)
    if options.quick and options.out == DOCS / "experiments":
        parser.error("--quick needs an --out of its own: its numbers mean nothing")
    try:
        run(options, Console())
    except UserError as error:
        print(f"experiment: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        said = str(interrupt) or "interrupted"
        print(f"\nexperiment: {said}\nThe same command again goes on.", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace, console: Console) -> None:
    """Train and probe what is not done yet; write results, figures and page."""
    preset = quick(PRESETS[options.preset]) if options.quick else PRESETS[options.preset]
    source, origin = data_source(options.data)
    train, test = load_data(source)
    if options.quick:
        train, test = shorten(train, 512), shorten(test, 256)
    device = pick_device(options.device)
    if device.type == "cuda":  # all images fit; batches are then cut where they are used
        train, test = (dataclasses.replace(d, images=d.images.to(device)) for d in (train, test))
    folder = options.runs or Path("runs") / f"experiment-{options.preset}"
    configs = [
        dataclasses.replace(
            recipe,
            data=source,
            loss=LossConfig(method=method),
            seed=seed,
            out=folder / f"{method}-seed{seed}",
            device=options.device,
        )
        for method, recipe in preset.recipes.items()
        for seed in range(preset.seeds[method])
    ]
    console.print(f"{preset.title}: {len(configs)} runs into {folder}; {origin}")
    with Board(console) as board:
        whole = board.task("whole experiment")
        tasks = [board.task(f"{METHODS[c.loss.method][1]} {c.seed}", parent=whole) for c in configs]
        whole.start(sum(steps(c, train) + PROBE_STEPS for c in configs))
        results = [
            run_one(config, (train, test), task)
            for config, task in zip(configs, tasks, strict=True)
        ]
    for config, result in zip(configs, results, strict=True):
        result["curves"] = [
            {key: value for key, value in record.items() if key not in ("lr", "regularizer_share")}
            for record in read_metrics(config.out / "metrics.jsonl")
        ]
    raw = classify(raw_pixels(*on_cpu(train, test), PROBE_TRAIN))
    content = {
        "title": preset.title,
        "hardware": preset.hardware,
        "quick": options.quick,
        "date": time.strftime("%Y-%m-%d"),
        "data": origin,
        "images": [len(train), len(test)],
        "protocol": f"Class token of whole images; {min(PROBE_TRAIN, len(train)):,} training and "
        f"{len(test):,} test images. {raw['protocol']}",
        "recipes": {m: settings(recipe) for m, recipe in preset.recipes.items()},
        "raw_pixels": {key: raw[key] for key in ("linear_probe", "knn", "effective_rank")},
        "versions": versions(),
        "results": results,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.preset}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    draw(options.out, options.preset, results)
    page = write_page(options.out, {name: (p.title, p.hardware) for name, p in PRESETS.items()})
    console.print("\n".join([*table(content), ""]), soft_wrap=True)
    console.print(f"Results: {path}. Page: {page}")


def data_source(given: str) -> tuple[DataConfig, str]:
    """Where the images are, and in words that name no place on this machine."""
    if given == "download":
        return DataConfig(train="cifar10"), "CIFAR-10 as downloaded by torchvision"
    if not given:
        raise UserError(
            f"say where CIFAR-10 is: a folder with {' and '.join(FILES)}, or 'download' "
            "(--data, or CIFAR= for make)"
        )
    paths = [Path(given).expanduser() / name for name in FILES]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"no {' and no '.join(missing)}; --data download fetches CIFAR-10 instead")
    origin = "CIFAR-10, packed JPEGs (quality about 75)"
    return DataConfig(train=str(paths[0]), test=str(paths[1])), origin


def shorten(part: ImageData, count: int) -> ImageData:
    return dataclasses.replace(part, images=part.images[:count], labels=part.labels[:count])


def on_cpu(*parts: ImageData) -> list[ImageData]:
    return [dataclasses.replace(part, images=part.images.cpu()) for part in parts]


def steps(config: PretrainConfig, train: ImageData) -> int:
    return max(1, round(config.epochs * (len(train) // config.batch_size)))


def quick(preset: Preset) -> Preset:
    """The same experiment in a few steps of a tiny model, one seed each."""

    def shrink(recipe: PretrainConfig) -> PretrainConfig:
        model = dataclasses.replace(
            recipe.model, embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=8
        )
        head = TwoBranchConfig(projector_hidden=16, projector_dim=8)
        return dataclasses.replace(
            recipe,
            model=dataclasses.replace(model, decoder_num_heads=2),
            two_branch=head,
            epochs=2,
            warmup_epochs=1,
            batch_size=16,
            log_every=2,
            monitor_every=2,
            precision="fp32",
        )

    return dataclasses.replace(
        preset,
        seeds=dict.fromkeys(preset.seeds, 1),
        recipes={method: shrink(recipe) for method, recipe in preset.recipes.items()},
    )


def settings(recipe: PretrainConfig) -> dict[str, Any]:
    """A recipe without what differs between runs and machines."""
    values = to_dict(recipe)
    for key in ("data", "seed", *PLACE):
        del values[key]
    del values["loss"]["method"]
    return values


if __name__ == "__main__":
    sys.exit(main())
