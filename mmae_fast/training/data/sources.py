"""Where images come from before they are decoded: folders, tar shards, packed JPEGs, Hugging Face.

A source lists its samples in a fixed order and reads none of them: decoding, in threads, does.
"""

from __future__ import annotations

import hashlib
import itertools
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmae_fast.training.config import UserError
from mmae_fast.training.data.decode import IMAGE_SUFFIXES, Data, Span, Undecodable
from mmae_fast.training.data.images import ImageData

HUGGING_FACE = "hf:"


class Sample(NamedTuple):
    name: str  # for people
    data: Data | Undecodable  # Undecodable: known to be damaged without a look
    label: int  # -1: none


@dataclass(frozen=True)
class Source:
    """Samples that can be listed again, always in the same order."""

    samples: Sequence[Sample]
    classes: tuple[str, ...]
    origin: str
    in_chans: int | None = None  # what they are converted to by default; none: as the first is
    identity: str = ""  # changes when the samples do; "" where the origin says it all


def open_source(name: str, split: str = "train") -> Source:
    """Folder, ``.tar`` shard, folder of shards, packed JPEGs (``.npz``) or ``hf:NAME``.

    Raises: UserError: nothing there, or damaged beyond a single image.
    """
    if name.startswith(HUGGING_FACE):
        return hugging_face(name.removeprefix(HUGGING_FACE), split)
    path = part_of(Path(name).expanduser(), split)
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        return tar_shards(shards, str(path)) if shards else folder(path)
    if path.suffix == ".tar":
        return tar_shards([path], str(path))
    if path.suffix == ".npz":
        return packed_jpegs(path)
    kind = "neither a folder nor a .tar or packed .npz file" if path.exists() else "missing"
    raise UserError(f"{path} is {kind}")


def part_of(path: Path, split: str) -> Path:
    """The subfolder named as the split, where there is one; else the path itself."""
    return path / split if (path / split).is_dir() else path


# --- Folder --------------------------------------------------------------------------------------


