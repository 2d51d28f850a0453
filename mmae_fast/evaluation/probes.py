"""Classifiers of frozen features, each with its protocol in words.

[1] He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377, appendix A.1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.optim.lars import Lars
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from mmae_fast.evaluation.config import ProbeConfig
from mmae_fast.training.augment import AUGMENTATION, epoch_order, generator
from mmae_fast.training.config import UserError

LBFGS_PROTOCOL = (
    "Linear probe (L-BFGS): multinomial logistic regression on frozen features standardised by the "
    "training set (a BatchNorm without affine), L2 {l2:g}, full-batch L-BFGS of {steps} "
    "iterations, no augmentation"
)
LARS_PROTOCOL = (
    "Linear probe (LARS): BatchNorm without affine and a linear layer on frozen features, LARS, "
    "lr {base_lr:g} x {batch:,}/256, momentum 0.9, no weight decay, {epochs} epochs, "
    "{warmup_epochs} of warm-up, cosine; {views}; accuracy after the last epoch"
)
KNN_PROTOCOL = (
    "kNN: cosine similarity, k = {k}, votes weighted by exp(similarity / {temperature:g})"
)
INITIAL = 11  # stream of the initial weights, beside those of ``augment``
TRUST = 1e-3  # LARS's trust coefficient


@dataclass(frozen=True)
class Features:
    """Frozen features and labels of two image sets."""

    train: Tensor  # (N, D), float32
    train_labels: Tensor  # (N,)
    test: Tensor  # (M, D)
    test_labels: Tensor  # (M,)

    @property
    def classes(self) -> int:
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


def lars_probe(
    features: Features,
    config: ProbeConfig,
    base_lr: float,
    view: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> tuple[float, str]:
    """Accuracy in [0, 1] of the published linear probe [1], and the protocol in words.

    Deterministic: weights, order and augmentation are functions of ``config.seed`` and the step.

    Args:
        config: its epochs, warmup_epochs, batch_size and seed.
        view: features ``(B, D)`` of augmented images, given their indices (on the CPU) and a random
            generator. Default: the rows of ``features.train``.
    Raises: UserError: settings that cannot be meant, with the values received.
    """
    for name in ("epochs", "batch_size"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be >= 1, got {getattr(config, name)}")
    if not 0 <= config.warmup_epochs < config.epochs:
        raise UserError(
            f"warmup_epochs must be in [0, {config.epochs}), got {config.warmup_epochs}"
        )
    count, device = len(features.train), features.train.device
    batch = min(config.batch_size, count)
    steps_per_epoch = count // batch  # an incomplete batch is left out
    norm = nn.BatchNorm1d(features.train.shape[1], eps=1e-6, affine=False)
    head = nn.Linear(features.train.shape[1], features.classes)
    rng = generator(torch.device("cpu"), config.seed, INITIAL)
    nn.init.trunc_normal_(head.weight, std=0.01, generator=rng)
    nn.init.zeros_(head.bias)
    model = nn.Sequential(norm, head).to(device)
    optimizer = lars(head, base_lr * batch / 256)
    warmup = config.warmup_epochs * steps_per_epoch
    schedule = CosineLRScheduler(
        optimizer,
        config.epochs * steps_per_epoch - warmup,
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    for step in range(config.epochs * steps_per_epoch):
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0:
            order = epoch_order(count, config.seed, epoch)
        chosen = order[position * batch :][:batch]
        schedule.step_update(step)
        if view is None:
            inputs = features.train[chosen]
        else:
            inputs = view(chosen, generator(device, config.seed, AUGMENTATION, step))
        loss = F.cross_entropy(model(inputs), features.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = _accuracy(model(features.test), features.test_labels)
    views = "whole images" if view is None else "random crops and mirror images in every epoch"
    # LARS moves a weight by lr · TRUST of its norm; momentum multiplies that by ten.
    reach = TRUST * 10 * base_lr * batch / 256 * config.epochs * steps_per_epoch / 2
    if reach < 1:
        views += f"; too few images: it can move the weights by {reach:.2f} of their norm only"
    return accuracy, LARS_PROTOCOL.format(
        base_lr=base_lr,
        batch=batch,
        epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        views=views,
    )


def lars(head: nn.Linear, lr: float) -> Lars:
    """The published optimiser: rates adapted to the norm of the weight, not of the bias."""
    groups = [{"params": [head.weight], "always_adapt": True}, {"params": [head.bias]}]
    return Lars(groups, lr=lr, momentum=0.9, trust_coeff=TRUST, weight_decay=0.0)


def lbfgs_probe(features: Features, l2: float = 1e-4, steps: int = 100) -> tuple[float, str]:
    """Accuracy in [0, 1] of a linear classifier on frozen features, and the protocol in words.

    Deterministic, and converged rather than stopped at a number of epochs: the features of a small
    set fit in memory, where a quasi-Newton method needs neither learning rate nor schedule.
    """
    mean, std = features.train.mean(0), features.train.std(0)
    scale = torch.where(std > 1e-6, 1 / std, 0.0)  # a constant feature says nothing
    train, test = (features.train - mean) * scale, (features.test - mean) * scale
    weight = torch.zeros(features.classes, train.shape[1], device=train.device, requires_grad=True)
    bias = torch.zeros(features.classes, device=train.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight.T + bias, features.train_labels)
        loss = loss + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        accuracy = _accuracy(test @ weight.T + bias, features.test_labels)
    return accuracy, LBFGS_PROTOCOL.format(l2=l2, steps=steps)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=1) == labels).float().mean().item()


@torch.no_grad()
def knn(features: Features, k: int = 20, temperature: float = 0.07) -> tuple[float, str]:
    """Accuracy in [0, 1] of weighted nearest neighbours by cosine, and the protocol in words."""
    k = min(k, len(features.train))
    train, test = F.normalize(features.train, dim=1), F.normalize(features.test, dim=1)
    correct = 0
    for queries, labels in zip(test.split(1000), features.test_labels.split(1000), strict=True):
        similarity, index = (queries @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(queries), features.classes, device=train.device)
        votes.scatter_add_(1, features.train_labels[index], (similarity / temperature).exp())
        correct += (votes.argmax(dim=1) == labels).sum().item()
    return correct / len(test), KNN_PROTOCOL.format(k=k, temperature=temperature)
