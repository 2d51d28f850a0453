"""Pretraining: masked autoencoders, with or without a regulariser, and two-branch methods.

A run folder holds ``config.json`` (configuration, data, versions), ``metrics.jsonl`` and
``checkpoints/``. Order, augmentations, masks and every other draw are functions of the seed, the
step and the place in the batch of all processes: an interrupted run, resumed, ends in the same
weights as an uninterrupted one, and the number of processes does not change what is computed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmae_fast.training.augment import GLOBAL, Batches, stream
from mmae_fast.training.checkpoint import latest_checkpoint, restore, save_checkpoint
from mmae_fast.training.config import METHODS, PretrainConfig, UserError, check, to_dict
from mmae_fast.training.data import ImageData, load_data, save_skipped
from mmae_fast.training.launch import StopOnSignal, World, join, synchronise
from mmae_fast.training.logbook import Logbook, check_packages
from mmae_fast.training.models import build_model
from mmae_fast.training.objective import build_objective
from mmae_fast.training.progress import Board, Task
from mmae_fast.training.runs import check_same_run, create_run
from mmae_fast.training.step import TrainingStep, learning_rate
from mmae_fast.training.watch import Phases, Watch, epoch_note, progress_note

Data = tuple[ImageData, ImageData | None]


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and left a checkpoint."""

    def __init__(self, run: Path, step: int) -> None:
        super().__init__(f"stopped after step {step}, checkpoint in {run}; --resume continues")


def pretrain(
    config: PretrainConfig,
    data: Data | None = None,
    task: Task | None = None,
    began: float | None = None,
) -> Path:
    """Train, or continue training, and return the folder of the final checkpoint.

    Under torchrun every process calls this alike.

    Args:
        config: everything that defines the run.
        data: training and test images, where they are loaded already.
        task: shows the progress; default: a bar of its own.
        began: ``time.perf_counter()`` when the command was given, to tell the time to the first
            step; default: not told.
    Raises:
        UserError: what cannot work, with the values received.
        Interrupted: after Ctrl-C or SIGTERM, when the checkpoint is written.
    """
    check(config)
    check_packages(config)
    with join(config.device) as world:
        try:
            if task is not None:
                return train(config, data or load_data(config.data), world, task, began)
            with Board(Console(quiet=not world.main)) as board:
                task = board.task(METHODS[config.loss.method][1])
                return train(config, data or load_data(config.data), world, task, began)
        except OSError as error:
            last = latest_checkpoint(config.out)
            hint = f" (last checkpoint: {last}; see --resume)" if last else ""
            raise UserError(f"{error}{hint}") from error


