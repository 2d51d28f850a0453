"""The image set that training and evaluation see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmae_fast.training.config import UserError


class Unavailable(UserError):
    """The data set cannot be had here; another one may."""


@dataclass(frozen=True)
class ImageData:
    """Images in memory, or in a memory-mapped file that the system reads as they are used."""

    images: Tensor  # (N, C, H, W), uint8
    labels: Tensor | None  # (N,), int64; none for images without classes
    classes: tuple[str, ...]
    origin: str  # where they came from and how they were checked, for people
    uncropped: Tensor | None = None  # (N, C, > H, > W): of these, ``images`` are the centres
    histogram: Tensor | None = None  # (C, 256) of a pack's images: spares reading them for stats()
    skipped: tuple[tuple[str, str], ...] = ()  # files that could not be decoded, and why

    def __post_init__(self) -> None:
        for name in ("labels", "uncropped"):
            part = getattr(self, name)
            if part is not None and len(part) != len(self.images):
                raise ValueError(f"{len(part)} {name} for {len(self.images)} images")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of what a model is given."""
        return tuple(self.images.shape[2:])

    @property
    def in_chans(self) -> int:
        return self.images.shape[1]

    @property
    def crop_source(self) -> Tensor:
        """What random crops are taken from."""
        return self.images if self.uncropped is None else self.uncropped

    def stats(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, for pixels in [0, 1]."""
        counts = self.histogram
        if counts is None or int(counts.sum()) != self.crop_source.numel():  # of other images
            counts = histogram(self.crop_source)
        # Exact, in one pass and without a float copy of the images.
        levels = torch.arange(256, dtype=torch.float64) / 255
        mean, std = [], []
        for share in counts.double() / counts.sum(1, keepdim=True):
            mean.append(float(share @ levels))
            std.append(max(float((share @ levels**2 - mean[-1] ** 2).clamp(min=0).sqrt()), 1 / 255))
        return mean, std


def histogram(images: Tensor) -> Tensor:
    """How often each channel of ``(N, C, H, W)`` has each of 256 levels: ``(C, 256)``, int64."""
    return torch.stack([torch.bincount(c.flatten(), minlength=256).cpu() for c in images.unbind(1)])


def shape_text(images: Tensor) -> str:
    """Size and channels, for messages."""
    channels, height, width = images.shape[1:]
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"


def save_skipped(folder: Path, *parts: ImageData | None) -> None:
    """Write ``skipped.txt`` (file, tab, reason; one a line) where images were skipped."""
    lines = [f"{name}\t{reason}\n" for part in parts if part for name, reason in part.skipped]
    if lines:
        (folder / "skipped.txt").write_text("".join(lines))
