"""Typed configurations of what is done with a pretrained encoder.

Knows the standard library only, so that ``mmae --help`` answers without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmae_fast.training.config import UserError

MAGNITUDES = 30  # of torchvision's RandAugment


@dataclass(frozen=True)
class PublishedConfig:
    """What a .pth published with MAE, U-MAE or M-MAE may not say of itself."""

    norm_pix: bool | None = None
    """Whether it predicts normalised pixels. None: as the file says, where it says it."""
    num_heads: int | None = None
    """Attention heads. None: those of ViT-T, S, B, L and H, by width."""
    decoder_num_heads: int | None = None
    """Of the decoder. None: 16 for the published width, 512."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate the frozen encoder on labelled, unmasked images."""

    checkpoint: Path
    """Run folder, checkpoint folder, model.safetensors, or a published .pth."""
    train: str | None = None
    """Images with labels to learn from, as in pretrain --data.train. Default: those of the run."""
    test: str | None = None
    """Images to score on. Default: the test part of the training images."""
    img_size: int | tuple[int, int] | None = None
    """As in pretrain --data.img-size. Default: that of the model."""
    pool: Literal["cls", "mean"] = "cls"
    """Features: the class token, or the mean of the patch tokens."""
    max_train: int | None = None
    """Use only the first so many training images."""
    published: PublishedConfig = field(default_factory=PublishedConfig)
    device: str = "auto"


@dataclass(frozen=True)
class ProbeConfig(EvalConfig):
    """Linear probe of the frozen encoder."""

    protocol: Literal["lbfgs", "lars"] = "lbfgs"
    """lbfgs: logistic regression, converged, on whole images, for sets of any size; lars: the
    published recipe, made for a million images, to which the options below belong."""
    augment: bool = False
    """Random crops and mirror images anew in every epoch, as published; else the features of whole
    images, computed once."""
    epochs: int = 90
    warmup_epochs: int = 10
    batch_size: int = 16384
    """At most the whole training set."""
    base_lr: float | None = None
    """Per 256 images. None: 0.05 for M-MAE, 0.1 for all others, as published."""
    seed: int = 0


@dataclass(frozen=True)
class FinetuneConfig:
    """Train encoder and classifier on labelled images. Default: the published recipe, ViT-B."""

    checkpoint: Path
    """What to start from: run folder, checkpoint folder, model.safetensors, or a published .pth."""
    train: str | None = None
    """Images with labels to learn from, as in pretrain --data.train. Default: those of the run."""
    test: str | None = None
    """Images to score on. Default: the test part of the training images."""
    img_size: int | tuple[int, int] | None = None
    """As in pretrain --data.img-size. Default: that of the model."""
    out: Path = Path("runs/finetune")
    """Run folder: config, metrics, checkpoints."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, with the configuration saved there."""
    pool: Literal["cls", "mean"] = "mean"
    """Classify the class token, or the mean of the patch tokens with a norm of its own."""
    epochs: int = 100
    warmup_epochs: int = 5
    """Linear warm-up, then cosine to 1e-6."""
    batch_size: int = 1024
    base_lr: float = 5e-4
    """Learning rate per 256 images, of the head; lr = base_lr * batch_size / 256."""
    layer_decay: float = 0.65
    """Factor of the learning rate from each layer to the one below it."""
    weight_decay: float = 0.05
    clip_grad: float | None = None
    """Largest gradient norm; none: no clipping."""
    drop_path: float = 0.1
    """Stochastic depth: rate of the last block, rising linearly from 0."""
    mixup: float = 0.8
    """Parameter of the beta distribution; 0: no mixup."""
    cutmix: float = 1.0
    """Same of cutmix; where both are on, each batch gets one of them."""
    rand_augment: int = 9
    """Magnitude of torchvision's RandAugment, two operations an image, on the host; 0: none."""
    smoothing: float = 0.1
    """Label smoothing."""
    erasing: float = 0.25
    """Share of the images with a random rectangle of noise."""
    min_crop: float = 0.08
    """Smallest share of the image's area kept by the random crop; 1: no crop."""
    hflip: bool = True
    """Mirror half of the images."""
    ema: float | None = None
    """Decay of an average of the weights, which is then scored and saved; none: no average."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the forward pass."""
    seed: int = 0
    save_every: int = 1
    """Epochs between checkpoints."""
    keep: int = 1
    """How many of the newest checkpoints are kept."""
    published: PublishedConfig = field(default_factory=PublishedConfig)
    device: str = "auto"


