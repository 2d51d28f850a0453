"""Fine-tuning: a pretrained encoder and a new classifier, trained together on labelled images.

The classifier is timm's VisionTransformer, so that what is saved loads there as it is. Every draw
is a function of the seed and the step: a resumed run ends as an uninterrupted one does.

[1] He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377, appendix A.1
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mmae_fast.evaluation.classifier import (
    LabelledBatches,
    build_classifier,
    build_optimizer,
    build_schedule,
    seed_all,
)
from mmae_fast.evaluation.config import FinetuneConfig, check_finetuning
from mmae_fast.evaluation.evaluate import OpenRun, check_labels, open_run
from mmae_fast.evaluation.export import encoder_options
from mmae_fast.training.augment import normalise
from mmae_fast.training.checkpoint import latest_checkpoint, restore, save_checkpoint
from mmae_fast.training.config import UserError, to_dict
from mmae_fast.training.data import save_skipped
from mmae_fast.training.launch import StopOnSignal, World, join, wrap
from mmae_fast.training.progress import Board, Task
from mmae_fast.training.runs import MetricsFile, check_same_run, create_run
from mmae_fast.training.train import Interrupted

DRAWS = 10  # stream of the global generators, beside those of ``augment``
RESULT = "finetune.json"

PROTOCOL = (
    "Fine-tuning: all weights, {epochs} epochs, AdamW, lr {base_lr:g} x {batch_size:,}/256, layer "
    "decay {layer_decay:g}, weight decay {weight_decay:g}, drop path {drop_path:g}, mixup "
    "{mixup:g}, cutmix {cutmix:g}, RandAugment {rand_augment}, erasing {erasing:g}, label "
    "smoothing {smoothing:g}, {average}; features: {features}; accuracy after the last epoch"
)


def finetune(config: FinetuneConfig, task: Task | None = None) -> tuple[float, str]:
    """Train, or continue training; accuracy in [0, 1] on the test images and the protocol in words.

    The result is also written to ``finetune.json``, in ``config.out`` and, where the images are
    its own, in the run folder that the encoder came from.

    Raises:
        UserError: what cannot work, with the values received.
        Interrupted: after Ctrl-C or SIGTERM, when the checkpoint is written.
    """
    check_finetuning(config)
    with join(config.device) as world:
        if task is not None:
            return train_classifier(config, world, task)
        with Board(Console(quiet=not world.main)) as board:
            return train_classifier(config, world, board.task("fine-tuning"))


def train_classifier(config: FinetuneConfig, world: World, task: Task) -> tuple[float, str]:
    """As ``finetune``, in one of the processes that train together."""
    source = open_run(dataclasses.replace(config, device=str(world.device)))
    check_labels(source)
    train, device = source.train, world.device
    if config.rand_augment and train.in_chans not in (1, 3):
        raise UserError(
            f"--rand-augment takes images of 1 or 3 channels, these have {train.in_chans}"
        )
    part, rest = divmod(config.batch_size, world.size)
    if rest or (part % 2 and (config.mixup or config.cutmix)):
        raise UserError(
            f"batch_size {config.batch_size} cannot be shared by {world.size} process"
            f"{'es' if world.size > 1 else ''}; mixup and cutmix need even shares"
        )
    if config.batch_size > len(train):
        raise UserError(f"batch_size {config.batch_size} exceeds the {len(train)} training images")
    steps_per_epoch = len(train) // config.batch_size  # an incomplete batch is left out
    total_steps = config.epochs * steps_per_epoch

    seed_all(config.seed, DRAWS)
    options = encoder_options(source.model) | {
        "num_classes": len(train.classes),
        "global_pool": "avg" if config.pool == "mean" else "token",
    }
    model = build_classifier(source.model, options, config.drop_path).to(device)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config.warmup_epochs * steps_per_epoch, total_steps)
    meta = {"config": to_dict(config), "classifier": options, "data": describe(source)}
    average = None if config.ema is None else ModelEmaV3(model, config.ema)
    scored = model if average is None else average.module
    loss_sum = torch.zeros((), device=device)
    files = tensors(model, scored, optimizer) | {"loss": {"sum": loss_sum}}
    start = open_folder(config, source, files, world)
    metrics = MetricsFile(config.out / "metrics.jsonl", start) if world.main else None
    batches = LabelledBatches(source, config, world.rank, world.size)
    network = wrap(model, world, shard=False)

    task.start(total_steps, start)
    timed_from, clock = start, time.perf_counter()
    with StopOnSignal(world) as stop:
        for step in range(start, total_steps):
            # Drop path, mixup, erasing and RandAugment draw from the global generators.
            seed_all(config.seed, DRAWS, 1 + step, world.rank)
            images, targets = batches(step)
            schedule.step_update(step)
            model.train()
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                logits = network(images)
            loss = F.cross_entropy(logits.float(), targets)
            loss.backward()
            if config.clip_grad is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                average.update(model)
            loss_sum += world.mean(loss.detach())
            done = step + 1
            task.advance()

            if done % steps_per_epoch == 0:
                mean_loss = (loss_sum / steps_per_epoch).item()
                seconds = (time.perf_counter() - clock) / (done - timed_from)
                accuracy = score(scored, source, world)
                record = {
                    "step": done,
                    "epoch": done // steps_per_epoch,
                    "loss": mean_loss,
                    "accuracy": accuracy,
                    "lr": max(group["lr"] for group in optimizer.param_groups),
                    "images_per_second": config.batch_size / seconds,
                }
                if metrics:
                    metrics.write(record)
                task.say(f"loss {mean_loss:.3f}, accuracy {accuracy:.2%}")
                if not math.isfinite(mean_loss):
                    raise UserError(
                        f"the loss is {mean_loss} at step {done}; lower --base-lr or set "
                        f"--clip-grad (last checkpoint: {latest_checkpoint(config.out)})"
                    )
                loss_sum.zero_()
                timed_from, clock = done, time.perf_counter()
            save_due = done % (config.save_every * steps_per_epoch) == 0 or done == total_steps
            stopping = stop.requested()
            if save_due or stopping:
                save_checkpoint(config.out, done, files, meta, config.keep, world)
            if stopping and done < total_steps:
                raise Interrupted(config.out, done)
    return report(config, score(scored, source, world), world)


def open_folder(
    config: FinetuneConfig, source: OpenRun, files: dict[str, dict[str, Tensor]], world: World
) -> int:
    """Start the run folder, or load the last checkpoint of the run in it; return the steps done."""
    error = None
    if world.main:
        try:
            if config.resume:
                check_same_run(config, describe(source))
            else:
                create_run(config, describe(source))
                save_skipped(config.out, source.train, source.test)
        except (UserError, OSError) as caught:
            error = caught
    world.agree(error)
    return restore(config.out, files, world) if config.resume else 0


def tensors(
    model: nn.Module, scored: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """Everything that training changes, by file and name; to be saved, or loaded into.

    Saved as the model is what is scored: the average of the weights, where there is one.
    """
    training = {}
    for name, param in model.named_parameters():
        # What AdamW's first step would make; here it has a place to be loaded into.
        optimizer.state[param] = {
            "step": torch.zeros((), device=param.device),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }
        training |= {f"{key}.{name}": v for key, v in optimizer.state[param].items()}
    files = {"model": scored.state_dict(), "training": training}
    return files if scored is model else files | {"weights": model.state_dict()}


@torch.no_grad()
def score(model: nn.Module, source: OpenRun, world: World) -> float:
    """Accuracy in [0, 1] on the test images, whole; each process takes its share of them."""
    model.eval()
    share = slice(world.rank, None, world.size)
    images, labels = source.test.images[share], source.test.labels[share]
    correct = torch.zeros((), dtype=torch.float64, device=world.device)
    for batch, truth in zip(images.split(500), labels.split(500), strict=True):
        logits = model(normalise(batch.to(world.device), source.mean, source.std))
        correct += (logits.argmax(dim=1) == truth.to(world.device)).sum()
    return world.mean(correct).item() * world.size / len(source.test)


def describe(source: OpenRun) -> dict[str, Any]:
    """What the weights need to be used alone, saved with them."""
    return {
        "train": source.train.origin,
        "test": source.test.origin,
        "images": len(source.train),
        "classes": list(source.train.classes),
        "img_size": list(source.train.img_size),
        "in_chans": source.train.in_chans,
        "mean": source.mean.tolist(),
        "std": source.std.tolist(),
    }


def report(config: FinetuneConfig, accuracy: float, world: World) -> tuple[float, str]:
    """Accuracy and protocol in words; the main process writes them down."""
    pool = {"cls": "class token", "mean": "mean of the patch tokens"}
    words = {
        "features": pool[config.pool],
        "average": "no average" if config.ema is None else f"average of decay {config.ema:g}",
    }
    protocol = PROTOCOL.format(**vars(config) | words)
    content = {"accuracy": accuracy, "protocol": protocol, "run": str(config.out)}
    text = json.dumps(content, indent=2) + "\n"
    folders: list[Path] = [config.out]
    own = config.train is config.test is config.img_size is None
    if own and (config.checkpoint / "config.json").exists():
        folders.append(config.checkpoint)
    for folder in folders if world.main else ():
        (folder / RESULT).write_text(text)
    return accuracy, protocol
