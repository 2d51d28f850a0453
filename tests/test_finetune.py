"""Fine-tuning: groups and schedule as published, learning, and resuming bit for bit."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from mmae_fast.evaluation.classifier import (
    LabelledBatches,
    build_classifier,
    build_optimizer,
    build_schedule,
    seed_all,
    smooth,
)
from mmae_fast.evaluation.config import FINETUNE_RECIPES, ExportConfig, FinetuneConfig, ProbeConfig
from mmae_fast.evaluation.evaluate import open_run, probe
from mmae_fast.evaluation.export import encoder_options, export
from mmae_fast.evaluation.finetune import finetune
from mmae_fast.training.augment import epoch_order, normalise
from mmae_fast.training.checkpoint import find_weights, save_checkpoint
from mmae_fast.training.config import DataConfig, ModelConfig, PretrainConfig, UserError, to_dict
from mmae_fast.training.data import load_data
from mmae_fast.training.launch import World
from mmae_fast.training.models import MaskedAutoencoder, VisionTransformer, build_model
from mmae_fast.training.runs import read_metrics
from mmae_fast.training.train import Interrupted

ALONE = World(torch.device("cpu"))
pytest.importorskip("sklearn")
ROOT = Path(__file__).parent.parent
MODEL = ModelConfig(
    patch_size=2,
    embed_dim=32,
    depth=2,
    num_heads=2,
    decoder_embed_dim=8,
    decoder_depth=1,
    decoder_num_heads=2,
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A run folder of an untrained model of the digits."""
    folder = tmp_path_factory.mktemp("encoder") / "run"
    config = PretrainConfig(model=MODEL, data=DataConfig(train="digits"))
    train, _ = load_data(config.data)
    torch.manual_seed(0)
    model = build_model(config, train.img_size, train.in_chans)
    mean, std = train.stats()
    data = {"img_size": list(train.img_size), "in_chans": 1, "mean": mean, "std": std}
    meta = {"config": to_dict(config), "data": data, "step": 1}
    save_checkpoint(folder, 1, {"model": model.state_dict()}, meta, 1, ALONE)
    (folder / "config.json").write_text("{}")
    return folder


def tiny(encoder, out, **changes):
    recipe = FINETUNE_RECIPES["tiny"][1]
    settings = dict(checkpoint=encoder, out=out, device="cpu")
    return dataclasses.replace(recipe, **(settings | changes))


class Task:
    """Stands in for a progress bar; sends a signal after some steps."""

    def __init__(self, stop_after=None):
        self.stop_after, self.done, self.notes = stop_after, 0, []

    def start(self, total, done=0):
        self.total, self.done = total, done

    def advance(self, units=1):
        self.done += units
        if self.done == self.stop_after:
            signal.raise_signal(signal.SIGINT)

    def say(self, note):
        self.notes.append(note)


def classifier(pool="avg", **options):
    torch.manual_seed(0)
    model = VisionTransformer(8, 2, 1, 32, 3, 2)
    model.initialise()
    given = encoder_options(model) | {"num_classes": 5, "global_pool": pool}
    return model, build_classifier(model, given | options)


# --- The published recipe ------------------------------------------------------------------------


