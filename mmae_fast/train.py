"""Pretraining: masked autoencoders, with or without a regulariser, and two-branch methods.

A run folder holds ``config.json`` (configuration, data, versions), ``metrics.jsonl`` and
``checkpoints/``. Batches, augmentations and masks are functions of the seed and the step, so that
an interrupted run, resumed, ends in the same weights as an uninterrupted one.
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from mmae_fast import fast_matrix_entropy, losses
from mmae_fast.augment import VIEWS, Batches, generator, normalise, two_views
from mmae_fast.checkpoint import latest_checkpoint, load_state, pick_device, save_checkpoint
from mmae_fast.config import METHODS, LossConfig, PretrainConfig, UserError, to_dict
from mmae_fast.data import ImageData, load_data, save_skipped
from mmae_fast.losses import MatrixEntropyRegularizer
from mmae_fast.measures import shared_information
from mmae_fast.models import MaeOutput, MaskedAutoencoder, TwoBranch, build_model
from mmae_fast.progress import Board, Task
from mmae_fast.runs import MetricsFile, check_same_run, create_run

HELD_OUT = 512  # test images whose features the entropy curves describe
MONITORED = 256  # test images whose two views the information curves describe


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and left a checkpoint."""

    def __init__(self, run: Path, step: int) -> None:
        super().__init__(f"stopped after step {step}, checkpoint in {run}; --resume continues")


