"""Two-branch methods: views, models, training, what is monitored, interruption."""

import colorsys
import dataclasses
import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torchvision.io import write_png

from mmae_fast import losses
from mmae_fast.evaluation.config import VisualizeConfig
from mmae_fast.evaluation.evaluate import visualize
from mmae_fast.training.augment import Batches, augment, generator, jitter_colours, two_views
from mmae_fast.training.checkpoint import latest_checkpoint, load_model
from mmae_fast.training.config import (
    LossConfig,
    ModelConfig,
    PretrainConfig,
    TwoBranchConfig,
    UserError,
)
from mmae_fast.training.data import ImageData
from mmae_fast.training.models import MaskedAutoencoder, TwoBranch, build_model
from mmae_fast.training.runs import read_metrics
from mmae_fast.training.train import Interrupted, pretrain
from mmae_fast.training.watch import view_metrics

CPU = torch.device("cpu")
METHODS = ("barlow_twins", "spectral", "simclr")
MODEL = ModelConfig(patch_size=4, embed_dim=16, depth=1, num_heads=2)
TIMINGS = ("images_per_second", "monitor_share", "data_wait_share", "epoch_data_wait_share")


@pytest.fixture
def data():
    rng = torch.Generator().manual_seed(0)

    def images(count):
        # Blocks of colour: a crop of an image is more like that image than like another.
        coarse = torch.rand(count, 3, 2, 2, generator=rng)
        pixels = torch.nn.functional.interpolate(coarse, (8, 8)) * 255
        return ImageData(pixels.to(torch.uint8), torch.arange(count) % 3, ("a", "b", "c"), "made")

    return images(70), images(40)


@pytest.fixture
def config(tmp_path):
    return PretrainConfig(
        model=MODEL,
        two_branch=TwoBranchConfig(projector_hidden=24, projector_dim=12, jitter=0.2, grey=0.0),
        loss=LossConfig("simclr", temperature=0.5),
        out=tmp_path / "run",
        epochs=3,
        warmup_epochs=1,
        batch_size=16,
        base_lr=1e-2,
        min_crop=0.5,
        log_every=3,
        monitor_every=6,
        save_every=1,
        device="cpu",
    )


class Task:
    def __init__(self, stop_after=None):
        self.stop_after, self.done, self.notes = stop_after, 0, []
        self.lines = []

    def start(self, total, done=0):
        self.done = done

    def advance(self, units=1):
        self.done += units
        if self.done == self.stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    def say(self, note):
        self.notes.append(note)

    def tell(self, line):
        self.lines.append(line)


# --- Views ---------------------------------------------------------------------------------------


def pixels(count=64, size=6):
    # Away from 0 and 1, so that nothing is clamped.
    return 0.4 + 0.2 * torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_without_jitter_colours_stay():
    x = pixels()
    torch.testing.assert_close(jitter_colours(x, generator(CPU, 0), 0.0, 0.0), x)


def test_grey_has_no_colour_and_keeps_its_luminance():
    x = pixels()
    out = jitter_colours(x, generator(CPU, 0), 0.0, 1.0)
    luminance = torch.einsum("c,bchw->bhw", torch.tensor([0.299, 0.587, 0.114]), x)
    for channel in out.unbind(1):
        torch.testing.assert_close(channel, luminance)
    share = (jitter_colours(x, generator(CPU, 0), 0.0, 0.25).std(dim=1) < 1e-5).all(-1).all(-1)
    assert 4 < share.sum() < 32  # 16 expected of 64


def test_jitter_moves_brightness_contrast_saturation_and_hue_within_their_ranges():
    x, strength = pixels(400), 0.25
    out = jitter_colours(x, generator(CPU, 3), strength, 0.0)
    changed = (out - x).abs().amax((1, 2, 3)) > 1e-4
    assert 0.7 < changed.float().mean() < 0.9  # 0.8
    weights = torch.tensor([0.299, 0.587, 0.114])
    before, after = (torch.einsum("c,bchw->bhw", weights, i).flatten(1) for i in (x, out))
    brightness = after.mean(1) / before.mean(1)
    contrast = (after.std(1) / after.mean(1)) / (before.std(1) / before.mean(1))
    for factor in (brightness, contrast):
        assert 0.8 - 1e-3 <= factor.min() < 0.82 and 1.18 < factor.max() <= 1.2 + 1e-3

    def hue(image):
        return torch.tensor([colorsys.rgb_to_yiq(*rgb)[1:] for rgb in image.mean((2, 3)).tolist()])

    a, b = hue(x), hue(out)
    turn = torch.atan2(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0], (a * b).sum(1)) / (2 * math.pi)
    assert 0.04 < turn.abs().max() <= 0.2 * strength + 5e-3
    # Luminance and chroma scale alike but for the saturation.
    scale = (b.norm(dim=1) / a.norm(dim=1)) / (brightness * contrast)
    assert scale.min() > 0.75 and scale.max() < 1.25 and scale.std() > 0.05