def published_layer(name, blocks):
    """Layer of a weight by the rule of the published code: 0 below the blocks, blocks + 1 above."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    if name.startswith("norm."):  # timm's rule; the published classifier has no such norm
        return blocks
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else blocks + 1


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_groups_of_layer_decay(pool):
    _, model = classifier(pool)
    config = FinetuneConfig(Path(), layer_decay=0.5, base_lr=1e-3, batch_size=512)
    optimizer = build_optimizer(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen[names[id(parameter)]] = group
    assert set(seen) == set(names.values())
    for name, group in seen.items():
        assert group["lr_scale"] == 0.5 ** (4 - published_layer(name, 3)), name
        assert group["lr"] == pytest.approx(2e-3 * group["lr_scale"])
        vector = dict(model.named_parameters())[name].ndim == 1
        plain = vector or name in ("cls_token", "pos_embed")
        assert group["weight_decay"] == (0.0 if plain else 0.05), name
    assert (
        seen["head.weight"]["lr_scale"] == 1 and seen["patch_embed.proj.bias"]["lr_scale"] == 1 / 16
    )


def test_schedule_is_the_published_one():
    import math

    _, model = classifier()
    config = FinetuneConfig(Path(), layer_decay=0.5, base_lr=1e-3, batch_size=256)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, 10, 110)
    for step in (0, 1, 5, 9, 10, 11, 60, 109):
        schedule.step_update(step)
        if step < 10:
            expected = 1e-3 * step / 10
        else:
            expected = 1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (step - 10) / 100))
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected * group["lr_scale"], abs=1e-12), step


def test_recipes_are_the_published_ones():
    base, large = (FINETUNE_RECIPES[name][1] for name in ("vit-b", "vit-l"))
    expected = dict(epochs=100, base_lr=5e-4, layer_decay=0.65, drop_path=0.1, mixup=0.8)
    expected |= dict(cutmix=1.0, erasing=0.25, smoothing=0.1, weight_decay=0.05)
    assert {key: getattr(base, key) for key in expected} == expected
    changed = dict(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2)
    assert large == dataclasses.replace(base, **changed)


def test_classifier_starts_from_the_encoder():
    encoder, model = classifier("token")
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        features = model.eval().forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(features, encoder.forward_features(images), rtol=1e-5, atol=1e-5)
        assert model(images).abs().max() < 1e-2  # a head of almost nothing
    encoder, model = classifier("avg")
    assert isinstance(model.norm, torch.nn.Identity)
    assert torch.equal(model.blocks[2].mlp.fc1.weight, encoder.blocks[2].mlp.fc1.weight)
    assert (model.fc_norm.weight == 1).all()


def test_batches_without_augmentation_are_the_images(encoder):
    source = open_run(FinetuneConfig(encoder, device="cpu"))
    plain = dict(min_crop=1.0, hflip=False, batch_size=100)
    images, targets = LabelledBatches(source, tiny(encoder, Path(), **plain))(2)
    order = epoch_order(len(source.train), 0, 0)[200:300]
    expected = normalise(source.train.images[order], source.mean, source.std)
    torch.testing.assert_close(images, expected)
    assert torch.equal(targets.argmax(1), source.train.labels[order])
    # Each augmentation is a function of the seed and the step, and does something.
    for changes in (dict(rand_augment=9), dict(erasing=0.9), dict(mixup=0.8), dict(cutmix=20)):
        batches = LabelledBatches(source, tiny(encoder, Path(), **plain | changes))
        drawn = []
        for _ in range(2):
            seed_all(0, 3)
            drawn.append(batches(2))
        assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True)), changes
        assert not torch.equal(drawn[0][0], images), changes
        torch.testing.assert_close(drawn[0][1].sum(1), torch.ones(100))


def test_smooth_labels():
    target = smooth(torch.tensor([2, 0]), 4, 0.2)
    expected = torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]])
    torch.testing.assert_close(target, expected)


# --- Training ------------------------------------------------------------------------------------


def test_it_learns_the_digits(encoder, tmp_path):
    # The encoder is untrained: its layers have as much to learn as the head.
    config = tiny(encoder, tmp_path / "ft", epochs=12, layer_decay=1.0, min_crop=1.0)
    accuracy, protocol = finetune(config, Task())
    assert accuracy > 0.85  # chance: 0.1
    assert "12 epochs" in protocol and "layer decay 1," in protocol
    records = read_metrics(tmp_path / "ft" / "metrics.jsonl")
    assert [record["epoch"] for record in records] == list(range(1, 13))
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["accuracy"] == accuracy
    for folder in (tmp_path / "ft", encoder):
        assert json.loads((folder / "finetune.json").read_text())["accuracy"] == accuracy


FULL = dict(
    epochs=3,
    warmup_epochs=1,
    batch_size=256,
    drop_path=0.2,
    mixup=0.8,
    cutmix=1.0,
    erasing=0.5,
    clip_grad=1.0,
    hflip=True,
)


PLAIN = dict(mixup=0.0, cutmix=0.0, pool="cls")


@pytest.mark.parametrize(
    "changes, stop_after",
    [(dict(ema=0.9), 4), (dict(ema=0.9), 5), (dict(rand_augment=9), 7), (PLAIN, 7)],
)
def test_resume_is_bitwise(encoder, tmp_path, changes, stop_after):
    """Stopped within an epoch, at its end, and after it: the same weights and metrics."""
    config = tiny(encoder, tmp_path / "whole", **(FULL | changes))
    whole = finetune(config, Task())
    config = dataclasses.replace(config, out=tmp_path / "parts")
    with pytest.raises(Interrupted):
        finetune(config, Task(stop_after))
    torch.rand(3)  # whatever happens in between
    assert finetune(dataclasses.replace(config, resume=True), Task()) == whole
    expected, actual = (load_file(find_weights(tmp_path / run)) for run in ("whole", "parts"))
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    for first, second in zip(
        *(read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "parts")),
        strict=True,
    ):
        first.pop("images_per_second"), second.pop("images_per_second")
        assert first == second


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(encoder, tmp_path):
    """Every part of the published recipe, stopped and resumed; the LARS probe beside it."""
    on_gpu = dict(device="cuda", precision="bf16", rand_augment=9, ema=0.9)
    config = tiny(encoder, tmp_path / "gpu", **FULL | on_gpu)
    with pytest.raises(Interrupted):
        finetune(config, Task(7))
    finetune(dataclasses.replace(config, resume=True), Task())
    records = read_metrics(config.out / "metrics.jsonl")
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert all(0 < record["loss"] < 2.4 for record in records)  # log 10 is 2.303
    lars = ProbeConfig(encoder, protocol="lars", augment=True, epochs=12, device="cuda")
    assert 0 <= probe(lars)[0] <= 1


def test_another_seed_is_another_run(encoder, tmp_path):
    short = dict(epochs=1, warmup_epochs=0)
    finetune(tiny(encoder, tmp_path / "a", **short), Task())
    finetune(tiny(encoder, tmp_path / "b", **short, seed=1), Task())
    first, second = (load_file(find_weights(tmp_path / run)) for run in "ab")
    assert not torch.equal(first["blocks.0.mlp.fc1.weight"], second["blocks.0.mlp.fc1.weight"])


def test_average_of_the_weights(encoder, tmp_path):
    """What is saved and scored is the average, which lags behind the weights."""
    short = dict(epochs=2, warmup_epochs=0)
    finetune(tiny(encoder, tmp_path / "raw", **short), Task())
    finetune(tiny(encoder, tmp_path / "mean", **short, ema=0.99), Task())
    start = load_file(find_weights(encoder))["blocks.0.mlp.fc1.weight"]
    raw, mean = (
        load_file(find_weights(tmp_path / run))["blocks.0.mlp.fc1.weight"]
        for run in ("raw", "mean")
    )
    assert 0 < (mean - start).norm() < 0.5 * (raw - start).norm()


def test_timm_loads_the_classifier(encoder, tmp_path):
    config = tiny(encoder, tmp_path / "ft", epochs=1, warmup_epochs=0)
    accuracy, _ = finetune(config, Task())
    names = {}
    exec(export(ExportConfig(tmp_path / "ft", tmp_path / "out")), names)
    model = names["model"].eval()
    _, test = load_data(DataConfig(train="digits"))
    mean, std = load_data(DataConfig(train="digits"))[0].stats()
    with torch.no_grad():
        predicted = model((test.images / 255 - mean[0]) / std[0]).argmax(dim=1)
    assert (predicted == test.labels).float().mean().item() == pytest.approx(accuracy)
    assert isinstance(model, timm.models.VisionTransformer)
    with pytest.raises(UserError, match="ViTMAE has no place for its head"):
        export(ExportConfig(tmp_path / "ft", tmp_path / "hf", "hf"))


def test_two_processes_train_as_one(encoder, tmp_path):
    """Crops, loss and gradients are those of the whole batch, and so is the accuracy."""
    config = tiny(encoder, tmp_path / "one", epochs=2, warmup_epochs=1, batch_size=128)
    finetune(config, Task())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "mmae_fast.cli", "finetune", str(encoder), "--out", str(tmp_path / "two")]
    command += ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "128", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Classifier: ") == 1  # one of the two speaks
    one, two = (read_metrics(tmp_path / out / "metrics.jsonl") for out in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["accuracy"] == pytest.approx(a["accuracy"], abs=1.5 / 359)  # a tie, or none
    a, b = (load_file(find_weights(tmp_path / out)) for out in ("one", "two"))
    torch.testing.assert_close(a["head.weight"], b["head.weight"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(epochs=0), "epochs must be >= 1, got 0"),
        (dict(warmup_epochs=30), r"warmup_epochs must be in \[0, 30\), got 30"),
        (dict(layer_decay=1.5), r"layer_decay must be in \(0, 1\], got 1.5"),
        (dict(drop_path=1.0), r"drop_path must be in \[0, 1\), got 1.0"),
        (dict(mixup=-0.1), "mixup must be >= 0, got -0.1"),
        (dict(rand_augment=31), r"rand_augment must be in \[0, 30\], got 31"),
        (dict(ema=1.0), r"ema must be in \(0, 1\), got 1.0"),
        (
            dict(mixup=0.8, batch_size=33),
            "batch_size 33 cannot be shared by 1 process; mixup and cutmix need even",
        ),
        (dict(batch_size=4096), "batch_size 4096 exceeds the 1438 training images"),
        (dict(img_size=32), "32"),
        (dict(train="nowhere"), "no images at 'nowhere'"),
    ],
)
def test_settings_that_cannot_be_meant(encoder, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        finetune(tiny(encoder, tmp_path / "ft", **changes), Task())
    assert not (tmp_path / "ft").exists()


def test_a_folder_in_use_and_other_settings(encoder, tmp_path):
    config = tiny(encoder, tmp_path / "ft", epochs=1, warmup_epochs=0)
    finetune(config, Task())
    with pytest.raises(UserError, match="already holds a run"):
        finetune(config, Task())
    with pytest.raises(UserError, match="cannot be resumed with other settings: base_lr"):
        finetune(dataclasses.replace(config, resume=True, base_lr=1.0), Task())


def test_photos_for_a_model_of_small_grey_images(encoder, tmp_path):
    """They are decoded as the model takes them, unless another size is asked for."""
    from torchvision.io import write_png

    for split, label in itertools.product(("train", "val"), ("a", "b")):
        (tmp_path / split / label).mkdir(parents=True)
        for i in range(3):
            pixels = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
            write_png(pixels, str(tmp_path / split / label / f"{i}.png"))
    config = FinetuneConfig(encoder, str(tmp_path), device="cpu")
    run = open_run(config)
    assert run.train.images.shape == (6, 1, 8, 8)
    assert run.model.patch_embed.grid_size == (4, 4)
    run = open_run(dataclasses.replace(config, img_size=(8, 12)))
    assert run.test.images.shape == (6, 1, 8, 12)
    assert run.model.patch_embed.grid_size == (4, 6)
    with pytest.raises(UserError, match="patch_size must divide the image size, got 2 for 9x9"):
        open_run(dataclasses.replace(config, img_size=9))


def test_only_vision_transformers(tmp_path):
    from mmae_fast.training.config import LossConfig, TwoBranchConfig

    pytest.importorskip("torchvision")
    config = PretrainConfig(
        model=MODEL,
        data=DataConfig(train="digits"),
        loss=LossConfig(method="simclr"),
        two_branch=TwoBranchConfig(backbone="resnet18"),
    )
    data = {"img_size": [8, 8], "in_chans": 1, "mean": [0.3], "std": [0.3]}
    meta = {"config": to_dict(config), "data": data, "step": 1}
    save_checkpoint(
        tmp_path / "run", 1, {"model": build_model(config, (8, 8), 1).state_dict()}, meta, 1, ALONE
    )
    with pytest.raises(UserError, match=r"only vision transformers .* got ResNet"):
        finetune(tiny(tmp_path / "run", tmp_path / "ft"), Task())


def test_a_masked_autoencoder_loses_its_decoder():
    torch.manual_seed(0)
    model = MaskedAutoencoder(8, 2, 1, 32, 1, 2, 16, 1, 2)
    given = encoder_options(model) | {"num_classes": 3, "global_pool": "token"}
    names = set(build_classifier(model, given).state_dict())
    assert not [name for name in names if "decoder" in name]
