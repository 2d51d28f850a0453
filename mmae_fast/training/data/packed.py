"""Packs: images decoded once into one memory-mapped file, with checksums.

    images.u8       (count, C, H, W), uint8
    labels.i64      (count,), int64; where there are classes
    skipped.txt     images that could not be decoded: name, tab, reason
    manifest.json   shape, count, classes, histogram, origin, SHA-256 of all of this

A pack is written to ``NAME.partial``, a block at a time, and renamed when it is complete. An
interrupted one goes on behind its last complete block.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from mmae_fast.training.config import PackConfig, UserError
from mmae_fast.training.data.builtin import BUILT_IN
from mmae_fast.training.data.decode import Spec
from mmae_fast.training.data.images import ImageData, histogram
from mmae_fast.training.data.reading import Tally, decode_all, make_spec
from mmae_fast.training.data.sources import Source, from_images, open_source, part_of
from mmae_fast.training.progress import Board

FORMAT = "mmae_fast pack 1"
BLOCK_BYTES = 64 << 20  # of images: what is checksummed, and lost by an interruption, at once
VERIFY_BYTES = 1 << 30  # packs up to this size are verified whole whenever they are opened
IMAGES, LABELS, SKIPPED, MANIFEST = "images.u8", "labels.i64", "skipped.txt", "manifest.json"
PROGRESS = "progress.json"


def is_pack(path: Path) -> bool:
    return (path / MANIFEST).is_file()


# --- Writing -------------------------------------------------------------------------------------


@dataclass
class _Progress:
    """What an interrupted pack goes on from."""

    key: str  # of options and samples: with others the pack would be a mixture
    read: int = 0
    count: int = 0
    blocks: list[str] = field(default_factory=list)
    histogram: list[list[int]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    low: float = float("inf")
    high: float = float("-inf")


def write_pack(config: PackConfig) -> Path:
    """Decode what the configuration names into a pack, see ``pack_source``."""
    path = part_of(Path(config.source).expanduser(), config.split)
    if is_pack(path):
        raise UserError(f"{path} is a pack already; pack what it was made from")
    if config.source in BUILT_IN:
        source = from_images(BUILT_IN[config.source](config.split, config.cache.expanduser()))
    else:
        source = open_source(config.source, config.split)
    spec = make_spec(source, config.img_size, config.in_chans, config.value_range)
    return pack_source(source, spec, config.out.expanduser(), config.strict)


def pack_source(source: Source, spec: Spec, out: Path, strict: bool = False) -> Path:
    """Decode a source into a pack, or finish one that was interrupted.

    Raises: UserError: what decoding raises; the pack exists; an interrupted one of other images or
        options, or in the hands of another process.
    """
    if out.exists():
        raise UserError(f"{out} exists; remove it, or choose another folder")
    same = [asdict(spec), strict, source.identity or source.origin, len(source.samples)]
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / IMAGES).open("a+b") as images, (partial / LABELS).open("a+b") as labels:
        _lock(images, partial)
        progress = _read_progress(partial, _sha256(json.dumps(same).encode()))
        image_bytes = spec.channels * spec.size[0] * spec.size[1]
        _cut(images, progress.count * image_bytes)
        _cut(labels, progress.count * 8)
        tally = Tally(source, spec, strict)
        tally.skipped, tally.low, tally.high = progress.skipped, progress.low, progress.high
        if progress.count:
            labels.seek(0)
            tally.labelled = int.from_bytes(labels.read(8), sys.byteorder, signed=True) >= 0
        if progress.read:
            print(f"Going on after {progress.read:,} of {len(source.samples):,} images", flush=True)
        with Board() as board:
            task = board.task("Packing")
            task.start(len(source.samples), progress.read)
            for block in _blocks(source, spec, tally, progress.read):
                _append(images, labels, partial, progress, tally, block)
                task.advance(block[2])
                task.say(f"{progress.count:,} images")
        tally.require_images()
        tally.report()
        _write_durably(partial / SKIPPED, "".join(f"{n}\t{why}\n" for n, why in tally.skipped))
        _write_manifest(partial, tally, progress)
        os.rename(partial, out)
    # What a pack does not need, after all else: until the renaming it may still be gone on with.
    (out / PROGRESS).unlink()
    if not tally.labelled:
        (out / LABELS).unlink()
    return out


def _write_manifest(folder: Path, tally: Tally, progress: _Progress) -> None:
    source, spec = tally.source, tally.spec
    small = [LABELS, SKIPPED] if tally.labelled else [SKIPPED]
    content = {
        "format": FORMAT,
        "count": progress.count,
        "shape": [spec.channels, *spec.size],
        "classes": list(source.classes),
        "origin": source.origin,
        "options": asdict(spec) | {"strict": tally.strict},
        "skipped": len(tally.skipped),
        "values": [tally.low, tally.high] if tally.low <= tally.high else None,
        "histogram": progress.histogram,
        "files": {name: _sha256((folder / name).read_bytes()) for name in small},
        "block_images": block_images(spec),
        "blocks": progress.blocks,
    }
    content = json.loads(json.dumps(content))  # tuples become lists, as they are read
    content["manifest"] = _sha256(json.dumps(content).encode())
    _write_durably(folder / MANIFEST, json.dumps(content, indent=1))


def block_images(spec: Spec) -> int:
    return max(1, BLOCK_BYTES // (spec.channels * spec.size[0] * spec.size[1]))


def _lock(file: BinaryIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing to {folder}") from None


def _read_progress(folder: Path, key: str) -> _Progress:
    path = folder / PROGRESS
    if not path.exists():
        return _Progress(key)
    progress = _Progress(**json.loads(path.read_text()))
    if progress.key != key:
        raise UserError(
            f"{folder} was begun with other options, or the images have changed since; remove it "
            "to start again"
        )
    progress.skipped = [tuple(entry) for entry in progress.skipped]
    return progress


def _cut(file: BinaryIO, size: int) -> None:
    if file.seek(0, os.SEEK_END) < size:
        raise UserError(f"{file.name} has lost its end; remove the folder to start again")
    file.truncate(size)


Block = tuple[list[np.ndarray], list[int], int]  # images, labels, samples read for them


def _blocks(source: Source, spec: Spec, tally: Tally, start: int) -> Iterator[Block]:
    images, labels, read = [], [], 0
    for sample, result in decode_all(source, spec, start):
        read += 1
        if tally.add(sample, result):
            images.append(result.pixels)
            labels.append(sample.label)
        if len(images) == block_images(spec):
            yield images, labels, read
            images, labels, read = [], [], 0
    if read:
        yield images, labels, read


def _append(
    images: BinaryIO,
    labels: BinaryIO,
    folder: Path,
    progress: _Progress,
    tally: Tally,
    block: Block,
) -> None:
    """Write a block and, when it is on the disk, that it is there."""
    pixels, numbers, read = block
    if pixels:
        stacked = np.stack(pixels)
        images.write(stacked)
        labels.write(np.array(numbers, np.int64).tobytes())
        counts = histogram(torch.from_numpy(stacked))
        if progress.histogram:
            counts += torch.tensor(progress.histogram)
        progress.histogram = counts.tolist()
        progress.blocks.append(_sha256(stacked))
    for file in (images, labels):
        file.flush()
        os.fsync(file.fileno())
    progress.read += read
    progress.count += len(pixels)
    progress.skipped, progress.low, progress.high = tally.skipped, tally.low, tally.high
    _write_durably(folder / PROGRESS, json.dumps(asdict(progress)))


def _write_durably(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


# --- Reading -------------------------------------------------------------------------------------


def read_manifest(path: Path) -> dict[str, Any]:
    """Content of ``manifest.json``. Raises: UserError: missing, damaged, of another version."""
    file = path / MANIFEST
    try:
        content = json.loads(file.read_text())
        checksum = content.pop("manifest")
    except FileNotFoundError:
        raise UserError(f"{path} is no pack: it has no {MANIFEST}") from None
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if content.get("format") != FORMAT:
        raise UserError(f"{file} is of format {content.get('format')!r}, this reads {FORMAT!r}")
    if checksum != _sha256(json.dumps(content).encode()):
        raise UserError(f"{file} was altered: its checksum does not fit")
    return content


def open_pack(path: Path) -> ImageData:
    """Images of a pack, memory-mapped: read from the disk as they are used. They cannot be written
    to: that would end the process.

    Raises: UserError: truncated or altered files, named. The images of packs of more than 1 GiB
        are not read for that, only their number is checked; ``verify_pack`` reads them.
    """
    manifest = read_manifest(path)
    shape = (manifest["count"], *manifest["shape"])
    whole = math.prod(shape) <= VERIFY_BYTES
    verify_pack(path, manifest, images=whole)
    # Read-only and shared, so that the system lets a file larger than its memory be mapped.
    mapped = np.memmap(path / IMAGES, np.uint8, "r", shape=shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        images = torch.from_numpy(mapped)
    labels = None
    if LABELS in manifest["files"]:
        labels = torch.from_numpy(np.fromfile(path / LABELS, np.int64))
    checked = "checksums verified" if whole else "sizes verified"
    return ImageData(
        images,
        labels,
        tuple(manifest["classes"]),
        f"{path} ({manifest['count']:,} images packed from {manifest['origin']}, {checked})",
        histogram=torch.tensor(manifest["histogram"]),
    )


def verify_pack(path: Path, manifest: dict[str, Any] | None = None, images: bool = True) -> None:
    """Compare all files with their checksums, the images only where asked to.

    Raises: UserError: the first missing, truncated or altered file; of images, which ones.
    """
    manifest = manifest or read_manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.exists():
            raise UserError(f"{file} is missing")
        if _sha256(file.read_bytes()) != expected:
            raise UserError(f"{file} was altered: its checksum does not fit")
    file, count = path / IMAGES, manifest["count"]
    image_bytes = math.prod(manifest["shape"])
    if not file.exists():
        raise UserError(f"{file} is missing")
    size = file.stat().st_size
    if size != count * image_bytes:
        kind = "truncated" if size < count * image_bytes else "altered"
        raise UserError(f"{file} is {kind}: {size:,} bytes, expected {count * image_bytes:,}")
    if not images:
        return
    step = manifest["block_images"]
    with file.open("rb") as opened:
        for block, expected in enumerate(manifest["blocks"]):
            first, last = block * step, min((block + 1) * step, count) - 1
            if _sha256(opened.read((last + 1 - first) * image_bytes)) != expected:
                raise UserError(f"{file} was altered: images {first} to {last} do not fit")


# --- Commands ------------------------------------------------------------------------------------


def describe_pack(path: Path) -> str:
    """What a pack holds, in lines for the screen."""
    manifest = read_manifest(path)
    channels, height, width = manifest["shape"]
    count, classes = manifest["count"], manifest["classes"]
    size = f"{height}x{width}, {channels} channel{'s' if channels > 1 else ''}, uint8"
    lines = [
        f"{count:,} images of {size}: {count * channels * height * width / 2**20:,.1f} MiB",
        f"from {manifest['origin']}",
        f"{len(classes)} classes: {', '.join(classes[:5])}{', …' if len(classes) > 5 else ''}"
        if LABELS in manifest["files"]
        else "no labels",
        f"{manifest['skipped']} images skipped ({path / SKIPPED})",
    ]
    if manifest["values"]:
        lines.append("values of more than 8 bits: {:g} to {:g}".format(*manifest["values"]))
    return "\n".join(lines)