def train(
    config: PretrainConfig, data: Data, world: World, task: Task, began: float | None
) -> Path:
    train_images, test_images = data
    steps_per_epoch = count_steps(config, train_images, world)
    total_steps = max(1, round(config.epochs * steps_per_epoch))
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    peak_lr = config.base_lr * config.batch_size / 256

    torch.manual_seed(config.seed)
    model = build_model(config, train_images.img_size, train_images.in_chans).to(world.device)
    phases = Phases(world.device)
    update = TrainingStep(model, build_objective(config.loss, world), config, world, phases)
    meta = describe(config, *data)
    start = open_run(config, data, meta, update, world)
    logbook = Logbook(config, start) if world.main else None

    mean, std = (torch.tensor(meta["data"][key], device=world.device) for key in ("mean", "std"))
    part = (world.rank, world.size)
    batches = Batches(train_images.crop_source, mean, std, config, *part, train_images.img_size)
    watch = Watch(model, (test_images or train_images).images, mean, std, config)
    if start == 0:
        record = {"step": 0, "epoch": 0.0, **watch.features()}
        record |= watch.information() if config.monitor_every else {}
        if logbook:
            logbook.write(record)

    def due(every: float) -> bool:
        return bool(every) and (done % every == 0 or done == total_steps)

    task.start(total_steps, start)
    tracing = None
    if config.profile and world.main:
        tracing = phases.trace(config.out / "trace.json", total_steps - start)
    save_due, timed_from, clock = False, start, time.perf_counter()
    of_epoch: dict[str, float] = {}
    with StopOnSignal(world) as stop:
        for step in range(start, total_steps):
            if tracing:
                next(tracing)
            with phases("data"):
                inputs = batches(step)
            torch.manual_seed(stream(config.seed, GLOBAL, step, world.rank))
            lr = learning_rate(step, peak_lr, warmup_steps, total_steps)
            features = update(inputs, lr)
            done = step + 1
            task.advance()
            if began is not None and step == start:
                synchronise(world.device)
                task.tell(f"First step done {time.perf_counter() - began:.1f} s after the command")

            if due(steps_per_epoch):
                of_epoch = {"epoch_data_wait_share": batches.wait_share("epoch")}
                task.tell(epoch_note(done / steps_per_epoch, config, **of_epoch))
            log_due, monitor_due = due(config.log_every), due(config.monitor_every)
            if log_due or monitor_due:
                synchronise(world.device)
                seconds = (time.perf_counter() - clock) / (done - timed_from)
                record = {"step": done, "epoch": done / steps_per_epoch}
            if log_due:
                record |= update.read() | watch.features() | {"lr": lr}
                record["images_per_second"] = config.batch_size / seconds
                record["data_wait_share"] = batches.wait_share()
                record, of_epoch = record | of_epoch, {}
                record |= update.objective.share(features, seconds)
            if monitor_due:
                record |= watch.information()
                record["monitor_share"] = watch.information_share(seconds)
            if log_due:
                task.say(progress_note(record))
                update.restart()
            if due(config.reconstruct_every * steps_per_epoch):
                picture = config.out / "reconstructions" / f"step-{done:06d}.png"
                watch.reconstruct(picture, done, write=world.main)
            if logbook and (log_due or monitor_due):
                logbook.write(record)

            stopping = stop.requested()
            save_due = save_due or due(config.save_every * steps_per_epoch) or stopping
            if save_due and (done == total_steps or not update.doubtful()):
                save_checkpoint(config.out, done, update.tensors(), meta, config.keep, world)
                save_due, timed_from, clock = False, done, time.perf_counter()
                if stopping and done < total_steps:
                    raise Interrupted(config.out, done)
            if log_due or monitor_due:
                timed_from, clock = done, time.perf_counter()
    if logbook:
        logbook.close()
    return latest_checkpoint(config.out)


def count_steps(config: PretrainConfig, images: ImageData, world: World) -> int:
    """Steps per epoch. Raises: UserError: a batch that cannot be had, or cannot be cut."""
    if config.batch_size > len(images):
        raise UserError(f"batch_size {config.batch_size} exceeds the {len(images)} training images")
    if config.batch_size % (world.size * config.accumulate):
        raise UserError(
            f"batch_size {config.batch_size} cannot be shared evenly by {world.size} processes in "
            f"{config.accumulate} parts each (--accumulate)"
        )
    return len(images) // config.batch_size


def describe(config: PretrainConfig, train: ImageData, test: ImageData | None) -> dict[str, Any]:
    """What the weights need to be used alone, saved with them."""
    mean, std = train.stats()
    data = {
        "train": train.origin,
        "test": test.origin if test else None,
        "images": len(train),
        "img_size": list(train.img_size),
        "in_chans": train.in_chans,
        "mean": mean,
        "std": std,
    }
    return {"config": to_dict(config), "data": data}


def open_run(
    config: PretrainConfig, data: Data, meta: dict[str, Any], update: TrainingStep, world: World
) -> int:
    """Start the run folder, or load the last checkpoint of the run in it; return the steps done."""
    error = None
    if world.main:
        try:
            if config.resume:
                check_same_run(config, meta["data"])
            else:
                create_run(config, meta["data"])
                save_skipped(config.out, *data)
        except (UserError, OSError) as caught:
            error = caught
    world.agree(error)
    if not config.resume:
        return 0
    start = restore(config.out, update.tensors(), world)
    if start == 0 and world.main:
        print(f"{config.out} has no checkpoint yet: starting from step 0", file=sys.stderr)
    return start
