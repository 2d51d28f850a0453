"""Typed configurations of the training program; recipes.py has those with a name.

Knows the standard library only, so that ``mmae --help`` answers without importing torch.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


class UserError(ValueError):
    """Something that the user can put right. The command line prints it without a traceback."""


Method = Literal[
    "mae", "u_mae", "m_mae", "von_neumann", "renyi", "barlow_twins", "spectral", "simclr"
]

# Method -> (kind of MatrixEntropyRegularizer, None for two branches; name in tables and figures).
METHODS: dict[str, tuple[str | None, str]] = {
    "mae": ("none", "MAE"),
    "u_mae": ("uniformity", "U-MAE"),
    "m_mae": ("tcr", "M-MAE"),
    "von_neumann": ("von_neumann", "MAE + von Neumann entropy"),
    "renyi": ("renyi", "MAE + Rényi entropy"),
    "barlow_twins": (None, "Barlow Twins"),
    "spectral": (None, "spectral contrastive"),
    "simclr": (None, "SimCLR"),
}


@dataclass(frozen=True)
class DataConfig:
    """Which images to use."""

    train: str = "fashion-mnist"
    """fashion-mnist, digits, cifar10, cifar100, svhn, stl10, stl10-unlabelled; a pack (mmae data
    pack), a folder of images or of .tar shards, a .tar, an .npz of JPEGs, or hf:NAME."""
    test: str | None = None
    """Test images, same forms. Default: the test part of a built-in set, or val/ or test/ beside
    the train/ of a folder."""
    img_size: int | tuple[int, int] | None = None
    """Pixels of a side, or height and width, to which images are resized and cropped when they are
    decoded; of a larger pack, random crops and centres are taken. Default: all have one size."""
    cache: Path = Path("~/.cache/mmae_fast")
    """Where downloads are kept."""
    in_chans: int | None = None
    """Channels: 1 grey, 3 RGB, 4 RGBA, any number of .npy arrays. Default: 3, those of arrays."""
    value_range: tuple[float, float] | None = None
    """Of images with more than 8 bits, the values that become 0 and 255. Default: 0 and the
    largest of unsigned integers, 0 and 1 of floats."""
    strict: bool = False
    """Stop at an image that cannot be decoded. Default: skip it and list it in skipped.txt."""


@dataclass(frozen=True)
class PackConfig:
    """Decode images once into a pack: one memory-mapped file with checksums, to train from."""

    source: str
    """Folder of images or of .tar shards, .tar, .npz of JPEGs, hf:NAME, or a built-in set."""
    out: Path
    """Folder of the pack. An interrupted pack is continued by the same command."""
    split: str = "train"
    """Part of a built-in set or of hf:NAME."""
    img_size: int | tuple[int, int] | None = None
    """Pixels of a side, or height and width, to resize and crop to. Random crops of 224 pixels are
    best taken from 256. Default: as they are, all of one size."""
    in_chans: int | None = None
    """Channels: 1 grey, 3 RGB, 4 RGBA, any number of .npy arrays. Default: 3, those of arrays."""
    value_range: tuple[float, float] | None = None
    """Of images with more than 8 bits, the values that become 0 and 255. Default: 0 and the
    largest of unsigned integers, 0 and 1 of floats."""
    strict: bool = False
    """Stop at an image that cannot be decoded. Default: skip it and list it in skipped.txt."""
    cache: Path = Path("~/.cache/mmae_fast")
    """Where downloads are kept."""


@dataclass(frozen=True)
class PackedConfig:
    """A pack."""

    pack: Path
    """Its folder."""


@dataclass(frozen=True)
class ModelConfig:
    """Size of the masked autoencoder. Default: ViT-B/16 with the published decoder."""

    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    mask_ratio: float = 0.75
    """Share of the patches hidden from the encoder."""
    norm_pix_loss: bool = True
    """Predict patches normalised by their own mean and standard deviation."""
    double_norm: bool = False
    """Regularise the class token after the final norm applied twice, as the published M-MAE."""


@dataclass(frozen=True)
class LossConfig:
    """Method and its loss: a masked autoencoder with a regulariser of the class-token features, or
    two branches (barlow_twins, spectral, simclr)."""

    method: Method = "m_mae"
    weight: float = 0.01
    """Weight of the regulariser in the loss."""
    mu: float = 1.0
    """Scale of the total coding rate (m_mae); mu of the spectral contrastive loss (spectral)."""
    lambd: float = 0.0051
    """Weight of the off-diagonal correlations (barlow_twins)."""
    temperature: float = 0.1
    """Of the similarities (simclr)."""
    alpha: float = 2.0
    """Order of the Rényi entropy (renyi)."""
    center: bool = False
    """Subtract the batch mean of the features first."""
    grad_scale: Literal["mean", "sum"] = "mean"
    """mean: the gradient of the regulariser is that of the global batch, whatever the number of
    GPUs. sum: on W GPUs 1/W of it, as in the published M-MAE code."""


@dataclass(frozen=True)
class TwoBranchConfig:
    """Encoder, projector and views of the two-branch methods."""

    backbone: Literal["vit", "resnet18"] = "vit"
    """vit: the encoder that --model describes; resnet18: torchvision's, for images of up to 64
    pixels with a 3x3 stem and no max-pooling."""
    projector_hidden: int = 512
    """Width of the projector's two hidden layers (BatchNorm, ReLU)."""
    projector_dim: int = 128
    """Features that the loss sees."""
    jitter: float = 0.5
    """Strength of the colour jitter of 3-channel images; 0: none."""
    grey: float = 0.2
    """Share of the 3-channel images turned grey."""


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain an encoder. Default: a masked autoencoder by the published recipe, ViT-B."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    two_branch: TwoBranchConfig = field(default_factory=TwoBranchConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    out: Path = Path("runs/pretrain")
    """Run folder: config, metrics, checkpoints."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, with the configuration saved there."""
    epochs: float = 200.0
    warmup_epochs: float = 40.0
    """Linear warm-up, then cosine to zero."""
    batch_size: int = 1024
    """Images per step, of all GPUs together."""
    accumulate: int = 1
    """Parts that a GPU's share of the batch is cut into, one after the other, to save memory. The
    loss is that of the whole batch, its regulariser included."""
    base_lr: float = 1.5e-4
    """Learning rate per 256 images: lr = base_lr * batch_size / 256."""
    weight_decay: float = 0.05
    clip_grad: float | None = None
    """Largest gradient norm; none: no clipping."""
    max_skipped: int = 10
    """Steps whose gradient is not finite are skipped; so many in a row end the run."""
    ema: float | None = None
    """Decay per step of an exponential moving average of the weights, kept beside them."""
    min_crop: float = 0.2
    """Smallest share of the image's area kept by the random crop; 1: no crop."""
    hflip: bool = True
    """Mirror half of the images."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the forward pass. Losses are float32 either way."""
    compile: bool = False
    """torch.compile the network's blocks."""
    shard: bool = False
    """Split weights and optimizer state among the GPUs (FSDP2) instead of copying them (DDP)."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    seed: int = 0
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    monitor_every: int = 200
    """Steps between measurements of the information that two views of held-out images share
    (entropies, mutual information); 0: none."""
    reconstruct_every: int = 0
    """Epochs between pictures of reconstructed test images in --out; 0: none."""
    save_every: int = 1
    """Epochs between checkpoints."""
    keep: int = 2
    """How many checkpoints are kept, the newest."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into --out."""
    wandb: bool = False
    """Send the metrics to Weights & Biases too."""
    profile: bool = False
    """Trace a few steps with torch.profiler and say where their time goes."""


