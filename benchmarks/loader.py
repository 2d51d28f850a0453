"""``python -m benchmarks.loader``: images per second from a pack to what a model is given.

A pack of 32-pixel RGB images is written, memory-mapped, and batches of 256 are taken from it: with
crop and flip (masked autoencoder), and as two views with colour jitter. Beside it the usual way:
JPEG files, decoded and augmented one by one by torchvision in a DataLoader. Interleaved rounds;
medians and quartiles. Every batch is checked first to hold the images that it should.

    python -m benchmarks.loader              writes results/loader/MACHINE.json
    python -m benchmarks.loader --quick      few images, writes nothing: does it run?
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmae_fast.training.augment import (
    AUGMENTATION,
    Batches,
    augment,
    epoch_order,
    generator,
    normalise,
    two_views,
)
from mmae_fast.training.config import LossConfig, ModelConfig, PretrainConfig
from mmae_fast.training.data.images import ImageData
from mmae_fast.training.data.packed import open_pack, pack_source
from mmae_fast.training.data.reading import make_spec
from mmae_fast.training.data.sources import from_images

from . import measure
from .run import RESULTS, aligned

TARGET = 10_000  # images per second on two cores
SIDE = 32
BATCH = 256


def make_images(count: int) -> ImageData:
    """Smooth noise, so that JPEG files of it have a usual size."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")
    images = (smooth * 255).round().to(torch.uint8)
    return ImageData(images, torch.arange(count) % 10, tuple("0123456789"), "made")


def configuration(method: str) -> PretrainConfig:
    model = ModelConfig(patch_size=4)
    return PretrainConfig(model=model, loss=LossConfig(method=method), batch_size=BATCH)


def check(batches: Batches, images: torch.Tensor) -> None:
    """Raise unless a batch is that of the images that the order names."""
    config, step = batches.config, 1
    chosen = epoch_order(len(images), config.seed, 0)[BATCH * step :][:BATCH]
    rng = generator(torch.device("cpu"), config.seed, AUGMENTATION, step)
    if batches.two_branch:
        expected = two_views(images[chosen], batches.mean, batches.std, rng, config)[0]
    else:
        whole = normalise(images[chosen], batches.mean, batches.std)
        expected = augment(whole, rng, config.min_crop, config.hflip)
    if not torch.equal(batches(step)[0], expected):
        raise measure.WrongResult("a batch does not hold the images that it should")


def packed_rate(batches: Batches, steps: int) -> Callable[[int], float]:
    """Images per second of ``steps`` batches, from the given round on."""

    def run(turn: int) -> float:
        start = time.perf_counter()
        for step in range(turn * steps, (turn + 1) * steps):
            batches(step)
        return steps * BATCH / (time.perf_counter() - start)

    return run


def files_rate(folder: Path, images: ImageData, mean: list, std: list) -> Callable[[int], float]:
    """The same crop and flip by torchvision, an image at a time, in worker processes."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    for i, (image, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        picture.save(folder / str(label) / f"{i}.jpg", quality=75)
    steps = [
        v2.PILToTensor(),
        v2.RandomResizedCrop(SIDE, (0.2, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, std),
    ]
    data = ImageFolder(folder, v2.Compose(steps))
    workers = os.cpu_count()
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers, persistent_workers=True)

    def run(turn: int) -> float:
        start = time.perf_counter()
        seen = sum(len(batch) for batch, _ in loader)
        return seen / (time.perf_counter() - start)

    return run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=RESULTS / "loader")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    count, files, rounds = (1024, 256, 2) if options.quick else (50_000, 4096, 9)

    with tempfile.TemporaryDirectory() as scratch:
        made = make_images(count)
        source = from_images(made)
        start = time.perf_counter()
        pack = open_pack(
            pack_source(source, make_spec(source, None, None, None), Path(scratch, "p"))
        )
        packing = count / (time.perf_counter() - start)
        mean, std = pack.stats()
        channels = torch.tensor(mean), torch.tensor(std)
        runs = {}
        for name, method in (("crop and flip", "m_mae"), ("two views, colours", "simclr")):
            batches = Batches(pack.images, *channels, configuration(method))
            check(batches, made.images)
            runs[name] = packed_rate(
                batches, batches.steps_per_epoch // (1 if options.quick else 5)
            )
        few = ImageData(made.images[:files], made.labels[:files], made.classes, made.origin)
        runs["JPEG files, torchvision"] = files_rate(Path(scratch, "files"), few, mean, std)
        rates = {name: [] for name in runs}
        for run in runs.values():
            run(0)  # warm: the files in memory, the workers started
        for turn in range(rounds):
            for name, run in runs.items():
                rates[name].append(run(turn))

    results = {}
    for name, samples in rates.items():
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        results[name] = {"images_per_second": median, "q1": low, "q3": high, "samples": samples}
    environment = measure.environment("cpu")
    body = [
        [name, f"{r['images_per_second']:,.0f}", f"{r['q1']:,.0f} to {r['q3']:,.0f}"]
        for name, r in results.items()
    ]
    print(aligned(["32x32 RGB, batch 256", "images/s", "quartiles"], body))
    reached = results["crop and flip"]["images_per_second"] >= TARGET
    cores = f"{environment['cores']} cores, {environment['threads']} threads of torch"
    print(f"{'Reached' if reached else 'Missed'}: {TARGET:,} images/s ({cores})")
    if not options.quick:
        content = {
            "environment": environment,
            "images": count,
            "side": SIDE,
            "batch": BATCH,
            "target_images_per_second": TARGET,
            "packing_images_per_second": packing,
            "results": results,
        }
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{measure.device_slug(environment)}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
