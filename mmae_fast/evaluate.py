"""What frozen features are worth: linear probe, nearest neighbours, reconstructions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmae_fast.augment import MASK, generator, normalise
from mmae_fast.checkpoint import load_model, pick_device
from mmae_fast.config import DataConfig, EvalConfig, UserError, VisualizeConfig, from_dict
from mmae_fast.data import ImageData, load_data
from mmae_fast.models import MaskedAutoencoder, TwoBranch

PROBE_PROTOCOL = (
    "Linear probe: multinomial logistic regression on frozen features standardised by the training "
    "set (a BatchNorm without affine), L2 {l2:g}, full-batch L-BFGS of {steps} iterations, "
    "no augmentation"
)
KNN_PROTOCOL = (
    "kNN: cosine similarity, k = {k}, votes weighted by exp(similarity / {temperature:g})"
)


@dataclass(frozen=True)
class Features:
    """Frozen features and labels of two image sets."""

    train: Tensor  # (N, D), float32
    train_labels: Tensor  # (N,)
    test: Tensor  # (M, D)
    test_labels: Tensor  # (M,)


@torch.no_grad()
def extract(
    model: MaskedAutoencoder | TwoBranch,
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    pool: str = "cls",
    batch_size: int = 500,
) -> Tensor:
    """Features of whole images: uint8 ``(N, C, H, W)`` to float32 ``(N, D)``."""
    batches = images.split(batch_size)
    return torch.cat(
        [model.forward_features(normalise(b.to(mean.device), mean, std), pool) for b in batches]
    ).float()


def linear_probe(features: Features, l2: float = 1e-4, steps: int = 100) -> tuple[float, str]:
    """Accuracy in [0, 1] of a linear classifier on frozen features, and the protocol in words.

    Deterministic, and converged rather than stopped at a number of epochs: the features of a small
    set fit in memory, where a quasi-Newton method needs neither learning rate nor schedule.
    """
    mean, std = features.train.mean(0), features.train.std(0)
    scale = torch.where(std > 1e-6, 1 / std, 0.0)  # a constant feature says nothing
    train, test = (features.train - mean) * scale, (features.test - mean) * scale
    labels = features.train_labels
    classes = int(max(labels.max(), features.test_labels.max())) + 1
    weight = torch.zeros(classes, train.shape[1], device=train.device, requires_grad=True)
    bias = torch.zeros(classes, device=train.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        predicted = (test @ weight.T + bias).argmax(dim=1)
    accuracy = (predicted == features.test_labels).float().mean().item()
    return accuracy, PROBE_PROTOCOL.format(l2=l2, steps=steps)


@torch.no_grad()
def knn(features: Features, k: int = 20, temperature: float = 0.07) -> tuple[float, str]:
    """Accuracy in [0, 1] of weighted nearest neighbours by cosine, and the protocol in words."""
    k = min(k, len(features.train))
    train, test = F.normalize(features.train, dim=1), F.normalize(features.test, dim=1)
    classes = int(max(features.train_labels.max(), features.test_labels.max())) + 1
    correct = 0
    for queries, labels in zip(test.split(1000), features.test_labels.split(1000), strict=True):
        similarity, index = (queries @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(queries), classes, device=train.device)
        votes.scatter_add_(1, features.train_labels[index], (similarity / temperature).exp())
        correct += (votes.argmax(dim=1) == labels).sum().item()
    return correct / len(test), KNN_PROTOCOL.format(k=k, temperature=temperature)


def raw_pixels(train: ImageData, test: ImageData, max_train: int | None = None) -> Features:
    """The images themselves as features: what a representation has to beat."""
    return Features(
        train.images[:max_train].flatten(1).float() / 255,
        train.labels[:max_train],
        test.images.flatten(1).float() / 255,
        test.labels,
    )


def channel_tensors(meta: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of the images that a model was trained on."""
    mean, std = (torch.tensor(meta["data"][key], device=device) for key in ("mean", "std"))
    return mean, std


@torch.no_grad()
def reconstructions(
    model: MaskedAutoencoder, images: Tensor, mean: Tensor, std: Tensor, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Originals, masked images (hidden patches NaN) and reconstructions, pixels in [0, 1].

    Visible patches are shown as they are, hidden ones as predicted, un-normalised.
    """
    device = mean.device
    shape = (len(images), model.patch_embed.num_patches)
    noise = torch.rand(shape, generator=generator(device, seed, MASK), device=device)
    imgs = normalise(images.to(device), mean, std)
    out = model(imgs, noise)

    def pixels(x: Tensor) -> Tensor:
        return (x * std.view(-1, 1, 1) + mean.view(-1, 1, 1)).clamp(0, 1).cpu()

    hidden = model.unpatchify(out.mask.unsqueeze(-1).expand_as(out.pred)).bool().cpu()
    original = pixels(imgs)
    masked = original.masked_fill(hidden, float("nan"))
    return original, masked, pixels(model.reconstruct(imgs, out.pred, out.mask))


@dataclass(frozen=True)
class OpenRun:
    """A trained model and the images to evaluate it on."""

    model: MaskedAutoencoder | TwoBranch
    meta: dict[str, Any]
    mean: Tensor  # of each channel of the images that it was trained on
    std: Tensor
    train: ImageData
    test: ImageData | None


def open_run(config: EvalConfig | VisualizeConfig) -> OpenRun:
    """Load the model of a checkpoint and the images that the configuration asks for."""
    device = pick_device(config.device)
    model, meta = load_model(config.checkpoint, device)
    data = from_dict(DataConfig, meta["config"]["data"])
    if config.train is not None:
        data = dataclasses.replace(data, train=config.train, test=None)
    changes = {"test": config.test, "img_size": config.img_size}
    data = dataclasses.replace(data, **{k: v for k, v in changes.items() if v is not None})
    train, test = load_data(data)
    expected = (meta["data"]["in_chans"], *meta["data"]["img_size"])
    if tuple(train.images.shape[1:]) != expected:
        raise UserError(
            f"the model was trained on images of shape {expected}, "
            f"those of {train.origin} have {tuple(train.images.shape[1:])}"
        )
    return OpenRun(model, meta, *channel_tensors(meta, device), train, test)


def run_features(config: EvalConfig) -> Features:
    """Features of the images that an evaluation asks for.

    Raises: UserError: images without labels, or without a test part.
    """
    run = open_run(config)
    if run.test is None:
        raise UserError(f"no test images beside {run.train.origin}; name them with --test")
    for part in (run.train, run.test):
        if part.labels is None:
            raise UserError(f"{part.origin} has no labels: there are no class subfolders in it")
    limit, device = slice(config.max_train), run.mean.device
    return Features(
        extract(run.model, run.train.images[limit], run.mean, run.std, config.pool),
        run.train.labels[limit].to(device),
        extract(run.model, run.test.images, run.mean, run.std, config.pool),
        run.test.labels.to(device),
    )


def visualize(config: VisualizeConfig) -> Path:
    """Write originals, masked images and reconstructions of test images as one PNG."""
    from mmae_fast.report import save_reconstructions

    run = open_run(config)
    if not isinstance(run.model, MaskedAutoencoder):
        raise UserError(f"{config.checkpoint} holds no masked autoencoder: nothing to reconstruct")
    images = (run.test or run.train).images[: config.count]
    original, masked, restored = reconstructions(run.model, images, run.mean, run.std, config.seed)
    rows = {f"reconstructed\n(step {run.meta['step']:,})": restored}
    save_reconstructions(config.out, original, masked, rows, run.model.mask_ratio)
    return config.out
