"""Labelled image sets, decoded once to one uint8 tensor.

Fashion-MNIST, CIFAR-10, scikit-learn's digits, packed JPEG arrays (``.npz``) and folders of images.
Damaged or missing files raise ``UserError`` naming the file.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import socket
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmae_fast.config import DataConfig, UserError

FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
# SHA-256 of the decompressed files: Debian packs them anew, so the archives differ.
FASHION_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif"}


class Unavailable(UserError):
    """The data set cannot be had here; another one may."""


@dataclass(frozen=True)
class ImageData:
    """Images held in memory."""

    images: Tensor  # (N, C, H, W), uint8
    labels: Tensor | None  # (N,), int64; none for a folder without classes
    classes: tuple[str, ...]
    origin: str  # where they came from and how they were checked, for people

    def __len__(self) -> int:
        return len(self.images)

    @property
    def img_size(self) -> tuple[int, int]:
        return tuple(self.images.shape[2:])

    @property
    def in_chans(self) -> int:
        return self.images.shape[1]

    def stats(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, for pixels in [0, 1]."""
        # Exact, in one pass and without a float copy of the images: through the histogram.
        levels = torch.arange(256, dtype=torch.float64) / 255
        mean, std = [], []
        for channel in self.images.unbind(1):
            share = torch.bincount(channel.flatten(), minlength=256).cpu().double()
            share /= share.sum()
            mean.append(float(share @ levels))
            std.append(max(float((share @ levels**2 - mean[-1] ** 2).clamp(min=0).sqrt()), 1 / 255))
        return mean, std


def load_data(config: DataConfig) -> tuple[ImageData, ImageData | None]:
    """Training images, and test images where there are any.

    Raises: UserError: unknown source, missing or damaged file, images that do not fit together.
    """
    train = _load(config.train, "train", config)
    if config.test is not None:
        test = _load(config.test, "test", config)
    elif config.train in BUILT_IN:
        test = _load(config.train, "test", config)
    else:
        beside = _test_folder_beside(Path(config.train))
        test = _load(str(beside), "test", config) if beside else None
    if test is not None:
        if train.images.shape[1:] != test.images.shape[1:]:
            raise UserError(
                f"training images are {_shape(train)}, test images are {_shape(test)} "
                f"({config.train}, {config.test})"
            )
        if train.classes != test.classes:
            raise UserError(f"training and test images differ in their classes ({config.train})")
    return train, test


def _load(source: str, split: str, config: DataConfig) -> ImageData:
    path = Path(source).expanduser()
    if source in BUILT_IN:
        data = BUILT_IN[source](split, config.cache.expanduser())
    elif not path.exists():
        raise UserError(
            f"no images at {source!r}: neither {', '.join(BUILT_IN)} nor an existing .npz or folder"
        )
    elif path.is_dir():
        if config.img_size is None:
            raise UserError(f"--data.img-size is needed for a folder of images ({path})")
        inner = path / "train"
        return load_folder(inner if split == "train" and inner.is_dir() else path, config.img_size)
    elif path.suffix == ".npz":
        data = load_packed(path)
    else:
        raise UserError(f"{path} is neither a folder nor a packed .npz file")
    if config.img_size not in (None, *data.img_size):
        raise UserError(
            f"--data.img-size {config.img_size} is for folders; {source} has images of "
            f"{_shape(data)}"
        )
    return data


def _shape(data: ImageData) -> str:
    height, width = data.img_size
    return f"{height}x{width} with {data.in_chans} channel{'s' if data.in_chans > 1 else ''}"


# --- Fashion-MNIST -------------------------------------------------------------------------------


def load_fashion_mnist(split: str, cache: Path) -> ImageData:
    """Fashion-MNIST (60,000 + 10,000 images of 28x28, grey): Debian's files, else a download."""
    folder, origin = FASHION_DEBIAN, f"{FASHION_DEBIAN} (Debian package dataset-fashion-mnist)"
    if not folder.is_dir():
        folder = cache / "FashionMNIST" / "raw"
        origin = f"{folder} (downloaded by torchvision)"
        if not all((folder / f"{name}.gz").exists() for name in FASHION_SHA256):
            _download_fashion_mnist(cache)
    prefix = "train" if split == "train" else "t10k"
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    return ImageData(
        torch.from_numpy(images).unsqueeze(1),
        torch.from_numpy(labels).long(),
        FASHION_CLASSES,
        f"Fashion-MNIST from {origin}, SHA-256 verified",
    )


def _download_fashion_mnist(cache: Path) -> None:
    from torchvision.datasets import FashionMNIST

    try:
        with _impatient():
            FashionMNIST(str(cache), download=True)
    except (RuntimeError, OSError) as error:
        raise Unavailable(
            f"Fashion-MNIST is not installed at {FASHION_DEBIAN} and cannot be downloaded to "
            f"{cache} ({error}). On Debian or Ubuntu: apt-get install dataset-fashion-mnist"
        ) from error


@contextmanager
def _impatient() -> Iterator[None]:
    """Time limit for torchvision's downloads, which would wait for ever."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        yield
    finally:
        socket.setdefaulttimeout(timeout)


def read_idx(path: Path) -> np.ndarray:
    """One gzipped idx file of Fashion-MNIST, checked against its SHA-256.

    Raises: UserError: missing, truncated or altered file, named.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; install Fashion-MNIST again") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); install Fashion-MNIST again") from error
    digest = hashlib.sha256(raw).hexdigest()
    expected = FASHION_SHA256[path.stem]
    if digest != expected:
        raise UserError(
            f"{path} is not the published file: its content has SHA-256 {digest}, expected "
            f"{expected}; install Fashion-MNIST again"
        )
    # idx: two zero bytes, the type (8: uint8), the number of axes, then each length, big-endian.
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()