def test_views_differ_and_repeat(config, data):
    images, one = data[0].images, torch.ones(3)
    first = two_views(images, 0 * one, one, generator(CPU, 0), config)
    again = two_views(images, 0 * one, one, generator(CPU, 0), config)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape == images.shape and not torch.equal(*first)
    assert first[0].min() >= 0 and first[0].max() <= 1


@pytest.mark.parametrize("channels", [1, 2])
def test_views_of_other_channels_keep_their_colours(config, channels):
    images = torch.randint(0, 256, (5, channels, 8, 8), dtype=torch.uint8)
    one = torch.ones(channels)
    view, _ = two_views(images, 0 * one, one, generator(CPU, 4), config)
    cropped = augment(images.float() / 255, generator(CPU, 4), config.min_crop, config.hflip)
    torch.testing.assert_close(view, cropped)


def test_batches_of_two_branches(config, data):
    batches = Batches(data[0].images, torch.zeros(3), torch.ones(3), config)
    view1, view2 = batches(5)
    assert view1.shape == view2.shape == (16, 3, 8, 8)
    assert torch.equal(batches(5)[1], view2)


# --- Models --------------------------------------------------------------------------------------


def test_encoder_is_that_of_the_masked_autoencoder(config):
    """Same names, same function: the encoder of one can be loaded into the other."""
    two_branch = build_model(config, (8, 8), 3)
    mae = build_model(dataclasses.replace(config, loss=LossConfig("mae")), (8, 8), 3)
    assert isinstance(two_branch, TwoBranch) and isinstance(mae, MaskedAutoencoder)
    names = two_branch.backbone.state_dict().keys()
    two_branch.backbone.load_state_dict({k: mae.state_dict()[k] for k in names})
    images = torch.rand(2, 3, 8, 8)
    for pool in ("cls", "mean"):
        a, b = (model.forward_features(images, pool) for model in (two_branch, mae))
        assert torch.equal(a, b)


@pytest.mark.parametrize("size, stem", [(32, (3, 3)), (96, (7, 7))])
def test_resnet(config, size, stem):
    resnet = dataclasses.replace(config.two_branch, backbone="resnet18")
    model = build_model(dataclasses.replace(config, two_branch=resnet), (size, size), 3)
    assert model.backbone.net.conv1.kernel_size == stem
    small = isinstance(model.backbone.net.maxpool, torch.nn.Identity)
    assert small == (size == 32)
    assert model.forward_features(torch.rand(2, 3, size, size)).shape == (2, 512)
    z1, z2 = model(*torch.rand(2, 2, 3, size, size))
    assert z1.shape == z2.shape == (2, 12)


# --- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_training(config, data, method):
    loss = LossConfig(method, temperature=0.5)
    task = Task()
    config = dataclasses.replace(config, loss=loss, epochs=15, log_every=10, monitor_every=20)
    pretrain(config, data, task)
    records = read_metrics(config.out / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 10, 20, 30, 40, 50, 60]
    assert records[-1]["loss"] < records[1]["loss"] - 0.01
    for record in records[1:]:
        assert record["loss"] == record["two_branch_loss"]
        assert 1 <= record["effective_rank"] <= 16
    monitored = [record for record in records if "monitor_share" in record]
    assert [record["step"] for record in monitored] == [20, 40, 60]
    for record in [records[0], *monitored]:
        for part, width in (("backbone", 16), ("projector", 12)):
            for alpha in (1, 2):
                h, joint, mutual = (
                    record[f"{part}_{name}_{alpha}"]
                    for name in ("entropy", "joint_entropy", "mutual_information")
                )
                assert 0 <= h <= math.log(width) + 1e-6
                assert joint <= math.log(40) + 1e-6
                assert mutual == pytest.approx(2 * h - joint)
            assert record[f"{part}_effective_rank"] == pytest.approx(
                math.exp(record[f"{part}_entropy_1"])
            )
    assert all(0 < record["monitor_share"] < 1 for record in monitored)
    assert "monitoring" in task.notes[1] and "mutual information" in task.notes[1]