def pretrain(
    config: PretrainConfig,
    data: tuple[ImageData, ImageData | None] | None = None,
    task: Task | None = None,
) -> Path:
    """Train, or continue training, and return the folder of the final checkpoint.

    Args:
        config: everything that defines the run.
        data: training and test images, where they are loaded already.
        task: shows the progress; default: a bar of its own.
    Raises:
        UserError: what cannot work, with the values received.
        Interrupted: after Ctrl-C or SIGTERM, when the checkpoint is written.
    """
    if task is None:
        with Board() as board:
            return pretrain(config, data, board.task(METHODS[config.loss.method][1]))

    check(config)
    device = pick_device(config.device)
    train, test = data or load_data(config.data)
    if config.batch_size > len(train):
        raise UserError(f"batch_size {config.batch_size} exceeds the {len(train)} training images")
    steps_per_epoch = len(train) // config.batch_size
    total_steps = max(1, round(config.epochs * steps_per_epoch))
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    peak_lr = config.base_lr * config.batch_size / 256

    torch.manual_seed(config.seed)
    model = build_model(config, train.img_size, train.in_chans).to(device)
    objective = build_objective(config.loss)
    optimizer = torch.optim.AdamW(
        param_groups_weight_decay(model, config.weight_decay),
        lr=peak_lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    meta = describe(config, train, test)
    start, sums = 0, torch.zeros(1 + len(objective.terms), device=device)
    if config.resume:
        start, sums = restore(config, meta, model, optimizer)
        sums = sums.to(device)
    else:
        create_run(config, meta["data"])
        save_skipped(config.out, train, test)
    metrics = MetricsFile(config.out / "metrics.jsonl", start)

    mean, std = (torch.tensor(meta["data"][key], device=device) for key in ("mean", "std"))
    batches = Batches(train.crop_source, mean, std, config, size=train.img_size)
    held_out = (test or train).images[:HELD_OUT].to(device)
    rng = generator(device, config.seed, VIEWS)
    views = two_views(held_out[:MONITORED], mean, std, rng, config)
    held_out = normalise(held_out, mean, std)
    if start == 0:
        record = {"step": 0, "epoch": 0.0, **feature_metrics(model, held_out)}
        metrics.write(record | (view_metrics(model, views) if config.monitor_every else {}))

    task.start(total_steps, start)
    monitor_seconds: list[float] = []
    summed_from, timed_from, clock = start - start % config.log_every, start, time.perf_counter()
    with StopOnSignal() as stop:
        for step in range(start, total_steps):
            inputs = batches(step)
            lr = learning_rate(step, peak_lr, warmup_steps, total_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                out = model(*inputs)
            terms = objective(out)
            loss = sum(terms)
            loss.backward()
            if config.clip_grad is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            # Summed on the device: to read a number here would make the host wait at every step.
            sums += torch.stack([loss, *terms]).detach()
            done = step + 1
            task.advance()

            log_due = done % config.log_every == 0 or done == total_steps
            monitor_due = config.monitor_every and (
                done % config.monitor_every == 0 or done == total_steps
            )
            if log_due or monitor_due:
                _synchronise(device)
                seconds = (time.perf_counter() - clock) / (done - timed_from)
                record = {"step": done, "epoch": done / steps_per_epoch}
            if log_due:
                total, *parts = (sums / (done - summed_from)).tolist()
                record |= {"loss": total} | dict(zip(objective.terms, parts, strict=True))
                record |= feature_metrics(model, held_out)
                record |= {"lr": lr, "images_per_second": config.batch_size / seconds}
                record["data_wait_share"] = batches.wait_share()
                record |= objective.share(out, seconds)
            if monitor_due:
                before = time.perf_counter()
                record |= view_metrics(model, views)
                monitor_seconds.append(time.perf_counter() - before)
                spent = statistics.median(monitor_seconds) / config.monitor_every
                record["monitor_share"] = spent / (spent + seconds)
            if log_due or monitor_due:
                metrics.write(record)
                timed_from, clock = done, time.perf_counter()
            if log_due:
                task.say(progress_note(record))
                if not math.isfinite(total):
                    raise UserError(
                        f"the loss is {total} at step {done}; lower --base-lr or set --clip-grad "
                        f"(last checkpoint: {latest_checkpoint(config.out)})"
                    )
                sums.zero_()
                summed_from = done

            save_due = done % (config.save_every * steps_per_epoch) == 0 or done == total_steps
            if save_due or stop.requested:
                state = {"step": done, "optimizer": optimizer.state_dict(), "sums": sums}
                save_checkpoint(config.out, done, model, state, meta | {"step": done})
                timed_from, clock = done, time.perf_counter()
            if stop.requested and done < total_steps:
                raise Interrupted(config.out, done)
    return latest_checkpoint(config.out)


def check(config: PretrainConfig) -> None:
    """Raise UserError, with the value received, for settings that cannot be meant."""
    for name in ("epochs", "batch_size", "log_every", "save_every"):
        if not getattr(config, name) > 0:
            raise UserError(f"{name} must be > 0, got {getattr(config, name)}")
    if not 0 < config.min_crop <= 1:
        raise UserError(f"min_crop must be in (0, 1], got {config.min_crop}")
    if config.monitor_every < 0:
        raise UserError(f"monitor_every must be >= 0, got {config.monitor_every}")
    if not config.two_branch.jitter >= 0:
        raise UserError(f"two_branch.jitter must be >= 0, got {config.two_branch.jitter}")
    if not 0 <= config.two_branch.grey <= 1:
        raise UserError(f"two_branch.grey must be in [0, 1], got {config.two_branch.grey}")
    two_branch = METHODS[config.loss.method][0] is None
    if two_branch and config.batch_size < 2:
        raise UserError(f"two branches need batch_size >= 2, got {config.batch_size}")
    for name in ("temperature", "lambd"):
        if two_branch and not getattr(config.loss, name) > 0:
            raise UserError(f"loss.{name} must be > 0, got {getattr(config.loss, name)}")


def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from zero, then half a cosine down to zero."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


class MaskedObjective:
    """Loss terms of a masked autoencoder: reconstruction, regulariser of the class token."""

    terms = ("recon_loss", "regularizer")

    def __init__(self, config: LossConfig) -> None:
        self.regularizer = build_regularizer(config)

    def __call__(self, out: MaeOutput) -> tuple[Tensor, Tensor]:
        return out.loss, self.regularizer(out.features)

    def share(self, out: MaeOutput, step_seconds: float) -> dict[str, float]:
        """Part of a step that the regulariser's forward and backward pass take."""
        return {
            "regularizer_share": regularizer_seconds(self.regularizer, out.features) / step_seconds
        }


class TwoBranchObjective:
    """The loss of two branches, of the projections of two views."""

    terms = ("two_branch_loss",)

    def __init__(self, config: LossConfig) -> None:
        self.loss: Callable[[Tensor, Tensor], Tensor] = {
            "barlow_twins": partial(losses.barlow_twins_loss, lambd=config.lambd),
            "spectral": partial(losses.spectral_contrastive_loss, mu=config.mu),
            "simclr": partial(losses.info_nce_loss, temperature=config.temperature),
        }[config.method]

    def __call__(self, out: tuple[Tensor, Tensor]) -> tuple[Tensor]:
        return (self.loss(*out),)

    def share(self, out: tuple[Tensor, Tensor], step_seconds: float) -> dict[str, float]:
        return {}  # the loss is all there is


def build_objective(config: LossConfig) -> MaskedObjective | TwoBranchObjective:
    """What turns a model's output into the terms whose sum is minimised."""
    two_branch = METHODS[config.method][0] is None
    return TwoBranchObjective(config) if two_branch else MaskedObjective(config)


def build_regularizer(config: LossConfig) -> MatrixEntropyRegularizer:
    try:
        return MatrixEntropyRegularizer(
            METHODS[config.method][0], config.weight, config.mu, config.alpha, config.center
        )
    except ValueError as error:
        raise UserError(str(error)) from error


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


def restore(
    config: PretrainConfig,
    meta: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, Tensor]:
    """Load the last checkpoint of the run; return the steps done and the sums of the losses."""
    check_same_run(config, meta["data"])
    folder = latest_checkpoint(config.out)
    if folder is None:
        raise UserError(f"{config.out} has no checkpoint yet; remove it and start again")
    state = load_state(folder, model)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["sums"]


@torch.no_grad()
def feature_metrics(model: MaskedAutoencoder | TwoBranch, images: Tensor) -> dict[str, float]:
    """Matrix entropy H_1 (nats) and effective rank of the encoder's features of whole images.

    Of ``ρ = ẐᵀẐ / n``, Ẑ the features (class tokens) scaled to unit norm and not centred: the
    matrix that the regulariser sees, here without masks.
    """
    model.eval()
    entropy = fast_matrix_entropy(model.forward_features(images)).item()
    model.train()
    return {"matrix_entropy": entropy, "effective_rank": math.exp(entropy)}


@torch.no_grad()
def view_metrics(
    model: MaskedAutoencoder | TwoBranch, views: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Entropies and mutual information of two fixed views of held-out images, see ``measures``.

    ``backbone_…`` are of the encoder's features, ``projector_…`` of the projections, where there
    is a projector. In evaluation mode: BatchNorm with its running statistics.
    """
    model.eval()
    features = {"backbone": [model.forward_features(view) for view in views]}
    if isinstance(model, TwoBranch):
        features["projector"] = [model.projector(h) for h in features["backbone"]]
    model.train()
    return {
        f"{part}_{name}": value
        for part, (z1, z2) in features.items()
        for name, value in shared_information(z1, z2).items()
    }


def progress_note(record: dict[str, float]) -> str:
    """The gist of a line of metrics.jsonl, beside the bar."""
    note = (
        f"loss {record['loss']:.3f}, effective rank {record['effective_rank']:.1f}, "
        f"{record['images_per_second']:,.0f} img/s, waited for data {record['data_wait_share']:.1%}"
    )
    if "monitor_share" in record:
        part = "projector" if "projector_entropy_1" in record else "backbone"
        mutual = record[f"{part}_mutual_information_1"]
        note += f", mutual information {mutual:.2f}, monitoring {record['monitor_share']:.2%}"
    return note


def regularizer_seconds(regularizer: nn.Module, features: Tensor, repeats: int = 3) -> float:
    """Median time of the regulariser's forward and backward pass on given features."""
    features = features.detach().requires_grad_()
    times = []
    for _ in range(1 + repeats):
        _synchronise(features.device)
        start = time.perf_counter()
        value = regularizer(features)
        if not value.requires_grad:
            return 0.0
        value.backward()
        _synchronise(features.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one warms up


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StopOnSignal:
    """Turns the first Ctrl-C or SIGTERM into a request; a second one has its usual effect."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> StopOnSignal:
        self.requested = False
        self._previous = {}
        # Python delivers signals to the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._request) for s in self.SIGNALS}
        return self

    def _request(self, *_: object) -> None:
        self.requested = True
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exc: object) -> None:
        self._give_back()