def folder(path: Path) -> Source:
    """Images of a folder, in the order of their names. Subfolders are classes; a folder without
    subfolders has no labels."""
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    beside = next((e for e in entries if e.suffix.lower() in IMAGE_SUFFIXES and e.is_file()), None)
    if classes and beside:
        raise UserError(
            f"{path} has subfolders, which would be classes, and images beside them, e.g. "
            f"{beside.name}: move one or the other elsewhere"
        )
    parts = [(path / name, label) for label, name in enumerate(classes)] or [(path, -1)]
    samples, identity = [], []
    for part, label in parts:
        found = sorted(p for p in part.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise UserError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {part}")
        samples += [Sample(str(p.relative_to(path)), p, label) for p in found]
        identity += [f"{p.relative_to(path)} {_file_identity(p)}" for p in found]
    array = samples[0].data.suffix.lower() == ".npy"
    return Source(samples, tuple(classes), str(path), None if array else 3, _digest(identity))


def _file_identity(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --- Tar shards ----------------------------------------------------------------------------------


def tar_shards(shards: list[Path], origin: str) -> Source:
    """Uncompressed tar files in WebDataset's form: members that share their name up to the first
    dot make a sample, ``.cls`` holds the number of its class.

    Only the headers are read here. A shard that ends too early gives the samples before the cut.
    """
    samples: list[Sample] = []
    for shard in shards:
        fields: dict[str, tuple[str, Span]] = {}
        labels: dict[str, int] = {}
        damage = None
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    parent, _, base = member.name.rpartition("/")
                    stem, _, kind = base.partition(".")
                    key, suffix = f"{parent}/{stem}" if parent else stem, f".{kind}".lower()
                    if Path(base).suffix.lower() in IMAGE_SUFFIXES:
                        span = Span(shard, member.offset_data, member.size)
                        fields.setdefault(key, (member.name, span))
                    elif suffix == ".cls":
                        labels[key] = _class_number(tar.extractfile(member).read(), member.name)
        except OSError as error:
            raise UserError(f"{shard} cannot be read: {error}") from error
        except tarfile.TarError as error:
            damage = Sample(str(shard), Undecodable(f"shard: {error}"), -1)
        samples += [
            Sample(f"{shard.name}/{name}", span, labels.get(key, -1))
            for key, (name, span) in fields.items()
        ]
        if damage:
            samples.append(damage)
    if not any(isinstance(sample.data, Span) for sample in samples):
        raise UserError(
            f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {origin}"
            + (f": {samples[0].data}" if samples else "")
        )
    classes = tuple(str(number) for number in range(1 + max(s.label for s in samples)))
    return Source(samples, classes, origin, 3, _digest(map(_file_identity, shards)))


def _class_number(raw: bytes, name: str) -> int:
    try:
        number = int(raw)
    except ValueError:
        number = -1
    if number < 0:
        raise UserError(f"{name} holds {raw[:20]!r}, not the number of a class")
    return number


# --- Packed JPEGs --------------------------------------------------------------------------------


def packed_jpegs(path: Path) -> Source:
    """An ``.npz`` of ``jpeg`` (uint8, concatenated), ``offset`` (n + 1), ``label``, ``classes``."""
    try:
        with np.load(path) as file:
            missing = {"jpeg", "offset", "label", "classes"} - set(file.files)
            if missing:
                raise UserError(f"{path} lacks {', '.join(sorted(missing))}")
            jpeg, offset = file["jpeg"].tobytes(), file["offset"]
            labels, classes = file["label"], file["classes"]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    spans = list(itertools.pairwise(offset.tolist()))
    if not spans or offset[-1] != len(jpeg) or len(labels) != len(spans):
        raise UserError(
            f"{path} is inconsistent: {len(spans)} images, {len(labels)} labels, "
            f"{len(jpeg)} bytes of JPEG where the offsets end at {offset[-1]}"
        )
    samples = [
        Sample(f"{path}, image {i}", jpeg[start:stop], int(label))
        for i, ((start, stop), label) in enumerate(zip(spans, labels, strict=True))
    ]
    names = tuple(str(name) for name in classes)
    return Source(samples, names, str(path), None, _file_identity(path))


# --- Hugging Face --------------------------------------------------------------------------------


def hugging_face(name: str, split: str) -> Source:
    """A data set of the hub, a local copy of it, a Parquet or Arrow file, or a folder that
    ``save_to_disk`` wrote; its first column of images, and of class labels where there is one.

    The rows stay on the disk, in memory-mapped Arrow files, until they are asked for.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{HUGGING_FACE}{name} needs the package datasets: pip install 'mmae_fast[hf]'"
        ) from error
    try:
        path = Path(name).expanduser()
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            found = datasets.load_from_disk(str(path))
            found = found[split] if isinstance(found, dict) else found
        elif path.suffix in (".parquet", ".arrow") and path.is_file():
            kind = path.suffix.removeprefix(".")
            found = datasets.load_dataset(kind, data_files={split: str(path)}, split=split)
        else:
            found = datasets.load_dataset(str(path) if path.is_dir() else name, split=split)
    except Exception as error:  # whatever the hub or the files raise
        raise UserError(f"{HUGGING_FACE}{name}, split {split}: {error}") from error
    columns = found.features.items()
    images = next((key for key, kind in columns if isinstance(kind, datasets.Image)), None)
    if images is None:
        raise UserError(f"{HUGGING_FACE}{name} has no column of images: {list(found.features)}")
    labels = next((key for key, kind in columns if isinstance(kind, datasets.ClassLabel)), None)
    classes = tuple(found.features[labels].names) if labels else ()
    rows = found.select_columns([images, labels] if labels else [images])
    samples = _HuggingFaceSamples(
        rows.cast_column(images, datasets.Image(decode=False)), images, labels
    )
    return Source(samples, classes, f"{HUGGING_FACE}{name}, {split}", 3, found._fingerprint)


@dataclass(frozen=True)
class _HuggingFaceSamples(Sequence):
    """Reads a row when it is asked for."""

    rows: Any
    images: str
    labels: str | None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        image, label = row[self.images], row[self.labels] if self.labels else None
        name = f"row {index}"
        if image is None:
            return Sample(name, Undecodable("no image"), -1)
        data = image["bytes"] or Path(image["path"])
        return Sample(name, data, -1 if label is None else int(label))


def from_images(data: ImageData) -> Source:
    """Images decoded already."""
    labels = data.labels.tolist() if data.labels is not None else [-1] * len(data)
    samples = [
        Sample(f"image {i}", image.permute(1, 2, 0).numpy(), label)
        for i, (image, label) in enumerate(zip(data.images, labels, strict=True))
    ]
    return Source(samples, data.classes, data.origin)
