"""Image files of every kind to uint8 channels of one size, and where they are listed from."""

import io
import os
import shutil
import sys
import tarfile
import tracemalloc
import types

import numpy as np
import pytest
from PIL import Image

from mmae_fast.training.config import DataConfig, PackConfig, UserError
from mmae_fast.training.data import decode as decoding
from mmae_fast.training.data import load_data, reading
from mmae_fast.training.data.decode import Spec, Undecodable, decode
from mmae_fast.training.data.packed import open_pack, write_pack
from mmae_fast.training.data.sources import open_source

RGB8 = Spec((8, 8), 3, True)
GREY8 = Spec((8, 8), 1, True)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def colours(pixels):
    """The distinct colours of an image."""
    return {tuple(map(int, colour)) for colour in pixels.reshape(len(pixels), -1).T}


# --- Kinds of pictures ---------------------------------------------------------------------------


def test_palette():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert colours(decode(encoded(image), RGB8).pixels) == {(10, 20, 30)}
    transparent = encoded(image, transparency=1)
    assert colours(decode(transparent, RGB8).pixels) == {(255, 255, 255)}


def test_cmyk_jpeg():
    pixels = decode(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG"), RGB8).pixels
    assert pixels[0].max() < 10 and pixels[1:].min() > 245  # cyan


def test_transparency_is_put_on_white_or_kept():
    image = Image.new("RGBA", (8, 8), (200, 100, 0, 51))  # a fifth
    raw = encoded(image)
    assert colours(decode(raw, RGB8).pixels) == {(244, 224, 204)}
    assert colours(decode(raw, Spec((8, 8), 4, True)).pixels) == {(200, 100, 0, 51)}
    grey = encoded(Image.new("LA", (8, 8), (100, 0)))
    assert colours(decode(grey, GREY8).pixels) == {(255,)}


def test_one_bit_and_grey():
    assert colours(decode(encoded(Image.new("1", (8, 8), 1)), GREY8).pixels) == {(255,)}
    assert colours(decode(encoded(Image.new("L", (8, 8), 7)), RGB8).pixels) == {(7, 7, 7)}
    rgb = encoded(Image.new("RGB", (8, 8), (255, 0, 0)))
    assert colours(decode(rgb, GREY8).pixels) == {(76,)}  # 0.299 of 255


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_formats(kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow was built without {kind}")
    pixels = decode(encoded(Image.new("RGB", (20, 16), (120, 120, 120)), kind), RGB8).pixels
    assert pixels.shape == (3, 8, 8)
    assert abs(pixels.astype(int) - 120).max() <= 2


def test_exif_orientation():
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:, 8:] = 250  # the right half is bright
    sideways = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a clockwise quarter turn
    for kind in ("JPEG", "PNG"):
        raw = encoded(sideways, kind, exif=exif)
        pixels = decode(raw, Spec((8, 16), 3, False)).pixels
        assert pixels[:, :, :7].max() < 10 and pixels[:, :, 9:].min() > 240


def test_resize_keeps_the_shape_and_the_centre():
    image = np.zeros((40, 120), np.uint8)
    image[:, 40:80] = 200
    pixels = decode(encoded(Image.fromarray(image)), GREY8).pixels
    assert pixels.shape == (1, 8, 8) and pixels[:, :, 1:-1].min() == 200
    tall = decode(encoded(Image.fromarray(image.T.copy())), Spec((6, 12), 1, True)).pixels
    assert tall.shape == (1, 6, 12) and tall.min() == 200


def test_resizing_has_a_low_pass_filter():
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    pixels = decode(encoded(Image.fromarray(checks.astype(np.uint8))), GREY8).pixels
    assert abs(pixels.astype(int) - 128).max() <= 1


def test_large_jpegs_are_decoded_smaller_and_look_the_same():
    y, x = np.indices((640, 800))
    smooth = np.stack([x * 255 / 800, y * 255 / 640, 128 + 100 * np.sin(x / 40)], 2)
    raw = encoded(Image.fromarray(smooth.astype(np.uint8)), "JPEG", quality=95)
    spec = Spec((32, 32), 3, True)
    opened = decoding.open_image(raw, spec.size)
    assert opened.size == (100, 80)  # an eighth, not below twice the size
    exact = Image.open(io.BytesIO(raw)).resize(
        (32, 32), Image.Resampling.BICUBIC, (80, 0, 720, 640)
    )
    difference = decode(raw, spec).pixels.transpose(1, 2, 0).astype(int) - np.asarray(exact)
    assert abs(difference).max() <= 3


# --- More than 8 bits, and arrays ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey(kind):
    levels = np.array([0, 257, 1000, 4095, 32768, 65535], np.uint16)
    raw = encoded(Image.fromarray(np.tile(levels, (2, 1))), kind)
    spec = Spec((2, 6), 1, False)
    out = decode(raw, spec)
    assert out.pixels[0, 0].tolist() == np.rint(levels / 257).astype(int).tolist()
    assert (out.low, out.high) == (0, 65535)
    twelve_bits = decode(raw, Spec((2, 6), 3, False, (0, 4095)))
    expected = np.rint(levels / 4095 * 255).clip(0, 255).astype(int).tolist()
    assert twelve_bits.pixels[:, 1].tolist() == [expected] * 3


def test_16_bit_images_are_resized_before_they_are_rounded():
    image = np.full((64, 64), 120, np.uint16)  # 0.47 levels of 8 bits
    image[::4] = 200  # 0.78; the mean is 0.54, that of rounded levels 0.25
    pixels = decode(encoded(Image.fromarray(image)), GREY8).pixels
    assert set(pixels[:, 2:-2].flatten().tolist()) == {1}


def test_arrays_of_many_channels():
    array = np.arange(8 * 8 * 5, dtype=np.uint8).reshape(8, 8, 5)
    assert np.array_equal(
        decode(npy(array), Spec((8, 8), 5, True)).pixels, array.transpose(2, 0, 1)
    )
    smaller = decode(npy(np.full((20, 30, 5), 9, np.uint8)), Spec((4, 6), 5, True)).pixels
    assert smaller.shape == (5, 4, 6) and set(smaller.flatten().tolist()) == {9}
    assert decode(npy(array[:, :, 0]), GREY8).pixels.shape == (1, 8, 8)


def test_float_arrays():
    array = np.array([[0.0, 0.5, 1.0, 1.5]])
    spec = Spec((1, 4), 1, False)
    assert decode(npy(array), spec).pixels.flatten().tolist() == [0, 128, 255, 255]
    wide = decode(npy(array.astype(np.float16)), Spec((1, 4), 1, False, (-1.5, 1.5)))
    assert wide.pixels.flatten().tolist() == [128, 170, 212, 255]
    with pytest.raises(Undecodable, match="NaN or infinity"):
        decode(npy(array * np.nan), spec)
    assert decode(npy(array > 0.7), spec).pixels.flatten().tolist() == [0, 0, 255, 255]


def test_what_needs_another_setting():
    grey = encoded(Image.new("L", (8, 8)))
    with pytest.raises(UserError, match="has 1 channel, in_chans is 4"):
        decode(grey, Spec((8, 8), 4, True))
    with pytest.raises(UserError, match="has 5 channels, in_chans is 3"):
        decode(npy(np.zeros((8, 8, 5), np.uint8)), RGB8)
    with pytest.raises(UserError, match="is 8x8 where the first image is 4x4"):
        decode(grey, Spec((4, 4), 1, False))
    with pytest.raises(UserError, match="type int16: give the range"):
        decode(npy(np.zeros((8, 8), np.int16)), GREY8)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "no image of a known"),
        (b"no image", "no image of a known"),
        (b"\xff\xd8\xff\xe0 half a header", "Truncated|truncated|no image"),
        (encoded(Image.effect_noise((64, 64), 50))[:-100], "truncated"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-300], "truncated"),
        (npy(np.zeros((8, 8)))[:-10], "reshape|read"),
        (npy(np.zeros(8)), r"an array of shape \(8,\)"),
        (npy(np.array([{}], dtype=object)), "allow_pickle=False"),
    ],
    ids=["empty", "text", "header", "png", "jpeg", "npy", "vector", "pickle"],
)
def test_damaged(raw, reason):
    with pytest.raises(Undecodable, match=reason):
        decode(raw, RGB8)