@dataclass(frozen=True)
class ExportConfig:
    """Write the weights for timm (encoder) or Hugging Face's ViTMAE (encoder and decoder)."""

    checkpoint: Path
    """Run folder, checkpoint folder, model.safetensors, or a published .pth."""
    out: Path
    """Folder for model.safetensors and config.json."""
    format: Literal["timm", "hf"] = "timm"
    published: PublishedConfig = field(default_factory=PublishedConfig)


@dataclass(frozen=True)
class ReportConfig:
    """Compare runs on one page: curves, spectra, reconstructions, table."""

    runs: tuple[Path, ...]
    """Run folders. Same settings but for the seed: shown as mean and standard deviation."""
    out: Path = Path("runs/report")
    """Folder of report.html and its figures."""
    evaluate: bool = False
    """Probe each run, draw spectra and reconstructions. Default: only what is there already."""
    device: str = "auto"


@dataclass(frozen=True)
class VisualizeConfig:
    """Draw test images, masked and reconstructed."""

    checkpoint: Path
    """Run folder, checkpoint folder, model.safetensors, or a published .pth."""
    out: Path = Path("reconstructions.png")
    train: str | None = None
    """As in probe; drawn are its test images, where there are any."""
    test: str | None = None
    img_size: int | tuple[int, int] | None = None
    count: int = 10
    """How many images."""
    seed: int = 0
    """Of the masks."""
    published: PublishedConfig = field(default_factory=PublishedConfig)
    device: str = "auto"


@dataclass(frozen=True)
class AnalyzeConfig:
    """Matrix entropies of a representation, layer by layer, or of a training over time."""

    sources: tuple[str, ...]
    """Run folders, checkpoints, published .pth files, names of timm models, or files of features
    (.npy, .npz, .pt). Run folders without --data: curves of their training."""
    data: str | None = None
    """Images to look at, as in pretrain --data.train; their test part where there is one."""
    img_size: int | None = None
    """Side in pixels of the images of a folder. Default: that of the model."""
    count: int = 256
    """How many images, or rows of a file of features."""
    weights: Path | None = None
    """Local weights of a timm model (.safetensors, .pth)."""
    pretrained: bool = False
    """Download the published weights of a timm model. Default: random weights."""
    center: bool = False
    """Subtract the mean row of the normalised features first."""
    out: Path = Path("runs/analysis")
    """Folder of analysis.json and the figures."""
    cache: Path = Path("~/.cache/mmae_fast")
    """Where downloads are kept."""
    seed: int = 0
    """Of the two views."""
    published: PublishedConfig = field(default_factory=PublishedConfig)
    device: str = "auto"


# Published recipes of fine-tuning, and one for small images on a CPU. The checkpoint is the user's.
_NONE = Path()
FINETUNE_RECIPES: dict[str, tuple[str, FinetuneConfig]] = {
    "vit-b": ("published recipe, ViT-B, in bf16 for fp16", FinetuneConfig(_NONE, precision="bf16")),
    "vit-l": (
        "published recipe, ViT-L, in bf16 for fp16",
        FinetuneConfig(
            _NONE, epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2, precision="bf16"
        ),
    ),
    "tiny": (
        "for 8-32 pixel images on a CPU",
        FinetuneConfig(
            _NONE,
            epochs=30,
            warmup_epochs=2,
            batch_size=64,
            base_lr=8e-3,
            layer_decay=0.9,
            drop_path=0.0,
            mixup=0.0,
            cutmix=0.0,
            rand_augment=0,
            erasing=0.0,
            min_crop=0.8,
            hflip=False,
        ),
    ),
}


def check_finetuning(config: FinetuneConfig) -> None:
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
