"""Sources to images in memory: decoding in threads, what is skipped, what does not fit."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmae_fast.training.config import UserError
from mmae_fast.training.data.decode import (
    Decoded,
    Spec,
    Undecodable,
    decode,
    natural,
    open_image,
    reason,
)
from mmae_fast.training.data.images import ImageData
from mmae_fast.training.data.sources import Sample, Source


def make_spec(
    source: Source,
    img_size: int | tuple[int, int] | None,
    in_chans: int | None,
    value_range: tuple[float, float] | None,
) -> Spec:
    """What to make of the images; what is not given is as in the first that can be decoded."""
    if value_range is not None and not value_range[0] < value_range[1]:
        raise UserError(f"the range of values must be low < high, got {value_range}")
    if in_chans is not None and in_chans < 1:
        raise UserError(f"in_chans must be positive, got {in_chans}")
    size, channels = img_size, in_chans or source.in_chans
    if isinstance(size, int):
        size = (size, size)
    if size is not None and min(size) < 1:
        raise UserError(f"img_size must be positive, got {img_size}")
    if size is None or channels is None:
        found = _first(source)
        size, channels = size or found[0], channels or found[1]
    return Spec(size, channels, img_size is not None, value_range)


def _first(source: Source) -> tuple[tuple[int, int], int]:
    """Size and channels of the first image that is not damaged."""
    failed = ""
    for sample in source.samples:
        try:
            if isinstance(sample.data, Undecodable):
                raise sample.data
            return natural(open_image(sample.data))
        except UserError as error:
            raise UserError(f"{sample.name} ({source.origin}) {error}") from error
        except Exception as error:  # decoders raise anything on damaged files
            failed = failed or f"{sample.name}: {reason(error)}"
    raise UserError(f"no image of {source.origin} can be decoded, e.g. {failed}")


def decode_all(
    source: Source, spec: Spec, start: int = 0
) -> Iterator[tuple[Sample, Decoded | Undecodable]]:
    """Samples in their order from ``start``, decoded in threads, few ahead of the consumer.

    Raises: UserError: a file that cannot be read, an image that needs another setting; named.
    """

    def work(sample: Sample) -> Decoded | Undecodable:
        try:
            if isinstance(sample.data, Undecodable):
                return sample.data
            return decode(sample.data, spec)
        except Undecodable as error:
            return error
        except UserError as error:
            raise UserError(f"{sample.name} ({source.origin}) {error}") from error

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        yield from ordered_map(work, _from(source.samples, start), pool, 8 * workers)


def _from(samples: Sequence[Sample], start: int) -> Iterator[Sample]:
    return (samples[i] for i in range(start, len(samples)))


def ordered_map(
    work: Callable, items: Iterable, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[Any, Any]]:
    """``(item, work(item))`` in the order of the items, with at most ``ahead`` unconsumed."""
    waiting: deque[tuple[Any, Future]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) >= ahead:
                item, future = waiting.popleft()
                yield item, future.result()
        while waiting:
            item, future = waiting.popleft()
            yield item, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


class Tally:
    """What went wrong, whether there are labels, and what range the values had."""

    def __init__(self, source: Source, spec: Spec, strict: bool) -> None:
        self.source, self.spec, self.strict = source, spec, strict
        self.skipped: list[tuple[str, str]] = []
        self.labelled: bool | None = None  # none: no image yet
        self.low, self.high = float("inf"), float("-inf")

    def add(self, sample: Sample, result: Decoded | Undecodable) -> bool:
        """Whether there is an image.

        Raises: UserError: there is none, and ``strict``; a label that does not fit.
        """
        if isinstance(result, Undecodable):
            if self.strict:
                raise UserError(
                    f"{sample.name} cannot be decoded: {result} ({self.source.origin}; without "
                    "strict it would be skipped)"
                )
            self.skipped.append((sample.name, str(result)))
            return False
        labelled = sample.label >= 0
        if self.labelled not in (None, labelled):
            has, others = ("a", "no") if labelled else ("no", "a")
            raise UserError(
                f"{sample.name} ({self.source.origin}) has {has} label, those before it {others}"
            )
        if sample.label >= len(self.source.classes):
            raise UserError(
                f"{sample.name} ({self.source.origin}) has label {sample.label}, there are "
                f"{len(self.source.classes)} classes"
            )
        self.labelled = labelled
        self.low, self.high = min(self.low, result.low), max(self.high, result.high)
        return True

    def require_images(self) -> None:
        """Raise UserError if there was no image."""
        if self.labelled is None:
            raise UserError(
                f"no image of {self.source.origin} can be decoded, e.g. "
                f"{': '.join(self.skipped[0]) if self.skipped else 'there is none'}"
            )

    def report(self) -> None:
        """Say it on the screen, once where there are several processes."""
        if os.environ.get("RANK", "0") != "0":
            return
        if self.skipped:
            name, why = self.skipped[0]
            count = f"{len(self.skipped)} of {len(self.source.samples)}"
            print(f"Skipped {count} images of {self.source.origin}, e.g. {name}: {why}", flush=True)
        if self.low <= self.high:
            print(
                f"Images of more than 8 bits have values {self.low:g} to {self.high:g}", flush=True
            )


def read_images(source: Source, spec: Spec, strict: bool) -> ImageData:
    """Decode all samples into memory.

    Raises: UserError: too little memory, no image left, an image that needs another setting.
    """
    _check_memory(source, spec)
    images = np.empty((len(source.samples), spec.channels, *spec.size), np.uint8)
    labels: list[int] = []
    tally = Tally(source, spec, strict)
    for sample, result in decode_all(source, spec):
        if tally.add(sample, result):
            images[len(labels)] = result.pixels
            labels.append(sample.label)
    tally.require_images()
    tally.report()
    return ImageData(
        torch.from_numpy(images[: len(labels)]),
        torch.tensor(labels) if tally.labelled else None,
        source.classes,
        f"{source.origin} ({len(labels):,} images)",
        skipped=tuple(tally.skipped),
    )


def _check_memory(source: Source, spec: Spec) -> None:
    needed = len(source.samples) * spec.channels * spec.size[0] * spec.size[1]
    free = free_memory()
    # Every process of torchrun decodes for itself.
    together = needed * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if free is not None and together > 0.8 * free:
        raise UserError(
            f"{len(source.samples):,} images of {spec.size[0]}x{spec.size[1]} need "
            f"{together / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of memory are free; pack them "
            f"once and train from the pack: mmae data pack {source.origin} DIR --img-size "
            f"{' '.join(map(str, spec.size))}"
        )


def free_memory() -> int | None:
    """Bytes that programs can still take, where the system says so (Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
        return int(kib) * 1024
    except (OSError, StopIteration):
        return None