# --- Sources -------------------------------------------------------------------------------------


def write_shard(path, entries):
    with tarfile.open(path, "w") as tar:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def shard_entries(first, count):
    for i in range(first, first + count):
        yield f"set/{i:03d}.png", encoded(Image.new("RGB", (10, 8), (i, i, i)))
        yield f"set/{i:03d}.cls", b"%d\n" % (i % 3)
        yield f"set/{i:03d}.json", b"{}"


def test_tar_shards(tmp_path):
    write_shard(tmp_path / "a-000.tar", shard_entries(0, 4))
    write_shard(tmp_path / "a-001.tar", shard_entries(4, 3))
    train, test = load_data(DataConfig(train=str(tmp_path), img_size=8))
    assert test is None and train.classes == ("0", "1", "2")
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    one, _ = load_data(DataConfig(train=str(tmp_path / "a-001.tar")))
    assert one.images.shape == (3, 3, 8, 10)


def test_tar_without_labels(tmp_path):
    images = [entry for entry in shard_entries(0, 2) if entry[0].endswith("png")]
    write_shard(tmp_path / "a.tar", images)
    train, _ = load_data(DataConfig(train=str(tmp_path / "a.tar")))
    assert train.labels is None and len(train) == 2
    write_shard(tmp_path / "a.tar", [*images, ("set/000.cls", b"1")])
    with pytest.raises(UserError, match=r"set/001\.png .* has no label, those before it a"):
        load_data(DataConfig(train=str(tmp_path / "a.tar")))
    write_shard(tmp_path / "a.tar", [*images, ("set/000.cls", b"dog")])
    with pytest.raises(UserError, match=r"set/000\.cls holds b'dog', not the number of a class"):
        load_data(DataConfig(train=str(tmp_path / "a.tar")))


