"""Fine-tuning: a pretrained encoder and a new classifier, trained together on labelled images.

The classifier is timm's VisionTransformer, so that what is saved loads there as it is. Every draw
is a function of the seed and the step: a resumed run ends as an uninterrupted one does.

[1] He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377, appendix A.1
"""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.models.vision_transformer import VisionTransformer as TimmViT
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mmae_fast.augment import AUGMENTATION, augment, epoch_order, generator, normalise
from mmae_fast.checkpoint import latest_checkpoint, restore, save_checkpoint
from mmae_fast.config import UserError, to_dict
from mmae_fast.data import save_skipped
from mmae_fast.eval_config import FinetuneConfig
from mmae_fast.evaluate import OpenRun, check_labels, open_run
from mmae_fast.export import encoder_options, timm_state
from mmae_fast.launch import StopOnSignal, World
from mmae_fast.models import LAYER_NORM
from mmae_fast.progress import Board, Task
from mmae_fast.published import Model
from mmae_fast.runs import MetricsFile, check_same_run, create_run
from mmae_fast.train import Interrupted

RESULT = "finetune.json"
MIN_LR = 1e-6
MAGNITUDES = 30  # of torchvision's RandAugment

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
    if task is None:
        with Board() as board:
            return finetune(config, board.task("fine-tuning"))
    check(config)
    source = open_run(config)
    check_labels(source)
    train, test, device = source.train, source.test, source.mean.device
    if config.rand_augment and train.in_chans not in (1, 3):
        raise UserError(
            f"--rand-augment takes images of 1 or 3 channels, these have {train.in_chans}"
        )
    if config.batch_size > len(train):
        raise UserError(f"batch_size {config.batch_size} exceeds the {len(train)} training images")
    steps_per_epoch = len(train) // config.batch_size  # an incomplete batch is left out
    total_steps = config.epochs * steps_per_epoch

    seed_all(config.seed, 0)
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
    start, loss_sum, world = 0, torch.zeros((), device=device), World(device)
    files = tensors(model, scored, optimizer) | {"loss": {"sum": loss_sum}}
    if config.resume:
        check_same_run(config, meta["data"])
        start = restore(config.out, files, world)
    else:
        create_run(config, meta["data"])
        save_skipped(config.out, train, test)
    metrics = MetricsFile(config.out / "metrics.jsonl", start)
    batches = LabelledBatches(source, config)

    task.start(total_steps, start)
    timed_from, clock = start, time.perf_counter()
    with StopOnSignal(world) as stop:
        for step in range(start, total_steps):
            # Drop path, mixup and erasing draw from the global generators.
            seed_all(config.seed, 1 + step)
            images, targets = batches(step)
            schedule.step_update(step)
            model.train()
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), targets)
            loss.backward()
            if config.clip_grad is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                average.update(model)
            loss_sum += loss.detach()
            done = step + 1
            task.advance()

            if done % steps_per_epoch == 0:
                mean_loss = (loss_sum / steps_per_epoch).item()
                seconds = (time.perf_counter() - clock) / (done - timed_from)
                accuracy = score(scored, test.images, test.labels, source)
                record = {
                    "step": done,
                    "epoch": done // steps_per_epoch,
                    "loss": mean_loss,
                    "accuracy": accuracy,
                    "lr": max(group["lr"] for group in optimizer.param_groups),
                    "images_per_second": config.batch_size / seconds,
                }
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
    return write_result(config, score(scored, test.images, test.labels, source))


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


