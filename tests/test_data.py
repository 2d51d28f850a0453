"""Image sources, their errors, and the augmentation."""

import gzip
import hashlib
import socket

import numpy as np
import pytest
import torch
from torchvision.io import encode_jpeg, write_jpeg, write_png

from mmae_fast import data
from mmae_fast.augment import Batches, augment, epoch_order, generator, normalise
from mmae_fast.config import DataConfig, ModelConfig, PretrainConfig, UserError
from mmae_fast.data import ImageData, Unavailable, load_data, load_demo_data

CPU = torch.device("cpu")
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
    monkeypatch.setattr(data, "FASHION_DEBIAN", tmp_path)
    monkeypatch.setattr(data, "FASHION_SHA256", sums)
    return tmp_path, expected


def test_fashion_mnist(fashion):
    folder, expected = fashion
    train, test = load_data(DataConfig())
    assert torch.equal(train.images, torch.from_numpy(expected).unsqueeze(1))
    assert test.images.shape == (3, 1, 28, 28)
    assert len(train.labels) == 6 and train.labels.dtype == torch.int64
    assert str(folder) in train.origin and "SHA-256 verified" in train.origin


def test_real_fashion_mnist():
    if not data.FASHION_DEBIAN.is_dir():
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

    monkeypatch.setattr(data, "FASHION_DEBIAN", tmp_path / "absent")
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
    with pytest.raises(UserError, match=r"d\.npz, image 0 cannot be decoded"):
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
    with pytest.raises(UserError, match=r"--data\.img-size is needed"):
        load_data(DataConfig(train=str(tmp_path / "set")))
    (tmp_path / "set" / "bee" / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises(UserError, match=r"broken\.jpg cannot be decoded"):
        load_data(DataConfig(train=str(tmp_path / "set"), img_size=8))
    (tmp_path / "set" / "empty").mkdir()
    with pytest.raises(UserError, match=r"no images .* in .*empty"):
        load_data(DataConfig(train=str(tmp_path / "set"), img_size=8))


def test_sources_that_do_not_exist_or_fit(tmp_path):
    with pytest.raises(UserError, match=r"no images at 'cifar': neither .*, cifar10, .* nor"):
        load_data(DataConfig(train="cifar"))
    with pytest.raises(UserError, match="neither a folder nor a packed"):
        (tmp_path / "x.txt").touch()
        load_data(DataConfig(train=str(tmp_path / "x.txt")))
    with pytest.raises(UserError, match="digits has images of 8x8 with 1 channel"):
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


# --- Augmentation and order ----------------------------------------------------------------------


def coordinates(count, size=32):
    """Images whose pixel values are their own x and y, in [0, 1], linear up to the border."""
    line = (torch.arange(size) + 0.5) / size
    grid = torch.stack([line.expand(size, size), line.unsqueeze(1).expand(size, size)])
    return grid.expand(count, -1, -1, -1).contiguous()


def crop_boxes(out):
    """Left, width (signed), top and height of each crop, recovered from the coordinates."""
    size = out.shape[-1]
    middle, quarter = slice(size // 4, 3 * size // 4), size // 2
    x, y = out[:, 0].mean(1)[:, middle], out[:, 1].mean(2)[:, middle]
    width, height = ((line[:, -1] - line[:, 0]) * size / (quarter - 1) for line in (x, y))
    return x.mean(1) - width / 2, width, y.mean(1) - height / 2, height


def test_crop_has_the_distribution_of_torchvision():
    from torchvision.transforms.v2 import RandomResizedCrop

    count = 4000
    out = augment(coordinates(count), generator(CPU, 0), min_crop=0.2, hflip=False)
    left, width, top, height = crop_boxes(out)
    assert left.min() > -1e-4 and (left + width).max() < 1 + 1e-4
    assert top.min() > -1e-4 and (top + height).max() < 1 + 1e-4

    torch.manual_seed(0)
    crop = RandomResizedCrop(1000, (0.2, 1.0))
    image = torch.empty(1, 1000, 1000)
    draws = [crop.make_params([image]) for _ in range(count)]
    theirs = torch.tensor([[d["width"], d["height"], d["left"], d["top"]] for d in draws]) / 1000
    ours = torch.stack([width, height, left, top], dim=1)
    # Means and deviations of both samples agree to 5 standard errors of either.
    for a, b in ((ours, theirs), (ours[:, :2].prod(1), theirs[:, :2].prod(1))):
        error = 5 * b.std(0) / count**0.5
        assert ((a.mean(0) - b.mean(0)).abs() < error).all()
        assert ((a.std(0) - b.std(0)).abs() < error).all()


def test_flip():
    images = coordinates(2000)
    out = augment(images, generator(CPU, 1), min_crop=1.0, hflip=True)
    flipped = out[:, 0, 0, 0] > 0.5
    assert 0.45 < flipped.float().mean() < 0.55
    torch.testing.assert_close(out[~flipped], images[~flipped])
    torch.testing.assert_close(out[flipped], images[flipped].flip(3))


def test_augmentation_off_is_the_identity():
    images = torch.rand(3, 1, 8, 8)
    assert augment(images, generator(CPU, 1), min_crop=1.0, hflip=False) is images


def test_augmentation_of_oblong_images():
    images = torch.rand(4, 3, 16, 40)
    out = augment(images, generator(CPU, 0))
    assert out.shape == images.shape
    assert out.min() >= images.min() and out.max() <= images.max() + 1e-6


def test_generator_is_a_function_of_its_key():
    def draw(*key):
        return torch.rand(4, generator=generator(CPU, *key)).tolist()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    keys = [(seed, stream, step) for seed in range(3) for stream in range(3) for step in range(3)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_epoch_order():
    orders = [epoch_order(20, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order.tolist()) == list(range(20)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert torch.equal(orders[0], epoch_order(20, 0, 0))


def test_batches_see_every_image_once_per_epoch():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(-1, -1, 2, 2)
    config = PretrainConfig(
        model=ModelConfig(patch_size=1), batch_size=3, min_crop=1.0, hflip=False
    )
    batches = Batches(images, torch.zeros(1), torch.full((1,), 1 / 255), config)
    assert batches.steps_per_epoch == 3
    for epoch in range(2):
        steps = range(3 * epoch, 3 * epoch + 3)
        seen = torch.cat([batches(step)[0][:, 0, 0, 0] for step in steps]).round().long()
        assert len(set(seen.tolist())) == 9
    first, noise = batches(4)
    again, noise_again = Batches(images, batches.mean, batches.std, config)(4)
    assert torch.equal(first, again) and torch.equal(noise, noise_again)
    assert noise.shape == (3, 4)


def test_normalise():
    images = torch.randint(0, 256, (40, 2, 5, 5), dtype=torch.uint8)
    mean, std = map(torch.tensor, ImageData(images, None, (), "").stats())
    out = normalise(images, mean, std)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), torch.ones(2))
