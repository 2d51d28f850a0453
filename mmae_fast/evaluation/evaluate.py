"""A trained model and the images to evaluate it on: features, probes, reconstructions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmae_fast.evaluation.config import EvalConfig, FinetuneConfig, ProbeConfig, VisualizeConfig
from mmae_fast.evaluation.probes import Features, knn, lars_probe, lbfgs_probe
from mmae_fast.evaluation.published import Model, check_norm_pix, open_model
from mmae_fast.measures import spectrum
from mmae_fast.training.augment import augment, normalise
from mmae_fast.training.checkpoint import pick_device
from mmae_fast.training.config import DataConfig, UserError, from_dict
from mmae_fast.training.data import ImageData, load_data
from mmae_fast.training.data.builtin import BUILT_IN
from mmae_fast.training.models import MaskedAutoencoder, TwoBranch, VisionTransformer
from mmae_fast.training.reconstruct import reconstructions, save_reconstructions

MIN_CROP = 0.08  # torchvision's default, which the published linear probe and fine-tuning use


@torch.no_grad()
def extract(
    model: Model,
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


@dataclass(frozen=True)
class OpenRun:
    """A trained model and the images to evaluate it on."""

    model: Model
    meta: dict[str, Any]
    mean: Tensor  # of each channel of the images that it was trained on
    std: Tensor
    train: ImageData
    test: ImageData | None


def open_run(config: EvalConfig | FinetuneConfig | VisualizeConfig) -> OpenRun:
    """Load the model of a checkpoint and the images that the configuration asks for.

    For images of another size than the model was trained on its positions are resampled.

    Raises: UserError: what is missing or does not fit, with the values received.
    """
    device = pick_device(config.device)
    model, meta = open_model(config.checkpoint, device, config.published)
    data = from_dict(DataConfig, meta["config"]["data"])
    if config.train is not None:
        # Decoded as the model takes them; built-in sets are what they are.
        size, channels = tuple(meta["data"]["img_size"]), meta["data"]["in_chans"]
        if config.train in BUILT_IN:
            size = channels = None
        data = dataclasses.replace(
            data, train=config.train, test=None, img_size=size, in_chans=channels
        )
    elif "published" in meta:
        raise UserError(f"say which images {config.checkpoint} is to be run on: --train")
    changes = {"test": config.test, "img_size": config.img_size}
    data = dataclasses.replace(data, **{k: v for k, v in changes.items() if v is not None})
    train, test = load_data(data)
    if train.in_chans != meta["data"]["in_chans"]:
        raise UserError(
            f"the model takes images of {meta['data']['in_chans']} channels, those of "
            f"{train.origin} have {train.in_chans}"
        )
    encoder = model.backbone if isinstance(model, TwoBranch) else model
    if train.img_size != tuple(meta["data"]["img_size"]) and isinstance(encoder, VisionTransformer):
        try:
            encoder.resize(train.img_size)
        except ValueError as error:
            raise UserError(str(error)) from error
    return OpenRun(model, meta, *channel_tensors(meta, device), train, test)


def check_labels(run: OpenRun) -> None:
    """Raise UserError for images without labels, or without a test part."""
    if run.test is None:
        raise UserError(f"no test images beside {run.train.origin}; name them with --test")
    for part in (run.train, run.test):
        if part.labels is None:
            raise UserError(f"{part.origin} has no labels: there are no class subfolders in it")


def run_features(config: EvalConfig, run: OpenRun) -> Features:
    """Features of the images that an evaluation asks for. Raises: as ``check_labels``."""
    check_labels(run)
    limit, device = slice(config.max_train), run.mean.device
    return Features(
        extract(run.model, run.train.images[limit], run.mean, run.std, config.pool),
        run.train.labels[limit].to(device),
        extract(run.model, run.test.images, run.mean, run.std, config.pool),
        run.test.labels.to(device),
    )


def probe(config: ProbeConfig) -> tuple[float, str]:
    """Linear probe of a checkpoint: accuracy in [0, 1] and the protocol in words."""
    run = open_run(config)
    features = run_features(config, run)
    if config.protocol == "lbfgs":
        return lbfgs_probe(features)
    pretraining = run.meta["config"]
    base_lr = config.base_lr
    if base_lr is None:
        base_lr = 0.05 if pretraining["loss"]["method"] == "m_mae" else 0.1

    @torch.no_grad()
    def view(chosen: Tensor, rng: torch.Generator) -> Tensor:
        images = run.train.crop_source[chosen].to(run.mean.device)
        images = normalise(images, run.mean, run.std)
        images = augment(images, rng, MIN_CROP, pretraining["hflip"], run.train.img_size)
        parts = images.split(500)
        return torch.cat([run.model.forward_features(part, config.pool) for part in parts]).float()

    return lars_probe(features, config, base_lr, view if config.augment else None)


def classify(features: Features) -> dict[str, Any]:
    """Accuracies of both quick classifiers; spectrum and effective rank of the test features."""
    accuracy, probe_protocol = lbfgs_probe(features)
    neighbours, knn_protocol = knn(features)
    values = spectrum(features.test)
    return {
        "linear_probe": accuracy,
        "knn": neighbours,
        "effective_rank": torch.special.entr(values).sum().exp().item(),
        "spectrum": values.tolist(),
        "protocol": f"{probe_protocol}. {knn_protocol}",
    }


def nearest_neighbours(config: EvalConfig) -> tuple[float, str]:
    """kNN of a checkpoint: accuracy in [0, 1] and the protocol in words."""
    return knn(run_features(config, open_run(config)))


def visualize(config: VisualizeConfig) -> Path:
    """Write originals, masked images and reconstructions of test images as one PNG."""
    run = open_run(config)
    if not isinstance(run.model, MaskedAutoencoder):
        raise UserError(f"{config.checkpoint} holds no masked autoencoder with its decoder")
    check_norm_pix(run.meta, config.checkpoint)
    images = (run.test or run.train).images[: config.count]
    original, masked, restored = reconstructions(run.model, images, run.mean, run.std, config.seed)
    step = run.meta["step"]
    rows = {"reconstructed" + ("" if step is None else f"\n(step {step:,})"): restored}
    save_reconstructions(config.out, original, masked, rows, run.model.mask_ratio)
    return config.out