@dataclass(frozen=True)
class DemoConfig:
    """Pretrain MAE, U-MAE and M-MAE from the same seed, probe each, write one report."""

    out: Path = Path("runs/demo")
    data: Literal["auto", "fashion-mnist", "digits"] = "auto"
    """auto: Fashion-MNIST where it can be had, else scikit-learn's digits."""
    epochs: float | None = None
    """Passes over the images per method; none: as many as make a demo of 5 minutes on 2 cores."""
    seeds: int = 1
    """How many seeds, 0, 1, …; the table gives their mean and standard deviation."""
    resume: bool = False
    """Continue an interrupted demo."""
    cache: Path = Path("~/.cache/mmae_fast")
    """Where downloads are kept."""
    device: str = "auto"


def check(config: PretrainConfig) -> None:
    """Raise UserError, with the value received, for settings that cannot be meant."""
    positive = ("epochs", "batch_size", "accumulate", "max_skipped")
    for name in (*positive, "log_every", "save_every", "keep"):
        if not getattr(config, name) > 0:
            raise UserError(f"{name} must be > 0, got {getattr(config, name)}")
    if config.clip_grad is not None and not config.clip_grad > 0:
        raise UserError(f"clip_grad must be > 0, got {config.clip_grad}")
    if config.ema is not None and not 0 < config.ema < 1:
        raise UserError(f"ema must be in (0, 1), got {config.ema}")
    if not 0 < config.min_crop <= 1:
        raise UserError(f"min_crop must be in (0, 1], got {config.min_crop}")
    for name in ("monitor_every", "reconstruct_every"):
        if getattr(config, name) < 0:
            raise UserError(f"{name} must be >= 0, got {getattr(config, name)}")
    if not config.two_branch.jitter >= 0:
        raise UserError(f"two_branch.jitter must be >= 0, got {config.two_branch.jitter}")
    if not 0 <= config.two_branch.grey <= 1:
        raise UserError(f"two_branch.grey must be in [0, 1], got {config.two_branch.grey}")
    if METHODS[config.loss.method][0] is not None:
        return
    if config.batch_size < 2:
        raise UserError(f"two branches need batch_size >= 2, got {config.batch_size}")
    if config.accumulate > 1:
        raise UserError(
            "two branches are normalised over the whole batch (BatchNorm): accumulate must be 1, "
            f"got {config.accumulate}"
        )
    if config.shard:
        raise UserError("shard is for masked autoencoders: two branches are small enough to copy")
    if config.reconstruct_every:
        raise UserError(
            "reconstruct_every is for masked autoencoders: two branches have no decoder"
        )
    for name in ("temperature", "lambd"):
        if not getattr(config.loss, name) > 0:
            raise UserError(f"loss.{name} must be > 0, got {getattr(config.loss, name)}")


def to_dict(config: Any) -> dict[str, Any]:
    """Dataclass to a dictionary that JSON can hold."""

    def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: _plain(value) for key, value in items}

    return dataclasses.asdict(config, dict_factory=plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Inverse of ``to_dict``. Raises: UserError: unknown key, with its name."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"{cls.__name__} has no field {', '.join(unknown)}")
    return cls(**{key: _restore(hints[key], value) for key, value in values.items()})


def _restore(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if hint is Path else value
