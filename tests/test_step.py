"""One update: skipped where the gradient is not finite, clipped, averaged, the same compiled."""

import copy
import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmae_fast.training import train
from mmae_fast.training.checkpoint import checkpoints, latest_checkpoint, load_model
from mmae_fast.training.config import (
    LossConfig,
    ModelConfig,
    PretrainConfig,
    TwoBranchConfig,
    UserError,
)
from mmae_fast.training.data import ImageData
from mmae_fast.training.launch import World
from mmae_fast.training.models import build_model
from mmae_fast.training.objective import build_objective
from mmae_fast.training.runs import read_metrics
from mmae_fast.training.step import TrainingStep

from .together import Silent

ALONE = World(torch.device("cpu"))
MODEL = ModelConfig(
    patch_size=2,
    embed_dim=16,
    depth=2,
    num_heads=2,
    decoder_embed_dim=8,
    decoder_depth=1,
    decoder_num_heads=2,
)
CONFIG = PretrainConfig(
    model=MODEL,
    two_branch=TwoBranchConfig(projector_hidden=12, projector_dim=8),
    batch_size=8,
    ema=0.9,
    device="cpu",
)


def make(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    torch.manual_seed(0)
    model = build_model(config, (8, 8), 1)
    return TrainingStep(model, build_objective(config.loss, ALONE), config, ALONE)


def batch(step, two_branch=False):
    rng = torch.Generator().manual_seed(step)
    images = torch.randn(8, 1, 8, 8, generator=rng)
    if two_branch:
        return images, images + torch.randn(8, 1, 8, 8, generator=rng)
    return images, torch.rand(8, 16, generator=rng)


def weights(update):
    """Everything but the counters."""
    files = copy.deepcopy(update.tensors())
    del files["training"]["sums"], files["training"]["skipped"]
    return {f"{file} {name}": value for file, part in files.items() for name, value in part.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_update_is_that_of_adamw():
    """Against PyTorch's own loop: backward, clip_grad_norm_, AdamW as it is by default."""
    update = make(clip_grad=0.5)
    model = copy.deepcopy(update.model)
    objective = build_objective(CONFIG.loss, ALONE)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(4):
        update(batch(step), 1e-2)
        sum(objective(model(*batch(step)))).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5
        optimizer.step()
        optimizer.zero_grad()
    for name, expected in model.named_parameters():
        # See test_train_ranks.py: the bias of the keys follows rounding.
        if not name.endswith("qkv.bias"):
            torch.testing.assert_close(update.params[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["mae", "u_mae", "m_mae", "von_neumann"])
def test_gradients_in_parts_are_those_of_the_batch(method):
    whole, parts = (
        make(loss=LossConfig(method, weight=1.0, center=method == "m_mae"), accumulate=n)
        for n in (1, 4)
    )
    features, terms = whole._gradients(batch(0))
    seen, same_terms = parts._gradients_in_parts(batch(0))
    torch.testing.assert_close(same_terms, terms, rtol=1e-6, atol=0)
    torch.testing.assert_close(seen, features, rtol=1e-5, atol=1e-6)
    largest = max(param.grad.abs().max() for param in whole.params.values())
    for name, param in whole.params.items():
        assert (parts.params[name].grad - param.grad).abs().max() <= 1e-6 * largest, name


def test_no_clipping_below_the_limit():
    updates = [make(clip_grad=limit) for limit in (None, 1e6)]
    for update in updates:
        update(batch(0), 1e-2)
    assert same(*map(weights, updates))


def test_average():
    update = make()
    expected = update.params["cls_token"].detach().clone()
    for step in range(3):
        update(batch(step), 1e-2)
        expected = 0.9 * expected + 0.1 * update.params["cls_token"].detach()
    torch.testing.assert_close(update.average["cls_token"], expected)
    assert not torch.equal(expected, update.params["cls_token"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"loss": LossConfig("simclr")}])
def test_a_step_that_is_not_finite_changes_nothing(bad, changes):
    two_branch = "loss" in changes
    update, other = make(clip_grad=1.0, **changes), make(clip_grad=1.0, **changes)
    for step in (0, 1):
        update(batch(step, two_branch), 1e-2)
        other(batch(step, two_branch), 1e-2)
    before = weights(update)
    broken = batch(2, two_branch)
    broken[0][3, 0, 2, 2] = bad
    update(broken, 1e-2)
    assert same(weights(update), before)
    # And it leaves no trace in what follows.
    update(batch(3, two_branch), 1e-2)
    other(batch(3, two_branch), 1e-2)
    assert same(weights(update), weights(other))
    expected = other.read()
    assert update.read() == expected | {"skipped_steps": 1}


def test_many_in_a_row_are_fatal():
    update = make(max_skipped=3)
    images, noise = batch(0)
    bad = (images * math.nan, noise)
    for inputs in (bad, bad, (images, noise), bad, bad):
        update(inputs, 1e-2)
    assert update.read()["skipped_steps"] == 4
    update(bad, 1e-2)
    update((images, noise), 1e-2)  # one that went well afterwards does not hide them
    with pytest.raises(
        UserError, match="3 steps in a row had a gradient that is not finite; lower"
    ):
        update.read()


def test_the_host_reads_nothing(monkeypatch):
    """Whatever would make it wait for a GPU raises: items, lists, conditions on tensors."""
    update = make(clip_grad=1.0)
    update(batch(0), 1e-2)

    def wait(*_):
        raise AssertionError("the host waited for the device")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    update(batch(1), 1e-2)


# --- In a training -------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    return dataclasses.replace(
        CONFIG,
        out=tmp_path / "run",
        epochs=4,
        warmup_epochs=0,
        base_lr=1e-1,
        log_every=2,
        monitor_every=0,
        max_skipped=4,
    )


@pytest.fixture
def data():
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8, generator=rng)
    return ImageData(pixels, None, (), "made up"), None


