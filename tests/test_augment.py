"""Order, augmentation and normalisation of batches; batches of several processes."""

import torch

from mmae_fast.augment import Batches, augment, epoch_order, generator, normalise
from mmae_fast.config import ModelConfig, PretrainConfig
from mmae_fast.data import ImageData

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