def test_the_loss_is_the_one_asked_for(config, data):
    """The first logged loss is that of the initial model on the first batch."""
    torch.manual_seed(config.seed)
    model = build_model(config, (8, 8), 3)
    mean, std = map(torch.tensor, data[0].stats())
    z1, z2 = model(*Batches(data[0].images, mean, std, config)(0))
    expected = {
        "barlow_twins": losses.barlow_twins_loss(z1, z2, lambd=0.1),
        "spectral": losses.spectral_contrastive_loss(z1, z2, mu=2.0),
        "simclr": losses.info_nce_loss(z1, z2, temperature=0.7),
    }
    for method, value in expected.items():
        loss = LossConfig(method, lambd=0.1, mu=2.0, temperature=0.7)
        out = config.out.with_name(method)
        pretrain(
            dataclasses.replace(config, loss=loss, out=out, epochs=0.25, log_every=1), data, Task()
        )
        record = read_metrics(out / "metrics.jsonl")[1]
        assert record["loss"] == pytest.approx(value.item(), rel=1e-5)


def test_monitoring_changes_nothing_else(config, data):
    """Same weights with and without it, BatchNorm's statistics included."""
    pretrain(config, data, Task())
    without = dataclasses.replace(config, out=config.out.with_name("without"), monitor_every=0)
    pretrain(without, data, Task())
    a, b = (
        load_file(latest_checkpoint(run.out) / "model.safetensors") for run in (config, without)
    )
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert not any("joint" in key for r in read_metrics(without.out / "metrics.jsonl") for key in r)


def test_views_alike_share_all_their_information(config, data):
    model = build_model(config, (8, 8), 3)
    view = data[0].images[:40].float() / 255
    same = view_metrics(model, (view, view))
    other = view_metrics(model, (view, view.flip(0)))
    for part in ("backbone", "projector"):
        assert same[f"{part}_mutual_information_1"] > other[f"{part}_mutual_information_1"]
    assert model.training


def test_interrupted_and_resumed_is_bitwise_the_same(config, data):
    whole = dataclasses.replace(config, out=config.out.with_name("whole"))
    pretrain(whole, data, Task())
    for stop_after in (5, 8):
        with pytest.raises(Interrupted, match=f"stopped after step {stop_after}"):
            pretrain(config, data, Task(stop_after))
        config = dataclasses.replace(config, resume=True)
    pretrain(config, data, Task())
    files = []
    for run in (whole.out, config.out):
        records = [
            {k: v for k, v in r.items() if k not in TIMINGS}
            for r in read_metrics(run / "metrics.jsonl")
        ]
        files.append((load_file(latest_checkpoint(run) / "model.safetensors"), records))
    (weights, records), (resumed_weights, resumed_records) = files
    assert all(torch.equal(weights[key], resumed_weights[key]) for key in weights)
    assert records == resumed_records
    model, meta = load_model(config.out, CPU)
    assert isinstance(model, TwoBranch) and meta["step"] == 12
    image = config.out.with_name("images") / "0.png"
    image.parent.mkdir()
    write_png(data[0].images[0], str(image))
    with pytest.raises(UserError, match="holds no masked autoencoder"):
        visualize(VisualizeConfig(config.out, train=str(image.parent), img_size=8))


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(batch_size=1), "two branches need batch_size >= 2, got 1"),
        (dict(accumulate=2), "accumulate must be 1, got 2"),
        (dict(shard=True), "shard is for masked autoencoders"),
        (dict(monitor_every=-1), "monitor_every must be >= 0, got -1"),
        (dict(two_branch=TwoBranchConfig(jitter=-1.0)), "jitter must be >= 0, got -1.0"),
        (dict(two_branch=TwoBranchConfig(grey=1.5)), r"grey must be in \[0, 1\], got 1.5"),
        (dict(two_branch=TwoBranchConfig(projector_dim=0)), "widths must be >= 1, got 512 and 0"),
        (dict(loss=LossConfig("simclr", temperature=0.0)), "temperature must be > 0, got 0.0"),
        (dict(loss=LossConfig("barlow_twins", lambd=-1.0)), "lambd must be > 0, got -1.0"),
        (dict(model=dataclasses.replace(MODEL, patch_size=3)), "patch_size must divide .* 3"),
    ],
)
def test_what_cannot_work(config, data, changes, match):
    with pytest.raises(UserError, match=match):
        pretrain(dataclasses.replace(config, **changes), data, Task())
