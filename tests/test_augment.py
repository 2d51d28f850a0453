"""Order, augmentation and normalisation of batches; batches of several processes."""

import time
from pathlib import Path

import pytest
import torch

from mmae_fast.training import augment as augmentation
from mmae_fast.training.augment import Batches, augment, epoch_order, generator, normalise
from mmae_fast.training.config import LossConfig, ModelConfig, PretrainConfig
from mmae_fast.training.data import ImageData

CPU = torch.device("cpu")


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


# --- Parts of a batch, crops of larger images, collecting ahead ----------------------------------


def random_images(count=24, channels=3, height=12, width=16):
    generator = torch.Generator().manual_seed(0)
    size = (count, channels, height, width)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)


def make_batches(images, method="m_mae", rank=0, world=1, size=None, **changes):
    config = PretrainConfig(
        model=ModelConfig(patch_size=4), loss=LossConfig(method=method), batch_size=8, **changes
    )
    channels = images.shape[1]
    mean, std = torch.full((channels,), 0.4), torch.full((channels,), 0.3)
    return Batches(images, mean, std, config, rank, world, size)


@pytest.mark.parametrize("method", ["m_mae", "simclr"])
@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("size", [None, (8, 12)])
def test_parts_make_up_the_batch_of_one_process(method, world, size):
    images = random_images()
    whole = make_batches(images, method, size=size)
    parts = [make_batches(images, method, rank, world, size) for rank in range(world)]
    for step in (0, 1, 5, 2):  # across an epoch, and back
        expected = whole(step)
        union = [
            torch.cat(tensors) for tensors in zip(*(part(step) for part in parts), strict=True)
        ]
        for ours, theirs in zip(union, expected, strict=True):
            assert torch.equal(ours, theirs)
        # and not because all parts are alike
        assert len({tuple(part(step)[0].flatten().tolist()) for part in parts}) == world


def test_parts_need_a_batch_that_they_divide():
    with pytest.raises(ValueError, match="batch_size 8 is not a multiple of 3 parts"):
        make_batches(random_images(), world=3)


@pytest.mark.parametrize("method", ["m_mae", "barlow_twins"])
def test_batches_are_functions_of_the_step(method):
    images = random_images()
    once = make_batches(images, method)
    expected = {step: once(step) for step in range(7)}
    again = make_batches(images, method)
    for step in (3, 4, 4, 0, 6, 5, 2):  # expected next, repeated, elsewhere
        assert all(map(torch.equal, again(step), expected[step]))
    other = make_batches(images, method, seed=1)
    assert not torch.equal(other(0)[0], expected[0][0])


@pytest.mark.parametrize("part_bytes", [1 << 20, 2000, 1])
def test_collecting_ahead_does_not_change_the_images(tmp_path, monkeypatch, part_bytes):
    """From a file that is mapped, by one or several threads, while the next are collected."""
    monkeypatch.setattr(augmentation, "PART_BYTES", part_bytes)
    images = random_images()
    path = tmp_path / "images.u8"
    images.numpy().tofile(path)
    mapped = torch.from_file(str(path), shared=False, size=images.numel(), dtype=torch.uint8)
    mapped = make_batches(mapped.view_as(images), min_crop=1.0, hflip=False)
    order = torch.cat([epoch_order(24, 0, epoch) for epoch in range(3)])
    for step in range(9):
        expected = normalise(images[order[8 * step :][:8]], mapped.mean, mapped.std)
        assert torch.equal(mapped(step)[0], expected)


def test_failures_of_the_collecting_thread_reach_the_caller():
    batches = make_batches(random_images())

    def fail(chosen, out):
        raise OSError("the disk is gone")

    batches._collect = fail
    with pytest.raises(OSError, match="the disk is gone"):
        batches(0)


def test_crops_of_a_larger_image():
    images = coordinates(2000, size=40)
    out = augment(images, generator(CPU, 0), min_crop=0.2, hflip=False, size=(32, 32))
    assert out.shape == (2000, 2, 32, 32)
    left, width, top, height = crop_boxes(out)
    assert left.min() > -1e-4 and (left + width).max() < 1 + 1e-4
    area = width * height
    assert 0.19 < area.min() < 0.25 and 0.9 < area.max() < 1.001
    assert top.max() > 0.3
    # The crops are those that images of that size have: shares of the image, whatever its pixels.
    small = augment(coordinates(2000), generator(CPU, 0), min_crop=0.2, hflip=False)
    for ours, theirs in zip(crop_boxes(out), crop_boxes(small), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def test_no_crop_of_a_larger_image_is_a_window_of_it():
    images = coordinates(500, size=40)
    out = augment(images, generator(CPU, 0), min_crop=1.0, hflip=False, size=(32, 32))
    left, width, top, height = crop_boxes(out)
    torch.testing.assert_close(width, torch.full((500,), 0.8), rtol=0, atol=1e-4)
    torch.testing.assert_close(height, torch.full((500,), 0.8), rtol=0, atol=1e-4)
    assert left.min() < 0.01 and left.max() > 0.19 and top.min() < 0.01 and top.max() > 0.19


def test_patches_are_those_of_the_crop():
    batches = make_batches(random_images(), size=(8, 12))
    images, noise = batches(0)
    assert images.shape == (8, 3, 8, 12) and noise.shape == (8, 2 * 3)


def test_wait_is_measured():
    batches = make_batches(random_images())
    assert batches.wait_share() == 0
    collect = batches._collect

    def slow(chosen, out):
        time.sleep(0.15)
        collect(chosen, out)

    batches._collect = slow
    batches(0)
    waited = batches.wait_seconds
    assert waited > 0.15
    assert 0.9 < batches.wait_share() <= 1
    time.sleep(0.3)  # a step, during which the next images are collected
    batches(1)
    assert batches.wait_seconds - waited < 0.1
    assert batches.wait_share() < 0.3


@pytest.mark.slow
def test_the_benchmark_of_the_loader_runs(capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)
    from benchmarks import loader

    assert loader.main(["--quick"]) == 0
    assert "crop and flip" in capsys.readouterr().out
    batches = make_batches(random_images(loader.BATCH * 2, 3, 32, 32))
    batches = Batches(batches.images, batches.mean, batches.std, loader.configuration("m_mae"))
    loader.check(batches, batches.images)
    with pytest.raises(loader.measure.WrongResult):
        loader.check(batches, 255 - batches.images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", ["m_mae", "simclr"])
def test_parts_make_up_the_batch_on_a_gpu(method):
    """From pinned memory, and from images on the GPU; while a kernel keeps it busy."""
    images, device = random_images(), torch.device("cuda")
    config = make_batches(images, method).config
    mean = std = torch.full((3,), 0.5, device=device)
    whole = Batches(images.to(device), mean, std, config)
    parts = [Batches(images, mean, std, config, rank, 2) for rank in range(2)]
    busy = torch.rand(4096, 4096, device=device)
    for step in range(12):
        busy = torch.nn.functional.normalize(busy @ busy)
        found = [part(step) for part in parts]
        for i, expected in enumerate(whole(step)):
            torch.testing.assert_close(torch.cat([part[i] for part in found]), expected)
