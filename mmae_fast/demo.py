"""The demonstration: MAE, U-MAE and M-MAE from the same seed, probed, in one report."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmae_fast.evaluation.compare import medians
from mmae_fast.evaluation.evaluate import (
    channel_tensors,
    classify,
    extract,
    raw_pixels,
)
from mmae_fast.evaluation.page import columns_of, format_cell, summarise
from mmae_fast.evaluation.probes import Features
from mmae_fast.evaluation.report import write_report
from mmae_fast.training.checkpoint import latest_checkpoint, load_model, pick_device
from mmae_fast.training.config import (
    METHODS,
    DataConfig,
    DemoConfig,
    LossConfig,
    PretrainConfig,
    UserError,
)
from mmae_fast.training.data import ImageData, load_demo_data
from mmae_fast.training.progress import Board, Task
from mmae_fast.training.recipes import TINY
from mmae_fast.training.reconstruct import reconstructions, save_reconstructions
from mmae_fast.training.runs import versions
from mmae_fast.training.train import pretrain
from mmae_fast.training.watch import HELD_OUT

DEMO_METHODS = ("mae", "u_mae", "m_mae")
# Fixed sizes, not a time limit: the result must not depend on how fast the machine is.
RECIPES = {
    "fashion-mnist": PretrainConfig(
        model=dataclasses.replace(TINY, patch_size=7),
        epochs=3,
        warmup_epochs=0.5,
        batch_size=256,
        base_lr=2e-3,
        min_crop=0.6,  # the garments are centred and fill the image
        log_every=18,
        save_every=1,
    ),
    "digits": PretrainConfig(
        data=DataConfig(train="digits"),
        model=dataclasses.replace(TINY, patch_size=2),
        epochs=60,
        warmup_epochs=6,
        batch_size=128,
        base_lr=2e-3,
        min_crop=0.6,
        hflip=False,  # a mirrored digit is another sign
        log_every=22,
        save_every=20,
    ),
}
PROBE_TRAIN = 20_000  # training images that the probes use, at most
PROBE_STEPS = 40  # what probing counts for in the bar of the whole demo, in training steps


def run_demo(config: DemoConfig, console: Console | None = None) -> Path:
    """Run the demonstration and return the path of its report.

    Raises: UserError: data that cannot be had or are damaged; a folder that is in use.
        Interrupted: after Ctrl-C; ``--resume`` continues.
    """
    console = console or Console()
    console.print("[bold]Masked autoencoders with and without a matrix-entropy regulariser[/bold]")
    name, train, test, failed = load_demo_data(config.data, config.cache.expanduser())
    if failed:
        console.print(f"{failed}\nInstead:")
    console.print(f"Images: {train.origin}; {len(train):,} to train on, {len(test):,} to test on")
    recipe = RECIPES[name]
    recipe = dataclasses.replace(
        recipe, epochs=config.epochs or recipe.epochs, device=config.device
    )
    total = round(recipe.epochs * (len(train) // recipe.batch_size))
    console.print(
        f"Training: {len(DEMO_METHODS)} methods × {config.seeds} seed"
        f"{'s' if config.seeds > 1 else ''}, {total:,} steps of {recipe.batch_size} images each "
        f"({recipe.epochs:g} epochs), into {config.out}"
    )
    prepare(config)
    started = time.perf_counter()
    runs = [(method, seed) for seed in range(config.seeds) for method in DEMO_METHODS]
    with Board(console) as board:
        whole = board.task("whole demo")
        tasks = [board.task(METHODS[method][1], parent=whole) for method, _ in runs]
        whole.start((total + PROBE_STEPS) * len(runs))
        results = [
            run_one(
                dataclasses.replace(
                    recipe,
                    loss=LossConfig(method=method),
                    seed=seed,
                    out=config.out / f"{method}-seed{seed}",
                ),
                (train, test),
                task,
            )
            for (method, seed), task in zip(runs, tasks, strict=True)
        ]
    draw_reconstructions(config, results, test)
    demo = describe_demo(config, recipe, name, train, test, results, total)
    seconds = time.perf_counter() - started
    if not config.resume:  # else it is the time of a part
        demo["settings"]["time"] = f"{seconds:.0f} s for training and probing all methods"
    (config.out / "demo.json").write_text(json.dumps(demo, indent=2) + "\n")
    report = write_report(config.out)
    console.print(results_table(demo))
    console.print(f"[dim]{demo['protocol']}[/dim]")
    console.print(f"Done in {seconds:.0f} s. Report: [bold]{report}[/bold]")
    return report


def prepare(config: DemoConfig) -> None:
    """Clear the runs of an earlier demo, unless it is to be continued."""
    if config.resume:
        return
    if config.out.exists() and any(config.out.iterdir()):
        if not (config.out / "demo.json").exists() and not run_folders(config.out):
            raise UserError(f"{config.out} is not empty and holds no demo; choose another --out")
        for folder in run_folders(config.out):
            shutil.rmtree(folder)


def run_folders(out: Path) -> list[Path]:
    return [
        path.parent for method in DEMO_METHODS for path in out.glob(f"{method}-seed*/config.json")
    ]


def run_one(
    config: PretrainConfig, data: tuple[ImageData, ImageData], task: Task
) -> dict[str, Any]:
    """Pretrain and probe one run, or take up what an interrupted one left in its folder."""
    run, started = config.out, time.perf_counter()
    done = run / "result.json"
    begun = latest_checkpoint(run) is not None
    if not begun:
        shutil.rmtree(run, ignore_errors=True)  # killed before its first checkpoint
    pretrain(dataclasses.replace(config, resume=begun), data, task)
    if done.exists():
        task.parent.advance(PROBE_STEPS)
        return json.loads(done.read_text())
    task.say("extracting features")
    result = {"method": config.loss.method, "seed": config.seed, "run": run.name}
    result |= probe(run, data, config.device)
    result |= medians(run)
    if not begun:  # else it is the time of a part
        result["seconds"] = time.perf_counter() - started
    done.write_text(json.dumps(result, indent=2) + "\n")
    task.parent.advance(PROBE_STEPS)
    task.say(f"linear probe {result['linear_probe']:.2%}, kNN {result['knn']:.2%}")
    return result


def probe(run: Path, data: tuple[ImageData, ImageData], device: str) -> dict[str, Any]:
    """Accuracies and spectrum of the final class-token features."""
    model, meta = load_model(run, pick_device(device))
    mean, std = channel_tensors(meta, pick_device(device))
    train, test = data
    features = Features(
        extract(model, train.images[:PROBE_TRAIN], mean, std),
        train.labels[:PROBE_TRAIN].to(mean.device),
        extract(model, test.images, mean, std),
        test.labels.to(mean.device),
    )
    return classify(features)


def draw_reconstructions(config: DemoConfig, results: list[dict], test: ImageData) -> None:
    """Ten test images, as the first seed's models restore them."""
    restored = {}
    for result in results[: len(DEMO_METHODS)]:
        model, meta = load_model(config.out / result["run"], pick_device(config.device))
        mean, std = channel_tensors(meta, model.pos_embed.device)
        original, masked, pixels = reconstructions(model, test.images[:10], mean, std)
        restored[METHODS[result["method"]][1]] = pixels
    path = config.out / "reconstructions.png"
    save_reconstructions(path, original, masked, restored, model.mask_ratio)


