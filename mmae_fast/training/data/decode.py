"""One image file, of any kind, to uint8 channels of one size.

Pictures are read by Pillow: turned as their EXIF orientation says, transparent parts put on white,
palettes and CMYK converted. Arrays (``.npy``) are ``(H, W)`` or ``(H, W, C)``.

More than 8 bits: ``value_range`` (low, high) becomes 0 to 255, linearly, rounded and clipped.
Without one, the whole range of unsigned integers, and [0, 1] of floats.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmae_fast.training.config import UserError

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
IMAGE_SUFFIXES = PICTURE_SUFFIXES | {".npy"}
NPY = b"\x93NUMPY"
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # Pillow's modes of more than 8 bits


class Undecodable(Exception):
    """The file is damaged, or no image."""


class Span(NamedTuple):
    """Bytes inside a larger file."""

    path: Path
    offset: int
    size: int


Data = bytes | Path | Span | np.ndarray


@dataclass(frozen=True)
class Spec:
    """What images are made into."""

    size: tuple[int, int]
    """Height and width."""
    channels: int
    resize: bool
    """Resize and crop the centre; otherwise another size is an error."""
    value_range: tuple[float, float] | None = None


class Decoded(NamedTuple):
    pixels: np.ndarray  # (C, H, W), uint8
    low: float = float("inf")  # range of the values of an image of more than 8 bits
    high: float = float("-inf")


def decode(data: Data, spec: Spec) -> Decoded:
    """Decode, convert, resize (bicubic, antialiased) and crop the centre.

    Raises:
        Undecodable: damaged.
        UserError: a file that cannot be read; a size, a number of channels or a type that needs
            another setting.
    """
    try:
        image = open_image(data, spec.size if spec.resize else None)
        if isinstance(image, Image.Image) and image.mode not in DEEP:
            planes, deep = [_convert(image, spec.channels)], None
        else:
            planes, deep = _split(image, spec)
    except UserError:
        raise
    except Exception as error:  # decoders raise anything on damaged files
        raise Undecodable(reason(error)) from error

    height, width = planes[0].height, planes[0].width
    if (height, width) != spec.size:
        if not spec.resize:
            raise UserError(
                f"is {height}x{width} where the first image is {spec.size[0]}x{spec.size[1]}: "
                "give an img-size to resize all to"
            )
        # The largest centred box of the wanted shape.
        scale = max(spec.size[0] / height, spec.size[1] / width)
        half_height, half_width = spec.size[0] / scale / 2, spec.size[1] / scale / 2
        top, left = max(height / 2 - half_height, 0), max(width / 2 - half_width, 0)
        box = (left, top, min(width / 2 + half_width, width), min(height / 2 + half_height, height))
        planes = [p.resize(spec.size[::-1], Image.Resampling.BICUBIC, box) for p in planes]

    arrays = [np.asarray(plane) for plane in planes]
    pixels = arrays[0].reshape(*spec.size, -1).transpose(2, 0, 1)
    if len(arrays) > 1:
        pixels = np.stack(arrays)
    if deep is None:
        return Decoded(np.ascontiguousarray(pixels))
    seen, (low, high) = deep
    pixels = np.rint((pixels - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
    return Decoded(np.ascontiguousarray(pixels.repeat(spec.channels // len(pixels), 0)), *seen)


def open_image(data: Data, size: tuple[int, int] | None = None) -> Image.Image | np.ndarray:
    """Read: a picture, upright, or an array ``(H, W, C)``. JPEGs much larger than ``size`` are
    decoded at a half, quarter or eighth of theirs, but not below twice the ``size``.

    Raises: whatever the decoders raise.
    """
    raw = data if isinstance(data, np.ndarray) else _read(data)
    if isinstance(raw, bytes) and raw[: len(NPY)] != NPY:
        image = Image.open(io.BytesIO(raw))
        if size is not None and image.format == "JPEG":
            scale = 2 * max(size) / min(image.size)
            image.draft(None, tuple(max(1, round(side * scale)) for side in image.size))
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        return image
    array = np.load(io.BytesIO(raw), allow_pickle=False) if isinstance(raw, bytes) else raw
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"an array of shape {array.shape}, not (H, W) or (H, W, C)")
    return array if array.ndim == 3 else array[:, :, None]


def reason(error: Exception) -> str:
    """Why an image could not be opened, in one line."""
    if isinstance(error, UnidentifiedImageError):  # its own words name an object in memory
        return "no image of a known format"
    return " ".join(str(error).split()) or type(error).__name__


def natural(image: Image.Image | np.ndarray) -> tuple[tuple[int, int], int]:
    """Size of an opened image, and the channels that it has itself (transparency is none)."""
    if isinstance(image, np.ndarray):
        return image.shape[:2], image.shape[2]
    grey = image.mode in DEEP or image.mode in ("1", "L", "LA", "La")
    return (image.height, image.width), 1 if grey else 3


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """An 8-bit picture as grey, RGB or RGBA."""
    transparent = image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info
    if channels == 4 and transparent:
        return image.convert("RGBA")
    if channels not in (1, 3):
        raise _misfit(len(image.getbands()), channels)
    if transparent:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("L" if channels == 1 else "RGB")


def _split(
    image: Image.Image | np.ndarray, spec: Spec
) -> tuple[list[Image.Image], tuple[tuple[float, float], tuple[float, float]] | None]:
    """An array, or a picture of more than 8 bits, as one picture per channel; with more than 8
    bits, the range of its values and that which becomes 0 to 255."""
    if isinstance(image, Image.Image):
        array = np.asarray(image)[:, :, None]
        if spec.channels not in (1, 3):
            raise _misfit(1, spec.channels)
        if image.mode == "I":  # older Pillows read 16-bit PNGs so
            known = (0.0, 65535.0)
    else:
        array = image
        if array.shape[2] != spec.channels:
            raise _misfit(array.shape[2], spec.channels)
    kind = array.dtype.kind
    if kind == "b" or array.dtype == np.uint8:
        array = array * np.uint8(255 if kind == "b" else 1)
        return [Image.fromarray(np.ascontiguousarray(c)) for c in np.moveaxis(array, 2, 0)], None

    if spec.value_range is not None:
        known = spec.value_range
    elif kind == "u":
        known = (0.0, float(np.iinfo(array.dtype).max))
    elif kind == "f":
        known = (0.0, 1.0)
    elif isinstance(image, np.ndarray):
        raise UserError(f"has values of type {array.dtype}: give the range that becomes 0 to 255")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("NaN or infinity among the values")
    planes = [Image.fromarray(np.ascontiguousarray(c)) for c in np.moveaxis(array, 2, 0)]
    return planes, ((float(array.min()), float(array.max())), known)


def _misfit(has: int, wanted: int) -> UserError:
    return UserError(f"has {has} channel{'s' if has > 1 else ''}, in_chans is {wanted}")


def _read(data: bytes | Path | Span) -> bytes:
    if isinstance(data, bytes):
        return data
    path, offset, size = data if isinstance(data, Span) else (data, 0, -1)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            raw = file.read(size)
    except OSError as error:  # the disk, not the image: to skip would leave out what is there
        raise UserError(f"cannot be read: {error}") from error
    if size >= 0 and len(raw) != size:
        raise EOFError(f"{path} ends within it")
    return raw
