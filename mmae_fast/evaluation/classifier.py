"""What fine-tuning trains, and on what: classifier, optimizer, schedule, labelled batches.

[1] He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377, appendix A.1
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.models.vision_transformer import VisionTransformer as TimmViT
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from mmae_fast.evaluation.config import FinetuneConfig
from mmae_fast.evaluation.evaluate import OpenRun
from mmae_fast.evaluation.export import timm_state
from mmae_fast.evaluation.published import Model
from mmae_fast.training.augment import AUGMENTATION, augment, epoch_order, generator, normalise
from mmae_fast.training.config import UserError
from mmae_fast.training.models import LAYER_NORM

MIN_LR = 1e-6


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
    """Augmented images ``(B, C, H, W)`` and target probabilities ``(B, classes)`` of a step.

    B is the batch size divided by ``world``, of which this is the ``rank``-th part. Crops are those
    of the whole batch; mixup, erasing and RandAugment are drawn by each process for its part, from
    the global generators: see ``seed_all``.
    """

    def __init__(
        self, source: OpenRun, config: FinetuneConfig, rank: int = 0, world: int = 1
    ) -> None:
        self.source, self.config, self.shard = source, config, (rank, world)
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
        rank, world = self.shard
        part = config.batch_size // world
        chosen = order[position * config.batch_size + rank * part :][:part]
        images = train.crop_source[chosen].to(mean.device).float()
        rng = generator(mean.device, config.seed, AUGMENTATION, step)
        images = augment(images, rng, config.min_crop, config.hflip, train.img_size, self.shard)
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