# --- CIFAR-10 ------------------------------------------------------------------------------------


def load_cifar10(split: str, cache: Path) -> ImageData:
    """CIFAR-10 (50,000 + 10,000 images of 32x32, RGB) as torchvision downloads and verifies it."""
    from torchvision.datasets import CIFAR10

    try:
        with _impatient():
            data = CIFAR10(str(cache), train=split == "train", download=True)
    except (RuntimeError, OSError) as error:
        raise Unavailable(f"CIFAR-10 cannot be downloaded to {cache} ({error})") from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    origin = f"CIFAR-10 in {cache} (downloaded by torchvision, MD5 verified)"
    return ImageData(images, torch.tensor(data.targets), tuple(data.classes), origin)


# --- scikit-learn's digits -----------------------------------------------------------------------


def load_digits(split: str, cache: Path) -> ImageData:
    """scikit-learn's digits: 1,797 images of 8x8, grey; every fifth one is a test image."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise Unavailable("digits need scikit-learn: pip install scikit-learn") from error
    bunch = load()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    is_test = torch.arange(len(images)) % 5 == 4
    keep = is_test if split == "test" else ~is_test
    classes = tuple(str(digit) for digit in range(10))
    return ImageData(images[keep], labels[keep], classes, "scikit-learn's digits (8x8 pixels)")


BUILT_IN = {"fashion-mnist": load_fashion_mnist, "cifar10": load_cifar10, "digits": load_digits}


def load_demo_data(name: str, cache: Path) -> tuple[str, ImageData, ImageData, str]:
    """Data of the demo: name, training and test images, and what was tried in vain.

    ``name="auto"`` takes Fashion-MNIST where it can be had, else digits. A damaged file is an
    error, not a reason to take other data.
    """
    names = ["fashion-mnist", "digits"] if name == "auto" else [name]
    for position, candidate in enumerate(names):
        try:
            train, test = load_data(DataConfig(train=candidate, cache=cache))
        except Unavailable as error:
            if position == len(names) - 1:
                raise
            failed = str(error)
        else:
            return candidate, train, test, failed if position else ""
    raise AssertionError("unreachable")


# --- Packed arrays and folders -------------------------------------------------------------------


def load_packed(path: Path) -> ImageData:
    """Packed JPEGs: ``jpeg`` (uint8, concatenated), ``offset`` (n + 1), ``label``, ``classes``."""
    try:
        with np.load(path) as file:
            missing = {"jpeg", "offset", "label", "classes"} - set(file.files)
            if missing:
                raise UserError(f"{path} lacks {', '.join(sorted(missing))}")
            jpeg, offset = torch.from_numpy(file["jpeg"]), file["offset"]
            labels, classes = file["label"], file["classes"]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    spans = list(itertools.pairwise(offset.tolist()))
    if not spans or offset[-1] != len(jpeg) or len(labels) != len(spans):
        raise UserError(
            f"{path} is inconsistent: {len(spans)} images, {len(labels)} labels, "
            f"{len(jpeg)} bytes of JPEG where the offsets end at {offset[-1]}"
        )
    images = _decode_all([(f"{path}, image {i}", jpeg[a:b]) for i, (a, b) in enumerate(spans)])
    names = tuple(str(name) for name in classes)
    return ImageData(images, torch.from_numpy(labels).long(), names, f"{path} ({len(spans):,})")


def _decode_all(named: list[tuple[str, Tensor]]) -> Tensor:
    from torchvision.io import decode_jpeg

    def decode(item: tuple[str, Tensor]) -> Tensor:
        name, data = item
        try:
            return decode_jpeg(data)
        except RuntimeError as error:
            raise UserError(f"{name} cannot be decoded: {error}") from error

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(decode, named))
    for (name, _), image in zip(named, images, strict=True):
        if image.shape != images[0].shape:
            raise UserError(
                f"{name} has shape {tuple(image.shape)}, the first image {tuple(images[0].shape)}"
            )
    return torch.stack(images)


def load_folder(folder: Path, img_size: int) -> ImageData:
    """Images of a folder, resized and centre-cropped to a square, RGB.

    Subfolders are classes. A folder of images without subfolders has no labels.
    """
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    parts = [(folder / name, label) for label, name in enumerate(classes)] or [(folder, -1)]
    paths, labels = [], []
    for part, label in parts:
        found = sorted(p for p in part.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(f"no images ({kinds}) in {part}")
        paths += found
        labels += [label] * len(found)
    with ThreadPoolExecutor() as pool:
        images = torch.empty(len(paths), 3, img_size, img_size, dtype=torch.uint8)
        for i, image in enumerate(pool.map(lambda path: _decode_file(path, img_size), paths)):
            images[i] = image
    known = torch.tensor(labels) if classes else None
    return ImageData(images, known, tuple(classes), f"{folder} ({len(paths):,} images)")


def _decode_file(path: Path, img_size: int) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2 import functional as transforms

    try:
        image = decode_image(str(path), ImageReadMode.RGB)
    except RuntimeError as error:
        raise UserError(f"{path} cannot be decoded: {error}") from error
    image = transforms.resize(image, img_size, antialias=True)  # the shorter side
    return transforms.center_crop(image, [img_size, img_size])


def _test_folder_beside(folder: Path) -> Path | None:
    parent = folder if (folder / "train").is_dir() else folder.parent
    if parent == folder.parent and folder.name != "train":
        return None
    return next((parent / name for name in ("val", "test") if (parent / name).is_dir()), None)
