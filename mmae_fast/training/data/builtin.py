"""Published image sets by name: Fashion-MNIST, scikit-learn's digits, and torchvision's.

Damaged or missing files raise ``UserError`` naming the file.
"""

from __future__ import annotations

import gzip
import hashlib
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmae_fast.training.config import UserError
from mmae_fast.training.data.images import ImageData, Unavailable

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


# --- torchvision ---------------------------------------------------------------------------------


def load_torchvision(
    title: str, training: dict[str, Any], testing: dict[str, Any], split: str, cache: Path
) -> ImageData:
    """A set of torchvision that holds its images as one array; torchvision downloads and verifies.

    Args:
        title: name of torchvision's class.
        training, testing: the arguments that choose the part.
    """
    from torchvision import datasets

    try:
        with _impatient():
            part = training if split == "train" else testing
            data = getattr(datasets, title)(str(cache), download=True, **part)
    except (RuntimeError, OSError) as error:
        raise Unavailable(f"{title} cannot be downloaded to {cache} ({error})") from error
    images = torch.from_numpy(np.ascontiguousarray(data.data))
    if images.shape[-1] == 3:  # CIFAR's; the others have their channels first
        images = images.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(data.targets if hasattr(data, "targets") else data.labels).long()
    classes = getattr(data, "classes", None) or [str(i) for i in range(int(labels.max()) + 1)]
    origin = f"{title} in {cache} (downloaded by torchvision, MD5 verified)"
    known = labels if labels.min() >= 0 else None
    return ImageData(images, known, tuple(classes), origin)


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


BUILT_IN = {
    "fashion-mnist": load_fashion_mnist,
    "digits": load_digits,
    "cifar10": partial(load_torchvision, "CIFAR10", {"train": True}, {"train": False}),
    "cifar100": partial(load_torchvision, "CIFAR100", {"train": True}, {"train": False}),
    "svhn": partial(load_torchvision, "SVHN", {"split": "train"}, {"split": "test"}),
    "stl10": partial(load_torchvision, "STL10", {"split": "train"}, {"split": "test"}),
    "stl10-unlabelled": partial(
        load_torchvision, "STL10", {"split": "unlabeled"}, {"split": "test"}
    ),
}
