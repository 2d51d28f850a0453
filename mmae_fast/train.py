"""Pretraining of masked autoencoders: MAE, and MAE with a matrix-entropy regulariser.

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
from pathlib import Path
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from mmae_fast import fast_matrix_entropy
from mmae_fast.augment import Batches, normalise
from mmae_fast.checkpoint import latest_checkpoint, load_state, pick_device, save_checkpoint
from mmae_fast.config import METHODS, LossConfig, PretrainConfig, UserError, to_dict
from mmae_fast.data import ImageData, load_data
from mmae_fast.losses import MatrixEntropyRegularizer
from mmae_fast.models import MaskedAutoencoder, build_model
from mmae_fast.progress import Board, Task
from mmae_fast.runs import MetricsFile, check_same_run, create_run

HELD_OUT = 512  # test images whose features the entropy curves describe


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
    model = build_model(config.model, train.img_size, train.in_chans).to(device)
    regularizer = build_regularizer(config.loss)
    optimizer = torch.optim.AdamW(
        param_groups_weight_decay(model, config.weight_decay),
        lr=peak_lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    meta = describe(config, train, test)
    start, sums = 0, torch.zeros(3, device=device)
    if config.resume:
        start, sums = restore(config, meta, model, optimizer)
    else:
        create_run(config, meta["data"])
    metrics = MetricsFile(config.out / "metrics.jsonl", start)

    mean, std = (torch.tensor(meta["data"][key], device=device) for key in ("mean", "std"))
    batches = Batches(train.images, mean, std, model.patch_embed.num_patches, config)
    held_out = normalise((test or train).images[:HELD_OUT].to(device), mean, std)
    if start == 0:
        metrics.write({"step": 0, "epoch": 0.0, **feature_metrics(model, held_out)})

    task.start(total_steps, start)
    summed_from, timed_from, clock = start - start % config.log_every, start, time.perf_counter()
    with StopOnSignal() as stop:
        for step in range(start, total_steps):
            imgs, noise = batches(step)
            lr = learning_rate(step, peak_lr, warmup_steps, total_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                out = model(imgs, noise)
            penalty = regularizer(out.features)
            loss = out.loss + penalty
            loss.backward()
            if config.clip_grad is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            # Summed on the device: to read a number here would make the host wait at every step.
            sums += torch.stack([loss, out.loss, penalty]).detach()
            done = step + 1
            task.advance()

            if done % config.log_every == 0 or done == total_steps:
                total, recon, reg = (sums / (done - summed_from)).tolist()
                seconds = (time.perf_counter() - clock) / (done - timed_from)
                entropies = feature_metrics(model, held_out)
                share = regularizer_seconds(regularizer, out.features) / seconds
                metrics.write(
                    {
                        "step": done,
                        "epoch": done / steps_per_epoch,
                        "loss": total,
                        "recon_loss": recon,
                        "regularizer": reg,
                        **entropies,
                        "lr": lr,
                        "images_per_second": config.batch_size / seconds,
                        "regularizer_share": share,
                    }
                )
                task.say(
                    f"loss {total:.3f}, effective rank {entropies['effective_rank']:.1f}, "
                    f"{config.batch_size / seconds:,.0f} img/s"
                )
                if not math.isfinite(total):
                    raise UserError(
                        f"the loss is {total} at step {done}; lower --base-lr or set --clip-grad "
                        f"(last checkpoint: {latest_checkpoint(config.out)})"
                    )
                sums.zero_()
                summed_from, timed_from, clock = done, done, time.perf_counter()

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


def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from zero, then half a cosine down to zero."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


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
    model: MaskedAutoencoder,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, Tensor]:
    """Load the last checkpoint of the run; return the steps done and the sums of the losses."""
    check_same_run(config, meta["data"])
    folder = latest_checkpoint(config.out)
    if folder is None:
        raise UserError(f"{config.out} has no checkpoint yet; remove it and start again")
    state = load_state(folder, model)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["sums"].to(model.pos_embed.device)


@torch.no_grad()
def feature_metrics(model: MaskedAutoencoder, images: Tensor) -> dict[str, float]:
    """Matrix entropy H_1 (nats) and effective rank of the class tokens of unmasked images.

    Of ``ρ = ẐᵀẐ / n``, Ẑ the features scaled to unit norm and not centred: the matrix that the
    regulariser sees, here without masks.
    """
    model.eval()
    entropy = fast_matrix_entropy(model.forward_features(images)).item()
    model.train()
    return {"matrix_entropy": entropy, "effective_rank": math.exp(entropy)}


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