def check(config: FinetuneConfig) -> None:
    """Raise UserError, with the value received, for settings that cannot be meant."""
    for name in ("epochs", "batch_size", "save_every", "keep"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be >= 1, got {getattr(config, name)}")
    if not 0 <= config.warmup_epochs < config.epochs:
        raise UserError(
            f"warmup_epochs must be in [0, {config.epochs}), got {config.warmup_epochs}"
        )
    if not 0 < config.layer_decay <= 1:
        raise UserError(f"layer_decay must be in (0, 1], got {config.layer_decay}")
    if not 0 < config.min_crop <= 1:
        raise UserError(f"min_crop must be in (0, 1], got {config.min_crop}")
    for name in ("drop_path", "smoothing", "erasing"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name} must be in [0, 1), got {getattr(config, name)}")
    for name in ("mixup", "cutmix"):
        if not getattr(config, name) >= 0:
            raise UserError(f"{name} must be >= 0, got {getattr(config, name)}")
    if not 0 <= config.rand_augment <= MAGNITUDES:
        raise UserError(f"rand_augment must be in [0, {MAGNITUDES}], got {config.rand_augment}")
    if config.ema is not None and not 0 < config.ema < 1:
        raise UserError(f"ema must be in (0, 1), got {config.ema}")
    if (config.mixup or config.cutmix) and config.batch_size % 2:
        raise UserError(f"mixup and cutmix need an even batch_size, got {config.batch_size}")


def seed_all(*key: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch by a function of the key."""
    seed = generator(torch.device("cpu"), *key).initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_classifier(model: Model, options: dict[str, Any], drop_path: float = 0.0) -> TimmViT:
    """timm's VisionTransformer with the encoder's weights and a new head, as published.

    With ``global_pool="avg"`` the final norm is replaced by a new one after the mean.
    """
    net = TimmViT(**options, drop_path_rate=drop_path, norm_layer=LAYER_NORM)
    state = timm_state(model)
    if options["global_pool"] == "avg":
        state = {name: value for name, value in state.items() if not name.startswith("norm.")}
    missing, unexpected = net.load_state_dict(state, strict=False)
    new = {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    if unexpected or set(missing) - new:
        raise UserError(f"weights that do not fit: {sorted({*unexpected, *missing} - new)}")
    nn.init.trunc_normal_(net.head.weight, std=2e-5)
    nn.init.zeros_(net.head.bias)
    return net


def build_optimizer(model: TimmViT, config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW whose rate falls by ``layer_decay`` from each layer to the one below it.

    Head and the norm after the mean: rate 1; block i of n (from 0): ``decay ** (n - i)``;
    embeddings: one more. A norm before pooling goes with the last block. No weight decay of
    vectors, class token and positions. As timm's ``param_groups_layer_decay``.
    """
    groups = param_groups_layer_decay(
        model, config.weight_decay, model.no_weight_decay(), layer_decay=config.layer_decay
    )
    lr = config.base_lr * config.batch_size / 256
    groups = [group | {"lr": lr * group["lr_scale"]} for group in groups]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def build_schedule(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int
) -> CosineLRScheduler:
    """Linear warm-up from zero, then half a cosine; ``lr_scale`` of a group multiplies both."""
    peak = optimizer.defaults["lr"]
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"] = peak
    return CosineLRScheduler(
        optimizer,
        max(1, total_steps - warmup_steps),
        lr_min=min(MIN_LR, peak),
        warmup_t=warmup_steps,
        warmup_prefix=True,
        t_in_epochs=False,
    )


class LabelledBatches:
    """Augmented images ``(B, C, H, W)`` and target probabilities ``(B, classes)`` of a step."""

    def __init__(self, source: OpenRun, config: FinetuneConfig) -> None:
        self.source, self.config = source, config
        self.classes = len(source.train.classes)
        self.steps_per_epoch = len(source.train) // config.batch_size
        self.mixup = None
        if config.mixup or config.cutmix:
            self.mixup = Mixup(
                config.mixup,
                config.cutmix,
                label_smoothing=config.smoothing,
                num_classes=self.classes,
            )
        self.erase = None
        if config.erasing:
            self.erase = RandomErasing(config.erasing, mode="pixel", device=source.mean.device)

        self.rand_augment = None
        if config.rand_augment:
            from torchvision.transforms.v2 import RandAugment

            self.rand_augment = RandAugment(2, config.rand_augment)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        config, train = self.config, self.source.train
        mean, std = self.source.mean, self.source.std
        epoch, position = divmod(step, self.steps_per_epoch)
        order = epoch_order(len(train), config.seed, epoch)
        chosen = order[position * config.batch_size :][: config.batch_size]
        images = train.crop_source[chosen].to(mean.device).float()
        rng = generator(mean.device, config.seed, AUGMENTATION, step)
        images = augment(images, rng, config.min_crop, config.hflip, train.img_size)
        if self.rand_augment is not None:
            # In the published order: before normalisation, each image for itself.
            rounded = images.round().to(torch.uint8).cpu()
            images = torch.stack([self.rand_augment(image) for image in rounded]).to(mean.device)
        images = normalise(images, mean, std)
        labels = train.labels[chosen].to(mean.device)
        if self.erase is not None:
            images = self.erase(images)
        if self.mixup is not None:
            return self.mixup(images, labels)
        return images, smooth(labels, self.classes, config.smoothing)


def smooth(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Labels ``(B,)`` to probabilities ``(B, classes)``: a share is spread over all classes."""
    return (1 - smoothing) * F.one_hot(labels, classes).float() + smoothing / classes


@torch.no_grad()
def score(model: nn.Module, images: Tensor, labels: Tensor, source: OpenRun) -> float:
    """Accuracy in [0, 1] on whole images."""
    model.eval()
    correct = 0
    for batch, truth in zip(images.split(500), labels.split(500), strict=True):
        logits = model(normalise(batch.to(source.mean.device), source.mean, source.std))
        correct += (logits.argmax(dim=1).cpu() == truth).sum().item()
    return correct / len(images)


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


def write_result(config: FinetuneConfig, accuracy: float) -> tuple[float, str]:
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
    for folder in folders:
        (folder / RESULT).write_text(text)
    return accuracy, protocol
