"""Order, augmentation and normalisation of batches, on the device and reproducible.

Nothing here keeps a random state: every draw is a function of the seed and of where training
stands (epoch, step). A resumed run therefore sees what the uninterrupted one would have seen.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmae_fast.training.config import METHODS, PretrainConfig

# What a key of ``generator`` draws: streams that must not share their numbers.
ORDER, AUGMENTATION, MASK, VIEWS, GLOBAL = range(5)

# A batch of large images is read by several threads, since a disk answers several at once.
COLLECTORS, PART_BYTES = 8, 2 << 20

# RGB to luminance and two axes of chroma (NTSC's YIQ), where a hue is an angle.
YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
JITTERED = 0.8  # share of the images whose colours are jittered, as in SimCLR


class Batches:
    """What a model is given at a step: ``model(*batches(step))``.

    Images and the noise of their masks for a masked autoencoder, two views for two branches.
    Threads collect the images of the next step meanwhile, from memory or from a mapped file.

    With ``world`` processes each has its part of every batch, the ``rank``-th of equal, consecutive
    parts: together they have what a single process would have, bit for bit on a CPU (on a GPU up to
    rounding: its libraries may sum in another order for another batch size).

    Args:
        images: all of them, uint8, shape ``(N, C, H, W)``; copied if not contiguous.
        mean, std: of each channel, shape ``(C,)``, on the device to train on.
        config: what to do; its ``batch_size`` is that of all processes together.
        rank, world: which part of how many.
        size: height and width of the crops. Default: those of the images.
    Attributes:
        wait_seconds: time that calls have taken so far, while the training loop stood still. On a
            GPU they only start the augmentation, on a CPU they also do it.
    Raises: ValueError: a batch size that ``world`` does not divide.
    """

    def __init__(
        self,
        images: Tensor,
        mean: Tensor,
        std: Tensor,
        config: PretrainConfig,
        rank: int = 0,
        world: int = 1,
        size: tuple[int, int] | None = None,
    ) -> None:
        if config.batch_size % world:
            raise ValueError(f"batch_size {config.batch_size} is not a multiple of {world} parts")
        self.images, self.mean, self.std, self.config = images.contiguous(), mean, std, config
        self.shard = rank, world
        self.size = tuple(size or images.shape[2:])
        self.two_branch = METHODS[config.loss.method][0] is None
        self.patches = self.size[0] * self.size[1] // config.model.patch_size**2
        self.steps_per_epoch = len(images) // config.batch_size  # an incomplete batch is left out
        self.wait_seconds = 0.0
        self._began: tuple[float, float] | None = None
        self._read: dict[str, tuple[float, float]] = {}
        self._epoch, self._order = -1, torch.empty(0)
        self._threads = ThreadPoolExecutor(COLLECTORS, "batches")
        self._next: tuple[int, Tensor, list[Future]] | None = None

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Normalised, augmented images ``(B, C, H, W)`` and uniform noise ``(B, patches)``; or two
        views ``(B, C, H, W)``. B is the batch size divided by ``world``."""
        start = time.perf_counter()
        self._began = self._began or (start, self.wait_seconds)
        config, device, shard = self.config, self.mean.device, self.shard
        imgs = self._collected(step).to(device, non_blocking=True)
        rng = generator(device, config.seed, AUGMENTATION, step)
        if self.two_branch:
            batch = two_views(imgs, self.mean, self.std, rng, config, self.size, shard)
        else:
            imgs = normalise(imgs, self.mean, self.std)
            imgs = augment(imgs, rng, config.min_crop, config.hflip, self.size, shard)
            rng = generator(device, config.seed, MASK, step)
            batch = imgs, _uniform(rng, shard, len(imgs), self.patches)
        self.wait_seconds += time.perf_counter() - start
        return batch

    def wait_share(self, reader: str = "") -> float:
        """Share of the time that calls took, since ``reader`` last asked or else the first batch.
        Equivalent to ``wait_seconds`` over the time by the clock, both since then."""
        if self._began is None:
            return 0.0
        start, waited = self._read.get(reader, self._began)
        now = time.perf_counter()
        self._read[reader] = now, self.wait_seconds
        return (self.wait_seconds - waited) / (now - start)

    def _collected(self, step: int) -> Tensor:
        if self.images.is_cuda:
            return self.images[self._chosen(step).to(self.images.device)]
        if self._next is None or self._next[0] != step:
            self._start_collecting(step)
        _, images, parts = self._next
        for part in parts:
            part.result()
        self._start_collecting(step + 1)
        return images

    def _start_collecting(self, step: int) -> None:
        chosen = self._chosen(step)
        # Pinned, so that the copy to the GPU runs beside the step; here and not in the threads,
        # whose current GPU is another.
        shape, pinned = (len(chosen), *self.images.shape[1:]), self.mean.is_cuda
        out = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        parts = min(COLLECTORS, 1 + out.numel() // PART_BYTES)
        pairs = zip(chosen.chunk(parts), out.chunk(parts), strict=True)
        self._next = step, out, [self._threads.submit(self._collect, *pair) for pair in pairs]

    def _chosen(self, step: int) -> Tensor:
        """Indices of this process's images of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = epoch_order(len(self.images), self.config.seed, epoch)
        rank, world = self.shard
        part = self.config.batch_size // world
        return self._order[position * self.config.batch_size + rank * part :][:part]

    def _collect(self, chosen: Tensor, out: Tensor) -> None:
        # By NumPy, whose copy stays in this thread; torch's would start more threads from it.
        # "clip" because "raise" copies once more; the indices are a permutation's.
        np.take(self.images.numpy(), chosen.numpy(), axis=0, out=out.numpy(), mode="clip")


def generator(device: torch.device, *key: int) -> torch.Generator:
    """Random generator that is a function of its key, well mixed even for neighbouring keys."""
    return torch.Generator(device).manual_seed(stream(*key))


def stream(*key: int) -> int:
    """Seed of a key."""
    # 53 bits: what every device's generator takes as a seed. CPU generators use the lower 32.
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 11


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Order of the images in an epoch, shape ``(count,)``, on the CPU."""
    return torch.randperm(count, generator=generator(torch.device("cpu"), seed, ORDER, epoch))


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 ``(B, C, H, W)`` to float32 with channel means 0 and standard deviations 1."""
    return (images.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def _uniform(rng: torch.Generator, shard: tuple[int, int], *shape: int, dim: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) for this process's images, which ``shape`` counts along ``dim``: a
    part of those for the whole batch, drawn by every process."""
    rank, world = shard
    part = shape[dim]
    whole = [size * world if i == dim else size for i, size in enumerate(shape)]
    draw = torch.rand(whole, generator=rng, device=rng.device)
    return draw.narrow(dim, rank * part, part)


def two_views(
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    rng: torch.Generator,
    config: PretrainConfig,
    size: tuple[int, int] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> tuple[Tensor, Tensor]:
    """Two views of each image: crop, flip and, for 3 channels, colour; normalised.

    Args:
        images: uint8 ``(B, C, H, W)``, on the device of ``mean``, ``std`` and ``rng``.
        config: its ``min_crop``, ``hflip``, ``two_branch.jitter`` and ``two_branch.grey``.
        size, shard: as in ``augment``.
    Returns: twice ``(B, C, *size)``, float32.
    """

    def view() -> Tensor:
        pixels = augment(images.float() / 255, rng, config.min_crop, config.hflip, size, shard)
        if pixels.shape[1] == 3:
            strength, grey = config.two_branch.jitter, config.two_branch.grey
            pixels = jitter_colours(pixels, rng, strength, grey, shard)
        return (pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)

    return view(), view()


def jitter_colours(
    pixels: Tensor,
    rng: torch.Generator,
    strength: float,
    grey: float,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """Random brightness, contrast, saturation and hue, and grey images, of a whole batch.

    Ranges as in SimCLR: factors in 1 ± 0.8 s, hue in ± 0.2 s of a turn. All five are linear in the
    colours, so that each image gets one 3x3 matrix and one offset; hue is turned in the YIQ plane,
    the order is fixed, and pixels are clamped once, at the end.

    Args:
        pixels: RGB in [0, 1], shape ``(B, 3, H, W)``.
        strength: s, >= 0. A share ``JITTERED`` of the images is jittered.
        grey: share of the images that lose their colours.
        shard: as in ``augment``.
    Returns: same shape, in [0, 1].
    """
    batch, device = len(pixels), pixels.device
    draw = 2 * _uniform(rng, shard, 4, batch, dim=1) - 1
    jittered, decoloured = _uniform(rng, shard, 2, batch, dim=1)
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
    images: Tensor,
    rng: torch.Generator,
    min_crop: float = 0.2,
    hflip: bool = True,
    size: tuple[int, int] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """Random resized crop and horizontal flip of a whole batch by one bilinear resampling.

    The crop has torchvision's distribution: area uniform in [min_crop, 1] of the image's, aspect
    ratio log-uniform in [3/4, 4/3], the first of ten draws that fits. Resampling has no low-pass
    filter: ``size`` should be no less than the images' by more than a quarter.

    Args:
        images: shape ``(B, C, H, W)``, float.
        rng: on the device of the images.
        min_crop: 1 leaves the crop out; of images larger than ``size`` it then is of that size.
        size: height and width of the result. Default: those of the images.
        shard: (rank, world): the images are the ``rank``-th of ``world`` equal parts of a batch,
            and are changed as they would be in the whole batch.
    Returns: shape ``(B, C, *size)``.
    """
    batch, channels, height, width = images.shape
    out_height, out_width = size or (height, width)
    if min_crop >= 1 and not hflip and (out_height, out_width) == (height, width):
        return images

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * _uniform(rng, shard, *shape)

    # Half sides of the crop as a share of the image's: grid_sample's coordinates span [-1, 1].
    half_w = torch.full((batch,), out_width / width, device=images.device)
    half_h = torch.full((batch,), out_height / height, device=images.device)
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
    grid = F.affine_grid(theta, [batch, channels, out_height, out_width], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
