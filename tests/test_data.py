"""Built-in sets, packed JPEGs and folders, in memory, and their errors."""

import dataclasses
import gzip
import hashlib
import socket

import numpy as np
import pytest
import torch
from torchvision.io import encode_jpeg, write_jpeg, write_png

from mmae_fast.training.config import DataConfig, UserError
from mmae_fast.training.data import (
    ImageData,
    Unavailable,
    builtin,
    load_data,
    load_demo_data,
    reading,
    save_skipped,
)

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


# --- Fashion-MNIST -------------------------------------------------------------------------------


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A folder of small files in the format of Fashion-MNIST, and their checksums in place."""
    rng, sums = np.random.default_rng(0), {}
    for prefix, count in (("train", 6), ("t10k", 3)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            raw = header + array.tobytes()
            (tmp_path / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(raw))
            sums[f"{prefix}-{name}-ubyte"] = hashlib.sha256(raw).hexdigest()
            if prefix == "train" and array.ndim == 3:
                expected = images
    monkeypatch.setattr(builtin, "FASHION_DEBIAN", tmp_path)
    monkeypatch.setattr(builtin, "FASHION_SHA256", sums)
    return tmp_path, expected


def test_fashion_mnist(fashion):
    folder, expected = fashion
    train, test = load_data(DataConfig())
    assert torch.equal(train.images, torch.from_numpy(expected).unsqueeze(1))
    assert test.images.shape == (3, 1, 28, 28)
    assert len(train.labels) == 6 and train.labels.dtype == torch.int64
    assert str(folder) in train.origin and "SHA-256 verified" in train.origin


def test_real_fashion_mnist():
    if not builtin.FASHION_DEBIAN.is_dir():
        pytest.skip("Debian package dataset-fashion-mnist is not installed")
    train, test = load_data(DataConfig())
    assert (len(train), len(test)) == (60_000, 10_000)
    assert torch.bincount(train.labels).tolist() == [6000] * 10
    mean, std = train.stats()
    # The constants known to everyone who trained on this set.
    assert mean == pytest.approx([0.2860], abs=5e-5)
    assert std == pytest.approx([0.3530], abs=5e-5)


@pytest.mark.parametrize("cut", [20, 100])
def test_truncated_file_is_named(fashion, cut):
    path = fashion[0] / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        load_data(DataConfig())


def test_file_that_is_no_gzip_is_named(fashion):
    (fashion[0] / "t10k-labels-idx1-ubyte.gz").write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz is damaged"):
        load_data(DataConfig())


def test_altered_file_is_named(fashion):
    path = fashion[0] / "train-labels-idx1-ubyte.gz"
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[-1] ^= 1
    path.write_bytes(gzip.compress(bytes(raw)))
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte\.gz is not the published file"):
        load_data(DataConfig())


def test_missing_file_is_named(fashion):
    (fashion[0] / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte\.gz is missing"):
        load_data(DataConfig())


@pytest.fixture
def no_fashion(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(builtin, "FASHION_DEBIAN", tmp_path / "absent")
    monkeypatch.setattr(socket, "create_connection", refuse)
    return tmp_path / "cache"


def test_no_fashion_mnist_says_what_to_do(no_fashion):
    with pytest.raises(Unavailable, match="apt-get install dataset-fashion-mnist"):
        load_data(DataConfig(cache=no_fashion))


def test_demo_falls_back_to_digits_and_says_so(no_fashion):
    name, train, _, failed = load_demo_data("auto", no_fashion)
    assert name == "digits" and train.img_size == (8, 8)
    assert "Fashion-MNIST is not installed" in failed


def test_demo_does_not_hide_a_damaged_file(fashion):
    (fashion[0] / "t10k-labels-idx1-ubyte.gz").write_bytes(b"half a download")
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz is damaged"):
        load_demo_data("auto", fashion[0])


def test_demo_takes_fashion_mnist_where_it_is(fashion):
    name, _, _, failed = load_demo_data("auto", fashion[0])
    assert (name, failed) == ("fashion-mnist", "")


# --- Digits, packed arrays, folders --------------------------------------------------------------


def test_digits():
    train, test = load_data(DataConfig(train="digits"))
    assert len(train) + len(test) == 1797
    assert train.images.shape[1:] == (1, 8, 8)
    assert int(train.images.max()) == 255
    assert set(test.labels.tolist()) == set(range(10))


def packed(path, count=5, size=16, **changes):
    jpegs = [
        encode_jpeg(torch.full((3, size, size), 20 * i, dtype=torch.uint8)) for i in range(count)
    ]
    content = {
        "jpeg": torch.cat(jpegs).numpy(),
        "offset": np.cumsum([0] + [len(jpeg) for jpeg in jpegs]),
        "label": np.arange(count) % 2,
        "classes": np.array(["cat", "dog"]),
    }
    np.savez(path, **{k: v for k, v in (content | changes).items() if v is not None})
    return path


def test_packed(tmp_path):
    train, test = load_data(DataConfig(train=str(packed(tmp_path / "a.npz"))))
    assert test is None
    assert train.images.shape == (5, 3, 16, 16)
    assert train.images[3].float().mean() == pytest.approx(60, abs=2)
    assert train.labels.tolist() == [0, 1, 0, 1, 0]
    assert train.classes == ("cat", "dog")


def test_packed_errors(tmp_path):
    path = packed(tmp_path / "cut.npz")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"cut\.npz is damaged"):
        load_data(DataConfig(train=str(path)))
    path = packed(tmp_path / "b.npz", label=None)
    with pytest.raises(UserError, match=r"b\.npz lacks label"):
        load_data(DataConfig(train=str(path)))
    path = packed(tmp_path / "c.npz", label=np.zeros(4))
    with pytest.raises(UserError, match=r"c\.npz is inconsistent: 5 images, 4 labels"):
        load_data(DataConfig(train=str(path)))
    path = packed(tmp_path / "d.npz", jpeg=np.zeros(5, np.uint8), offset=np.arange(6))
    with pytest.raises(UserError, match=r"no image of .*d\.npz can be decoded, .*d\.npz, image 0"):
        load_data(DataConfig(train=str(path)))


def image_folder(root, names=("ant", "bee"), count=2):
    for level, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            image = torch.full((3, 20, 30), 50 + 100 * level, dtype=torch.uint8)
            write_png(image, str(root / name / f"{i}.png"))
    return root


def test_folder(tmp_path):
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "val", count=1)
    for source in (tmp_path, tmp_path / "train"):
        train, test = load_data(DataConfig(train=str(source), img_size=16))
        assert train.images.shape == (4, 3, 16, 16)
        assert train.labels.tolist() == [0, 0, 1, 1]
        assert train.classes == ("ant", "bee")
        assert train.images[2].unique().tolist() == [150]
        assert test.labels.tolist() == [0, 1]


def test_folder_without_classes(tmp_path):
    for i in range(3):
        write_jpeg(torch.zeros(3, 9, 9, dtype=torch.uint8), str(tmp_path / f"{i}.JPG"))
    train, test = load_data(DataConfig(train=str(tmp_path), img_size=8))
    assert len(train) == 3 and train.labels is None and test is None


def test_folder_crops_the_centre(tmp_path):
    image = torch.zeros(3, 8, 24, dtype=torch.uint8)
    image[:, :, 8:16] = 200
    write_png(image, str(tmp_path / "wide.png"))
    train, _ = load_data(DataConfig(train=str(tmp_path), img_size=8))
    assert train.images.unique().tolist() == [200]


def test_folder_errors(tmp_path):
    image_folder(tmp_path / "set")
    (tmp_path / "set" / "empty").mkdir()
    with pytest.raises(UserError, match=r"no images .* in .*empty"):
        load_data(DataConfig(train=str(tmp_path / "set"), img_size=8))
    (tmp_path / "set" / "stray.png").touch()
    with pytest.raises(UserError, match=r"subfolders, .* images beside them, e\.g\. stray\.png"):
        load_data(DataConfig(train=str(tmp_path / "set"), img_size=8))


def test_folder_of_one_size_needs_none_given(tmp_path):
    image_folder(tmp_path / "set")
    train, _ = load_data(DataConfig(train=str(tmp_path / "set")))
    assert train.images.shape == (4, 3, 20, 30)
    write_png(torch.zeros(3, 9, 9, dtype=torch.uint8), str(tmp_path / "set" / "bee" / "odd.png"))
    with pytest.raises(UserError, match=r"bee/odd\.png .* is 9x9 where the first image is 20x30"):
        load_data(DataConfig(train=str(tmp_path / "set")))


def test_damaged_files_are_skipped_and_listed(tmp_path, capsys):
    image_folder(tmp_path / "set")
    broken = tmp_path / "set" / "ant" / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 not a picture")
    whole = (tmp_path / "set" / "bee" / "1.png").read_bytes()
    (tmp_path / "set" / "bee" / "half.png").write_bytes(whole[: len(whole) // 2])
    config = DataConfig(train=str(tmp_path / "set"), img_size=(8, 12))
    train, _ = load_data(config)
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert train.images[:, 0, 0, 0].tolist() == [50, 50, 150, 150]
    assert [name for name, _ in train.skipped] == ["ant/broken.jpg", "bee/half.png"]
    assert capsys.readouterr().out.startswith("Skipped 2 of 6 images of ")
    save_skipped(tmp_path, train, None)
    lines = (tmp_path / "skipped.txt").read_text().splitlines()
    assert len(lines) == 2 and lines[0].startswith("ant/broken.jpg\tno image of a known")
    with pytest.raises(UserError, match=r"ant/broken\.jpg cannot be decoded: no image"):
        load_data(dataclasses.replace(config, strict=True))


def test_files_that_cannot_be_read_are_not_skipped(tmp_path):
    """A disk that fails would empty the set."""
    image_folder(tmp_path / "set")
    (tmp_path / "set" / "bee" / "7.png").symlink_to(tmp_path / "unmounted")
    (tmp_path / "set" / "ant" / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"7\.png cannot be read: .*No such file"):
        load_data(DataConfig(train=str(tmp_path / "set"), img_size=8))
    (tmp_path / "set" / "bee" / "7.png").unlink()
    with pytest.raises(UserError, match=r"ant/folder\.png .* cannot be read: .*Is a directory"):
        load_data(DataConfig(train=str(tmp_path / "set"), img_size=8))


def test_impossible_settings(tmp_path):
    image_folder(tmp_path / "set")
    for changes in ({"in_chans": 0}, {"img_size": 0}, {"img_size": (8, -1)}):
        with pytest.raises(UserError, match="must be positive, got"):
            load_data(DataConfig(train=str(tmp_path / "set"), **changes))


def test_labels_of_both_parts_mean_the_same(tmp_path):
    image_folder(tmp_path / "all", ("ant", "bee", "cow"))
    image_folder(tmp_path / "fewer", ("ant", "bee"))
    image_folder(tmp_path / "other", ("ant", "cow"))
    (tmp_path / "none").mkdir()
    write_png(torch.zeros(3, 20, 30, dtype=torch.uint8), str(tmp_path / "none" / "0.png"))

    def load(train, test):
        return load_data(DataConfig(train=str(tmp_path / train), test=str(tmp_path / test)))

    assert load("all", "fewer")[1].labels.tolist() == [0, 0, 1, 1]
    for train, test in (("all", "other"), ("fewer", "all")):
        with pytest.raises(UserError, match="differ in their classes"):
            load(train, test)
    train, test = load("none", "all")  # unlabelled training images
    assert train.labels is None and len(test.labels) == 6


def test_label_beyond_the_classes(tmp_path):
    path = packed(tmp_path / "a.npz", label=np.array([0, 1, 2, 0, 1]))
    with pytest.raises(UserError, match=r"image 2 .* has label 2, there are 2 classes"):
        load_data(DataConfig(train=str(path)))


def test_images_that_do_not_fit_into_memory(tmp_path, monkeypatch):
    image_folder(tmp_path / "set")
    monkeypatch.setattr(reading, "free_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"mmae data pack .*set DIR --img-size 16 24"):
        load_data(DataConfig(train=str(tmp_path / "set"), img_size=(16, 24)))
    monkeypatch.setattr(reading, "free_memory", lambda: 6000)  # 4,608 bytes of images
    load_data(DataConfig(train=str(tmp_path / "set"), img_size=(16, 24)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of which each process decodes its own
    with pytest.raises(UserError, match="mmae data pack"):
        load_data(DataConfig(train=str(tmp_path / "set"), img_size=(16, 24)))


def test_sources_that_do_not_exist_or_fit(tmp_path):
    with pytest.raises(UserError, match=r"no images at 'cifar': neither .*cifar10, .* nor"):
        load_data(DataConfig(train="cifar"))
    with pytest.raises(UserError, match=r"neither a folder nor a \.tar"):
        (tmp_path / "x.txt").touch()
        load_data(DataConfig(train=str(tmp_path / "x.txt")))
    with pytest.raises(UserError, match="8x8 with 1 channel, asked for were 224 pixels"):
        load_data(DataConfig(train="digits", img_size=224))
    small = packed(tmp_path / "small.npz", size=8)
    with pytest.raises(UserError, match="training images are 8x8 with 1 channel, test images are"):
        load_data(DataConfig(train="digits", test=str(small)))
    other = packed(tmp_path / "other.npz", size=8, classes=np.array(["cat", "cow"]))
    with pytest.raises(UserError, match="differ in their classes"):
        load_data(DataConfig(train=str(small), test=str(other)))


def test_stats():
    images = torch.randint(0, 256, (50, 3, 6, 6), dtype=torch.uint8)
    images[:, 2] = 7
    mean, std = ImageData(images, None, (), "").stats()
    pixels = images.double() / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert std[:2] == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist()[:2])
    assert std[2] == pytest.approx(1 / 255)  # a constant channel must not divide by zero
