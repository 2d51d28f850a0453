"""Order, augmentation and normalisation of batches, on the device and reproducible.

Nothing here keeps a random state: every draw is a function of the seed and of where training
stands (epoch, step). A resumed run therefore sees what the uninterrupted one would have seen.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmae_fast.config import METHODS, PretrainConfig

# What a key of ``generator`` draws: streams that must not share their numbers.
ORDER, AUGMENTATION, MASK, VIEWS = range(4)

# RGB to luminance and two axes of chroma (NTSC's YIQ), where a hue is an angle.
YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
JITTERED = 0.8  # share of the images whose colours are jittered, as in SimCLR


class Batches:
    """What a model is given at a step: ``model(*batches(step))``.

    Images and the noise of their masks for a masked autoencoder, two views for two branches.

    Args:
        images: all of them, uint8, shape ``(N, C, H, W)``.
        mean, std: of each channel, shape ``(C,)``, on the device to train on.
        rank, world: which part of the batch, of how many equal ones.
    """

    def __init__(
        self,
        images: Tensor,
        mean: Tensor,
        std: Tensor,
        config: PretrainConfig,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.rank, self.world = rank, world
        self.images, self.mean, self.std, self.config = images, mean, std, config
        self.two_branch = METHODS[config.loss.method][0] is None
        self.patches = images[0, 0].numel() // config.model.patch_size**2
        self.steps_per_epoch = len(images) // config.batch_size  # an incomplete batch is left out
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Normalised, augmented images ``(B, C, H, W)`` and uniform noise ``(B, patches)``; or two
        views ``(B, C, H, W)``."""
        first, second = self._whole(step)
        return first.chunk(self.world)[self.rank], second.chunk(self.world)[self.rank]

    def _whole(self, step: int) -> tuple[Tensor, Tensor]:
        config, device = self.config, self.mean.device
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self.images), config.seed, epoch)
        chosen = self._order[position * config.batch_size :][: config.batch_size]
        imgs = self.images[chosen].to(device)
        rng = generator(device, config.seed, AUGMENTATION, step)
        if self.two_branch:
            return two_views(imgs, self.mean, self.std, rng, config)
        imgs = normalise(imgs, self.mean, self.std)
        imgs = augment(imgs, rng, config.min_crop, config.hflip)
        rng = generator(device, config.seed, MASK, step)
        return imgs, torch.rand(len(imgs), self.patches, generator=rng, device=device)