def describe_demo(
    config: DemoConfig,
    recipe: PretrainConfig,
    name: str,
    train: ImageData,
    test: ImageData,
    results: list[dict[str, Any]],
    steps: int,
) -> dict[str, Any]:
    """Everything that the report says, as written to ``demo.json``."""
    model, loss = recipe.model, LossConfig()
    raw = classify(raw_pixels(train, test, PROBE_TRAIN))
    probed = min(PROBE_TRAIN, len(train))
    seeds = "the same seed" if config.seeds == 1 else f"the same {config.seeds} seeds"
    command = f"mmae demo --data {name} --seeds {config.seeds}"
    if config.epochs:
        command += f" --epochs {config.epochs:g}"
    return {
        "lead": (
            f"The same small ViT, pretrained three times on {len(train):,} unlabelled images from "
            f"{seeds}: same initial weights, same batches, same masks. Only the regulariser of the "
            "class token differs: none (MAE), mean squared similarity (U-MAE), total coding rate "
            "(M-MAE). Then the encoder is frozen and probed."
        ),
        "results": results,
        "raw_pixels": raw,
        "seeds": config.seeds,
        "embed_dim": model.embed_dim,
        "test_images": len(test),
        "held_out": min(HELD_OUT, len(test)),
        "protocol": (
            f"Features: class token of unmasked images; {probed:,} training and {len(test):,} test "
            f"images. {raw['protocol']}. Effective rank: of the test features. img/s and share of "
            "the step: medians over training; the share is the regulariser's own forward and "
            "backward pass, timed apart, over the time of a whole step. Other work on the machine "
            "lowers img/s."
        ),
        "settings": {
            "data": train.origin,
            "images": f"{len(train):,} training, {len(test):,} test, "
            f"{train.img_size[0]}×{train.img_size[1]} pixels",
            "encoder": f"{model.depth} blocks, {model.embed_dim} wide, {model.num_heads} heads, "
            f"patches of {model.patch_size} pixels, {model.mask_ratio:.0%} masked",
            "decoder": f"{model.decoder_depth} block, {model.decoder_embed_dim} wide; "
            "target: pixels normalised per patch",
            "training": f"{recipe.epochs:g} epochs = {steps:,} steps of {recipe.batch_size}, AdamW "
            f"(0.9, 0.95), lr {recipe.base_lr * recipe.batch_size / 256:g}, "
            f"{recipe.warmup_epochs:g} epochs of warm-up, cosine, weight decay "
            f"{recipe.weight_decay:g}",
            "augmentation": f"random resized crop ({recipe.min_crop:g}–1)"
            + (", horizontal flip" if recipe.hflip else ""),
            "regulariser": f"λ = {loss.weight:g}, μ = {loss.mu:g}",
            "seeds": ", ".join(str(seed) for seed in range(config.seeds)),
        },
        "versions": versions(),
        "command": command,
    }


def results_table(demo: dict[str, Any]) -> Table:
    """The final table, for the terminal."""
    # The wait for data is on the report: a terminal has 80 columns.
    columns = [c for c in columns_of(demo["results"]) if c[0] != "epoch_data_wait_share"]
    table = Table(title=f"Frozen features, {demo['seeds']} seed{'s' if demo['seeds'] > 1 else ''}")
    table.add_column("method", no_wrap=True)
    for _, heading, *_ in columns:
        table.add_column(heading, justify="right")
    for method, row in summarise(demo["results"]).items():
        table.add_row(
            METHODS[method][1], *(format_cell(form, row[key]) for key, _, form, _ in columns)
        )
    raw = {key: (demo["raw_pixels"][key], 0.0) for key in ("linear_probe", "knn", "effective_rank")}
    table.add_row(
        "raw pixels",
        *(format_cell(form, raw.get(key)) for key, _, form, _ in columns),
        style="dim",
    )
    return table