def spoil(monkeypatch, steps):
    """Batches of NaN at some steps."""

    class Spoiled(train.Batches):
        def __call__(self, step):
            images, noise = super().__call__(step)
            return (images * math.nan if step in steps else images), noise

    monkeypatch.setattr(train, "Batches", Spoiled)


def test_skipped_steps_are_counted_and_logged(config, data, monkeypatch):
    spoil(monkeypatch, {1, 2, 3, 7})
    notes = []
    task = Silent()
    task.say = notes.append
    train.pretrain(config, data, task)
    records = read_metrics(config.out / "metrics.jsonl")[1:]
    assert [record["skipped_steps"] for record in records] == [1, 3, 3, 4, 4, 4]
    assert math.isnan(records[1]["loss"])  # both of its steps were skipped
    assert all(math.isfinite(record["loss"]) for record in records[:1] + records[2:])
    assert notes[-1].endswith("4 steps skipped")


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(config, data, monkeypatch):
    spoil(monkeypatch, range(5, 99))
    with pytest.raises(UserError, match="4 steps in a row had a gradient that is not finite"):
        train.pretrain(config, data, Silent())
    assert latest_checkpoint(config.out).name == "step-000003"
    model, _ = load_model(config.out, ALONE.device)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_checkpoint_waits_for_a_step_that_is_not_skipped(config, data, monkeypatch):
    spoil(monkeypatch, {4, 5, 6})
    train.pretrain(config, data, Silent())
    names = [folder.name for folder in checkpoints(config.out)]
    assert names == ["step-000012", "step-000009"]
    spoil(monkeypatch, {10, 11})
    again = dataclasses.replace(config, keep=9, out=config.out.with_name("again"))
    train.pretrain(again, data, Silent())
    names = [folder.name for folder in checkpoints(again.out)]
    assert names == ["step-000012", "step-000009", "step-000008", "step-000003"]


def test_a_learning_rate_too_large_stops_the_run(config, data):
    with pytest.raises(UserError, match="not finite; lower --base-lr or set --clip-grad"):
        train.pretrain(dataclasses.replace(config, base_lr=1e30), data, Silent())
    assert not checkpoints(config.out)


def test_random_layers_resume_too(config, data, monkeypatch):
    """What draws from PyTorch's own generators is a function of the step as well."""

    def with_dropout(*args):
        model = build_model(*args)
        model.blocks[0].norm1 = nn.Sequential(model.blocks[0].norm1, nn.Dropout(0.5))
        return model

    monkeypatch.setattr(train, "build_model", with_dropout)
    train.pretrain(config, data, Silent())
    part = dataclasses.replace(config, out=config.out.with_name("part"))

    class Stop(Exception):
        pass

    task, done = Silent(), []

    def stop():
        done.append(1)
        if len(done) == 8:
            raise Stop

    task.advance = stop
    with pytest.raises(Stop):
        train.pretrain(part, data, task)
    torch.rand(100)
    train.pretrain(dataclasses.replace(part, resume=True), data, Silent())
    a, b = (load_file(latest_checkpoint(run.out) / "model.safetensors") for run in (config, part))
    assert same(a, b)


def test_the_average_can_be_loaded(config, data):
    checkpoint = train.pretrain(config, data, Silent())
    model, meta = load_model(checkpoint / "ema.safetensors", ALONE.device)
    saved = load_file(checkpoint / "ema.safetensors")
    assert same(dict(model.state_dict()), saved) and meta["step"] == 12
    weights = load_file(checkpoint / "model.safetensors")
    assert weights.keys() == saved.keys() and not same(weights, saved)


@pytest.mark.slow
def test_compiled(config, data):
    """--compile changes rounding only."""
    compiled = dataclasses.replace(config, compile=True, out=config.out.with_name("compiled"))
    for one in (config, compiled):
        train.pretrain(dataclasses.replace(one, base_lr=1e-2, epochs=2), data, Silent())
    a, b = (read_metrics(one.out / "metrics.jsonl") for one in (config, compiled))
    for x, y in zip(a[1:], b[1:], strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-5)
    assert load_model(compiled.out, ALONE.device)