def generator(device: torch.device, *key: int) -> torch.Generator:
    """Random generator that is a function of its key, well mixed even for neighbouring keys."""
    # 53 bits: what every device's generator takes as a seed. CPU generators use the lower 32.
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 11
    return torch.Generator(device).manual_seed(state)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Order of the images in an epoch, shape ``(count,)``, on the CPU."""
    return torch.randperm(count, generator=generator(torch.device("cpu"), seed, ORDER, epoch))


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 ``(B, C, H, W)`` to float32 with channel means 0 and standard deviations 1."""
    return (images.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def two_views(
    images: Tensor, mean: Tensor, std: Tensor, rng: torch.Generator, config: PretrainConfig
) -> tuple[Tensor, Tensor]:
    """Two views of each image: crop, flip and, for 3 channels, colour; normalised.

    Args:
        images: uint8 ``(B, C, H, W)``, on the device of ``mean``, ``std`` and ``rng``.
        config: its ``min_crop``, ``hflip``, ``two_branch.jitter`` and ``two_branch.grey``.
    Returns: twice ``(B, C, H, W)``, float32.
    """

    def view() -> Tensor:
        pixels = augment(images.float() / 255, rng, config.min_crop, config.hflip)
        if pixels.shape[1] == 3:
            pixels = jitter_colours(pixels, rng, config.two_branch.jitter, config.two_branch.grey)
        return (pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)

    return view(), view()


def jitter_colours(pixels: Tensor, rng: torch.Generator, strength: float, grey: float) -> Tensor:
    """Random brightness, contrast, saturation and hue, and grey images, of a whole batch.

    Ranges as in SimCLR: factors in 1 ± 0.8 s, hue in ± 0.2 s of a turn. All five are linear in the
    colours, so that each image gets one 3x3 matrix and one offset; hue is turned in the YIQ plane,
    the order is fixed, and pixels are clamped once, at the end.

    Args:
        pixels: RGB in [0, 1], shape ``(B, 3, H, W)``.
        strength: s, >= 0. A share ``JITTERED`` of the images is jittered.
        grey: share of the images that lose their colours.
    Returns: same shape, in [0, 1].
    """
    batch, device = len(pixels), pixels.device
    draw = 2 * torch.rand(4, batch, generator=rng, device=device) - 1
    jittered, decoloured = torch.rand(2, batch, generator=rng, device=device)
    draw = draw * strength * (jittered < JITTERED)
    brightness, contrast, saturation = (1 + 0.8 * draw[:3]).clamp(min=0)
    angle = 2 * torch.pi * 0.2 * draw[3]
    saturation = torch.where(decoloured < grey, 0.0, saturation)

    # Brightness and contrast scale all axes, saturation the two of chroma, hue turns them.
    turned = torch.zeros(batch, 3, 3, device=device)
    turned[:, 0, 0] = 1
    turned[:, 1, 1] = turned[:, 2, 2] = saturation * angle.cos()
    turned[:, 2, 1] = saturation * angle.sin()
    turned[:, 1, 2] = -turned[:, 2, 1]
    yiq = torch.tensor(YIQ, device=device)
    matrix = (brightness * contrast).view(-1, 1, 1) * (torch.linalg.inv(yiq) @ turned @ yiq)
    luminance = torch.einsum("c,bchw->b", yiq[0], pixels) / pixels[0, 0].numel()
    offset = (brightness * (1 - contrast) * luminance).view(-1, 1, 1)
    return (matrix @ pixels.flatten(2) + offset).view_as(pixels).clamp(0, 1)


def augment(
    images: Tensor, rng: torch.Generator, min_crop: float = 0.2, hflip: bool = True
) -> Tensor:
    """Random resized crop and horizontal flip of a whole batch by one bilinear resampling.

    The crop has torchvision's distribution: area uniform in [min_crop, 1] of the image's, aspect
    ratio log-uniform in [3/4, 4/3], the first of ten draws that fits. A crop is never larger than
    the image, so that resampling magnifies and needs no low-pass filter.

    Args:
        images: shape ``(B, C, H, W)``, float.
        rng: on the device of the images.
        min_crop: 1 leaves the crop out.
    Returns: same shape.
    """
    if min_crop >= 1 and not hflip:
        return images
    batch, _, height, width = images.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        draw = torch.rand(*shape, generator=rng, device=images.device)
        return low + (high - low) * draw

    # Half sides of the crop as a share of the image's: grid_sample's coordinates span [-1, 1].
    half_w = half_h = torch.ones(batch, device=images.device)
    if min_crop < 1:
        area = uniform(min_crop, 1.0, batch, 10)
        ratio = uniform(float(np.log(3 / 4)), float(np.log(4 / 3)), batch, 10).exp()
        half_w = (area * ratio * (height / width)).sqrt()
        half_h = (area / ratio * (width / height)).sqrt()
        fits = (half_w <= 1) & (half_h <= 1)
        first = fits.int().argmax(dim=1, keepdim=True)
        half_w = half_w.gather(1, first).squeeze(1).clamp(max=1)
        half_h = half_h.gather(1, first).squeeze(1).clamp(max=1)
    centre_x = uniform(-1.0, 1.0, batch) * (1 - half_w)
    centre_y = uniform(-1.0, 1.0, batch) * (1 - half_h)
    if hflip:
        half_w = torch.where(uniform(0.0, 1.0, batch) < 0.5, -half_w, half_w)
    zero = torch.zeros_like(half_w)
    theta = torch.stack([half_w, zero, centre_x, zero, half_h, centre_y], dim=1).view(batch, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