def test_truncated_shard_is_listed(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path, shard_entries(0, 4))
    with tarfile.open(path) as tar:
        third = tar.getmembers()[6]
    path.write_bytes(path.read_bytes()[: third.offset_data + 20])  # within the third image
    train, _ = load_data(DataConfig(train=str(path)))
    assert train.images[:, 0, 0, 0].tolist() == [0, 1]
    assert any("a.tar" in name for name, _ in train.skipped)
    with pytest.raises(UserError, match=r"a\.tar.* cannot be decoded"):
        load_data(DataConfig(train=str(path), strict=True))
    path.write_bytes(b"no tar at all")
    with pytest.raises(UserError, match=r"no images .* in .*a\.tar: shard"):
        load_data(DataConfig(train=str(path)))


def test_folder_of_arrays(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.full((6, 6, 7), i, np.uint8))
    train, _ = load_data(DataConfig(train=str(tmp_path)))
    assert train.images.shape == (3, 7, 6, 6)
    assert train.images[:, 6, 0, 0].tolist() == [0, 1, 2]


def test_folder_of_grey_images(tmp_path, capsys):
    for i in range(2):
        Image.fromarray(np.full((6, 6), 40 + i, np.uint16)).save(tmp_path / f"{i}.png")
    config = DataConfig(train=str(tmp_path), in_chans=1, value_range=(40, 41))
    train, _ = load_data(config)
    assert train.images.shape == (2, 1, 6, 6)
    assert train.images[:, 0, 0, 0].tolist() == [0, 255]
    assert "more than 8 bits have values 40 to 41" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"low < high, got \(41, 40\)"):
        load_data(DataConfig(train=str(tmp_path), value_range=(41, 40)))


def test_all_damaged(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"no image of .* can be decoded, e\.g\. a\.png: no image"):
        load_data(DataConfig(train=str(tmp_path), img_size=8))


def test_hugging_face_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"needs the package datasets: pip install 'mmae_fast\[hf\]'"
    ):
        open_source("hf:owner/name")


def test_hugging_face(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"kind": datasets.ClassLabel(names=["cat", "dog"]), "picture": datasets.Image()}
    )
    images = [encoded(Image.new("RGB", (10, 8), (i, i, i))) for i in range(4)]
    images[2] = b"damaged"
    rows = {"kind": [0, 1, 1, 0], "picture": [{"bytes": raw, "path": None} for raw in images]}
    table = pyarrow.Table.from_pydict(rows, schema=features.arrow_schema)
    (tmp_path / "copy").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "copy" / "train.parquet")
    copy = datasets.load_dataset(str(tmp_path / "copy"), split="train")
    copy.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": copy}).save_to_disk(tmp_path / "parts")
    (tmp_path / "arrows").mkdir()
    arrow = "arrows/train.arrow"
    shutil.copy(next((tmp_path / "one").glob("*.arrow")), tmp_path / arrow)
    for form in ("copy", "one", "parts", "arrows", "copy/train.parquet", arrow):
        train, _ = load_data(DataConfig(train=f"hf:{tmp_path / form}", img_size=8))
        assert train.images[:, 0, 0, 0].tolist() == [0, 1, 3]
        assert train.labels.tolist() == [0, 1, 0] and train.classes == ("cat", "dog")
        assert [name for name, _ in train.skipped] == ["row 2"]
    for form in ("copy", "parts"):
        with pytest.raises(UserError, match="split test"):
            open_source(f"hf:{tmp_path / form}", "test")


