"""Images masked and reconstructed: their pixels, and a picture of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmae_fast.training.augment import MASK, generator, normalise
from mmae_fast.training.models import MaskedAutoencoder

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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


def save_reconstructions(
    path: Path, original: Tensor, masked: Tensor, restored: dict[str, Tensor], mask_ratio: float
) -> None:
    """One row of originals, one of masked images, one per model; pixels in [0, 1], NaN hidden."""
    from matplotlib.figure import Figure  # loaded when there is something to draw

    rows = {"original": original, f"masked {mask_ratio:.0%}": masked, **restored}
    count = len(original)
    figure = Figure(figsize=(1.3 + 0.82 * count, 0.12 + 0.86 * len(rows)), dpi=160)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            _show(axis, image)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
    figure.subplots_adjust(0.16, 0.01, 0.995, 0.99, 0.06, 0.06)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def _show(axis: Axes, image: Tensor) -> None:
    axis.set(xticks=[], yticks=[], facecolor="#cfd6de")  # what NaN, a hidden patch, looks like
    for spine in axis.spines.values():
        spine.set_visible(False)
    if len(image) < 3:
        axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
    else:  # matplotlib draws a hidden pixel of a colour image only through transparency
        alpha = (~image[0].isnan()).float().numpy()
        axis.imshow(image[:3].nan_to_num().permute(1, 2, 0).numpy(), alpha=alpha)
