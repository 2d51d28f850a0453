"""Images to train and evaluate on, from whatever they are kept in, as one uint8 tensor.

``images`` what is handed out; ``builtin`` published sets by name; ``sources`` folders, shards and
the like; ``decode`` one image file; ``reading`` many, into memory; ``packed`` images decoded once,
in a memory-mapped file.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mmae_fast.training.config import DataConfig, UserError
from mmae_fast.training.data.builtin import BUILT_IN
from mmae_fast.training.data.images import ImageData, Unavailable, save_skipped, shape_text
from mmae_fast.training.data.packed import is_pack, open_pack
from mmae_fast.training.data.reading import make_spec, read_images
from mmae_fast.training.data.sources import HUGGING_FACE, open_source, part_of

__all__ = [
    "ImageData",
    "Unavailable",
    "decoded_now",
    "load_data",
    "load_demo_data",
    "save_skipped",
]

# A pack may be this much larger than the images that a model is given: their centres, and random
# crops shrunk by no more, need no low-pass filter and lose little.
CROP_RATIO = 1.25


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
        beside = _test_folder_beside(Path(config.train).expanduser())
        test = _load(str(beside), "test", config) if beside else None
    if test is not None:
        if train.images.shape[1:] != test.images.shape[1:]:
            raise UserError(
                f"training images are {shape_text(train.images)}, test images are "
                f"{shape_text(test.images)} ({config.train}, {config.test})"
            )
        labelled = train.labels is not None and test.labels is not None
        # Labels mean the same where the last classes are missing from the test images.
        if labelled and train.classes[: len(test.classes)] != test.classes:
            raise UserError(f"training and test images differ in their classes ({config.train})")
    return train, test


def decoded_now(source: str) -> bool:
    """Whether images come as files, which can be made any size: not a built-in set, nor a pack."""
    return source not in BUILT_IN and not is_pack(part_of(Path(source).expanduser(), "train"))


def _load(source: str, split: str, config: DataConfig) -> ImageData:
    path = Path(source).expanduser()
    if source in BUILT_IN:
        return _fixed(BUILT_IN[source](split, config.cache.expanduser()), source, config)
    if not source.startswith(HUGGING_FACE) and not path.exists():
        raise UserError(
            f"no images at {source!r}: neither {', '.join(BUILT_IN)} nor {HUGGING_FACE}NAME nor an "
            "existing folder, pack, .tar or .npz"
        )
    if is_pack(path := part_of(path, split)):
        return _fixed(_centre(open_pack(path), source, config), source, config)
    found = open_source(source, split)
    spec = make_spec(found, config.img_size, config.in_chans, config.value_range)
    return read_images(found, spec, config.strict)


def _fixed(data: ImageData, source: str, config: DataConfig) -> ImageData:
    """Images that were decoded before: settings may only say what they are."""
    height, width = data.img_size
    wanted = config.img_size if config.img_size is not None else (height, width)
    wanted = (wanted, wanted) if isinstance(wanted, int) else tuple(wanted)
    if wanted != (height, width) or config.in_chans not in (None, data.in_chans):
        raise UserError(
            f"--data.img-size and --data.in-chans convert images that are decoded now; {source} "
            f"has images of {shape_text(data.images)}, asked for were {config.img_size} pixels, "
            f"{config.in_chans or 'any number of'} channels"
        )
    if config.value_range is not None:
        raise UserError(f"--data.value-range is for images decoded now, not for {source}")
    return data


def _centre(data: ImageData, source: str, config: DataConfig) -> ImageData:
    """A pack larger than the images wanted: their centres, for crops the whole."""
    size = config.img_size
    size = (size, size) if isinstance(size, int) else size
    if size is None or tuple(size) == data.img_size:
        return data
    ratios = [have / want for have, want in zip(data.img_size, size, strict=True)]
    if min(ratios) < 1 or max(ratios) > CROP_RATIO:
        raise UserError(
            f"{source} is packed at {shape_text(data.images)}; img_size {config.img_size} needs a "
            f"pack of that size, or up to {CROP_RATIO} times as large"
        )
    top, left = ((have - want) // 2 for have, want in zip(data.img_size, size, strict=True))
    images = data.images[:, :, top : top + size[0], left : left + size[1]]
    return dataclasses.replace(data, images=images, uncropped=data.images)


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


def _test_folder_beside(folder: Path) -> Path | None:
    parent = folder if (folder / "train").is_dir() else folder.parent
    if parent == folder.parent and folder.name != "train":
        return None
    return next((parent / name for name in ("val", "test") if (parent / name).is_dir()), None)