def test_hugging_face_larger_than_memory(tmp_path, monkeypatch):
    """Packing holds the rows that are being decoded, not the set; other columns are not read."""
    datasets = pytest.importorskip("datasets")
    import pyarrow

    count, side = 300, 256
    image_bytes = 3 * side * side

    def rows():
        for i in range(count):
            raw = b"P6 %d %d 255\n" % (side, side) + bytes([i % 256]) * image_bytes
            yield {"image": {"bytes": raw, "path": None}, "other": {"bytes": b"no", "path": None}}

    features = datasets.Features({"image": datasets.Image(), "other": datasets.Image()})
    made = datasets.Dataset.from_generator(rows, features, cache_dir=str(tmp_path / "cache"))
    made.save_to_disk(tmp_path / "set")
    del made
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    pool = pyarrow.default_memory_pool()
    before, held = pool.bytes_allocated(), []

    def watched(data, spec):
        held.append(pool.bytes_allocated())
        return decode(data, spec)

    monkeypatch.setattr(reading, "decode", watched)
    tracemalloc.start()
    write_pack(PackConfig(f"hf:{tmp_path / 'set'}", tmp_path / "pack", img_size=4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(held) == count
    assert max(peak, max(held) - before) < count * image_bytes / 4
    pack = open_pack(tmp_path / "pack")
    assert pack.images[:, 0, 0, 0].tolist() == [i % 256 for i in range(count)]
    assert pack.labels is None


@pytest.mark.parametrize("name", ["CIFAR100", "SVHN", "STL10"])
def test_sets_of_torchvision(name, tmp_path, monkeypatch):
    """With the attributes that torchvision's classes have; nothing is downloaded."""
    from torchvision import datasets

    def made(root, download, train=None, split=None):
        data = np.full((4, 3, 6, 6), 9, np.uint8)
        if name == "CIFAR100":
            return types.SimpleNamespace(
                data=data.transpose(0, 2, 3, 1), targets=[0, 1, 1, 0], classes=["a", "b"]
            )
        labels = np.array([-1] * 4 if split == "unlabeled" else [0, 1, 1, 0])
        return types.SimpleNamespace(data=data, labels=labels)

    monkeypatch.setattr(datasets, name, made)
    train, test = load_data(DataConfig(train=name.lower(), cache=tmp_path))
    assert train.images.shape == test.images.shape == (4, 3, 6, 6)
    assert train.labels.tolist() == [0, 1, 1, 0] and len(train.classes) == 2
    if name == "STL10":
        train, test = load_data(DataConfig(train="stl10-unlabelled", cache=tmp_path))
        assert train.labels is None and test.labels is not None


@pytest.mark.filterwarnings("ignore")  # Pillow's, of metadata that make no sense
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "NPY", "16-bit PNG"])
def test_altered_bytes_never_stop_a_run(kind):
    """Whatever is in a picture's file, it is decoded, to the right shape, or skipped."""
    rng = np.random.default_rng(sum(map(ord, kind)))
    noise = rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)
    if kind == "NPY":
        raw = npy(noise)
    elif kind == "16-bit PNG":
        raw = encoded(Image.fromarray(noise[:, :, 0].astype(np.uint16) * 7))
    else:
        raw = encoded(Image.fromarray(noise), kind)
    skipped = 0
    for _ in range(150):
        altered = bytearray(raw)
        for position in rng.integers(0, len(raw), rng.integers(1, 6)):
            altered[min(position, rng.integers(0, 400))] = rng.integers(0, 256)
        try:
            result = decode(bytes(altered[: rng.integers(1, 2 * len(raw))]), RGB8)
        except Undecodable:
            skipped += 1
        except UserError as error:
            assert (kind == "NPY" and "channels" in str(error)) or "type" in str(error)
        else:
            assert result.pixels.shape == (3, 8, 8) and result.pixels.dtype == np.uint8
    assert skipped > 0
