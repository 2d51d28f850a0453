"""Schedule, groups, run folder, and that an interrupted run ends where another one does."""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmae_fast.training import train
from mmae_fast.training.checkpoint import latest_checkpoint, load_model
from mmae_fast.training.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    PretrainConfig,
    UserError,
    from_dict,
    to_dict,
)
from mmae_fast.training.data import ImageData
from mmae_fast.training.models import build_model
from mmae_fast.training.objective import regularizer_seconds
from mmae_fast.training.recipes import RECIPES
from mmae_fast.training.runs import MetricsFile, read_config, read_metrics, read_run
from mmae_fast.training.step import TrainingStep, learning_rate
from mmae_fast.training.train import Interrupted, pretrain

MODEL = ModelConfig(
    patch_size=2,
    embed_dim=16,
    depth=1,
    num_heads=2,
    decoder_embed_dim=8,
    decoder_depth=1,
    decoder_num_heads=2,
)
STEPS_PER_EPOCH = 4  # 70 images in batches of 16


@pytest.fixture
def data():
    rng = torch.Generator().manual_seed(0)

    def images(count):
        pixels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=rng)
        return ImageData(pixels, torch.arange(count) % 3, ("a", "b", "c"), "made up")

    return images(70), images(20)


@pytest.fixture
def config(tmp_path):
    return PretrainConfig(
        model=MODEL,
        out=tmp_path / "run",
        epochs=3,
        warmup_epochs=1,
        batch_size=16,
        base_lr=1e-2,
        log_every=3,
        save_every=1,
        device="cpu",
    )


class Task:
    """Stands in for a progress bar; sends itself a signal after some steps."""

    def __init__(self, stop_after=None, number=signal.SIGINT):
        self.stop_after, self.number, self.done, self.notes = stop_after, number, 0, []
        self.lines = []

    def start(self, total, done=0):
        self.total, self.done = total, done

    def advance(self, units=1):
        self.done += units
        if self.done == self.stop_after:
            os.kill(os.getpid(), self.number)

    def say(self, note):
        self.notes.append(note)

    def tell(self, line):
        self.lines.append(line)


# --- Schedule and groups -------------------------------------------------------------------------


def test_learning_rate():
    rates = [learning_rate(step, 2.0, 10, 110) for step in range(111)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.0)
    assert rates[35] == pytest.approx(1 + math.cos(math.pi / 4))
    assert rates[110] == pytest.approx(0.0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_no_warm_up():
    assert learning_rate(0, 1.0, 0, 10) == 1.0


def test_weight_decay_groups(config, data, monkeypatch):
    groups = []

    class Spy(torch.optim.AdamW):
        def __init__(self, params, **kwargs):
            super().__init__(params, **kwargs)
            groups.extend(self.param_groups)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    pretrain(dataclasses.replace(config, epochs=0.25), data, Task())
    model = build_model(config, (8, 8), 1)
    decayed = {p.shape for g in groups if g["weight_decay"] for p in g["params"]}
    assert {g["weight_decay"] for g in groups} == {0.0, 0.05}
    assert {g["betas"] for g in groups} == {(0.9, 0.95)}
    assert decayed == {p.shape for p in model.parameters() if p.ndim > 1}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_recipes_are_the_published_ones():
    vit_b, vit_l = (RECIPES[f"mmae-vit-{size}-in1k"][1] for size in "bl")
    assert (vit_b.loss.center, vit_l.loss.center) == (False, True)
    for recipe in (vit_b, vit_l):
        assert recipe.loss.grad_scale == "sum"
        assert (recipe.epochs, recipe.warmup_epochs, recipe.batch_size) == (200, 40, 1024)
        assert (recipe.base_lr, recipe.weight_decay, recipe.min_crop) == (1.5e-4, 0.05, 0.2)
        assert recipe.model.double_norm and recipe.loss.weight == 0.01
    assert (vit_b.loss.mu, vit_l.loss.mu) == (1, 3)
    assert (vit_b.model.embed_dim, vit_b.model.depth, vit_b.model.num_heads) == (768, 12, 12)
    assert (vit_l.model.embed_dim, vit_l.model.depth, vit_l.model.num_heads) == (1024, 24, 16)


# --- The run folder ------------------------------------------------------------------------------


def test_run_folder(config, data):
    task = Task()
    checkpoint = pretrain(config, data, task)
    assert checkpoint == config.out / "checkpoints" / "step-000012"
    kept = sorted(path.name for path in checkpoint.parent.iterdir())
    assert kept == ["step-000008", "step-000012"]
    assert (task.total, task.done, len(task.notes)) == (12, 12, 4)

    records = read_metrics(config.out / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 3, 6, 9, 12]
    assert {"step", "epoch", "matrix_entropy", "effective_rank"} < set(records[0])
    assert records[0]["backbone_joint_entropy_1"] >= 0
    for record in records[1:]:
        assert record["loss"] == pytest.approx(record["recon_loss"] + record["regularizer"])
        assert record["effective_rank"] == pytest.approx(math.exp(record["matrix_entropy"]))
        assert 1 <= record["effective_rank"] <= 16
        assert record["regularizer"] < 0  # minus the coding rate
        assert record["images_per_second"] > 0
        assert 0 < record["regularizer_share"] < 1
        assert 0 < record["data_wait_share"] < 1
        assert record["skipped_steps"] == 0
    assert records[-1]["lr"] == learning_rate(11, 1e-2 * 16 / 256, 4, 12)

    run = read_run(config.out)
    assert run["data"]["train"] == "made up" and run["data"]["images"] == 70
    assert {"torch", "timm", "python", "mmae_fast", "cpu", "threads"} <= set(run["versions"])
    assert read_config(config.out) == config
    model, meta = load_model(config.out, torch.device("cpu"))
    assert meta["step"] == 12 and not model.training


def test_every_epoch_tells_its_share_of_waiting(config, data, monkeypatch):
    """Of its own time, and at no cost: nothing waits for the device before the last step."""
    task, waits = Task(), []

    class Slow(train.Batches):
        def __call__(self, step):
            if 4 <= step < 8:  # in the second of three epochs
                self.wait_seconds += 1e6
            return super().__call__(step)

    monkeypatch.setattr(train, "Batches", Slow)
    for owner, name in ((train, "synchronise"), (TrainingStep, "read")):
        kept = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=kept: waits.append(task.done) or f(*a))
    changes = dict(log_every=100, monitor_every=0, save_every=9)
    pretrain(dataclasses.replace(config, **changes), data, task)
    assert set(waits) == {12}
    shares = [
        re.fullmatch(r"M-MAE, epoch (\d) of 3: waited for data (\d+\.\d)% of the time", line)
        for line in task.lines
    ]
    assert [match[1] for match in shares] == ["1", "2", "3"]
    first, second, third = (float(match[2]) for match in shares)
    assert 0 < first < 100 < second and third < 100
    last = read_metrics(config.out / "metrics.jsonl")[-1]
    assert 100 * last["epoch_data_wait_share"] == pytest.approx(third, abs=0.06)


def test_loss_goes_down(config, data):
    pretrain(dataclasses.replace(config, epochs=30, log_every=40), data, Task())
    records = read_metrics(config.out / "metrics.jsonl")
    assert records[-1]["recon_loss"] < 0.97 * records[1]["recon_loss"]


def test_methods_share_everything_but_the_regulariser(config, data):
    first = {}
    for method in ("mae", "u_mae", "m_mae", "von_neumann", "renyi"):
        out = config.out.with_name(method)
        changes = dict(loss=LossConfig(method=method), out=out, epochs=0.25, log_every=1)
        pretrain(dataclasses.replace(config, **changes), data, Task())
        first[method] = read_metrics(out / "metrics.jsonl")[1]
    assert len({record["recon_loss"] for record in first.values()}) == 1
    assert first["mae"]["regularizer"] == 0 == first["mae"]["regularizer_share"]
    assert first["u_mae"]["regularizer"] > 0
    assert first["m_mae"]["regularizer"] < 0
    assert first["von_neumann"]["regularizer"] < 0
    assert first["renyi"]["regularizer"] < 0


def test_bf16_and_clipping(config, data):
    changes = dict(precision="bf16", clip_grad=1e-3, epochs=1)
    pretrain(dataclasses.replace(config, **changes), data, Task())
    assert math.isfinite(read_metrics(config.out / "metrics.jsonl")[-1]["loss"])


def test_regularizer_seconds():
    class Slow(torch.nn.Module):
        def forward(self, features):
            time.sleep(0.01)
            return features.square().sum()

    assert 0.01 <= regularizer_seconds(Slow(), torch.randn(4, 3)) < 0.05


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(batch_size=71), "batch_size 71 exceeds the 70 training images"),
        (dict(batch_size=0), "batch_size must be > 0, got 0"),
        (dict(epochs=-1), "epochs must be > 0, got -1"),
        (dict(keep=0), "keep must be > 0, got 0"),
        (dict(ema=1.0), r"ema must be in \(0, 1\), got 1.0"),
        (dict(clip_grad=0.0), "clip_grad must be > 0, got 0.0"),
        (dict(reconstruct_every=-1), "reconstruct_every must be >= 0, got -1"),
        (dict(accumulate=3), "batch_size 16 cannot be shared evenly by 1 processes in 3 parts"),
        (dict(shard=True), "--shard splits a model among processes: start them with torchrun"),
        (dict(min_crop=0.0), r"min_crop must be in \(0, 1\], got 0.0"),
        (dict(device="abacus"), "device 'abacus' cannot be used"),
        (dict(loss=LossConfig(weight=-1.0)), "-1.0"),
        (dict(model=dataclasses.replace(MODEL, patch_size=3)), "patch_size must divide .* 3"),
        (dict(resume=True), "no run in"),
    ],
)
def test_what_cannot_work(config, data, changes, match):
    with pytest.raises(UserError, match=match):
        pretrain(dataclasses.replace(config, **changes), data, Task())
    assert not (config.out / "checkpoints").exists()


def test_existing_run_is_not_overwritten(config, data):
    pretrain(dataclasses.replace(config, epochs=0.25), data, Task())
    with pytest.raises(UserError, match="already holds a run; continue it with --resume"):
        pretrain(config, data, Task())


def test_config_round_trip():
    for _, recipe in RECIPES.values():
        assert from_dict(PretrainConfig, json.loads(json.dumps(to_dict(recipe)))) == recipe
    with pytest.raises(UserError, match="DataConfig has no field colour"):
        from_dict(PretrainConfig, {"data": {"colour": 1}})


# --- Interruption --------------------------------------------------------------------------------


TIMINGS = ("images_per_second", "regularizer_share", "monitor_share", "data_wait_share")
TIMINGS += ("epoch_data_wait_share",)


def final_files(run):
    checkpoint = latest_checkpoint(run)
    records = [
        {k: v for k, v in record.items() if k not in TIMINGS}
        for record in read_metrics(run / "metrics.jsonl")
    ]
    return load_file(checkpoint / "model.safetensors"), records


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_is_bitwise_the_same(config, data, number):
    whole = dataclasses.replace(config, out=config.out.with_name("whole"))
    pretrain(whole, data, Task())
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    for stop_after in (5, 8):  # inside an epoch and a logging interval; at the end of an epoch
        with pytest.raises(Interrupted, match=f"stopped after step {stop_after}"):
            pretrain(config, data, Task(stop_after, number))
        assert latest_checkpoint(config.out).name == f"step-{stop_after:06d}"
        config = dataclasses.replace(config, resume=True)
    pretrain(config, data, Task())
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers

    weights, records = final_files(whole.out)
    resumed_weights, resumed_records = final_files(config.out)
    assert weights.keys() == resumed_weights.keys()
    assert all(torch.equal(weights[key], resumed_weights[key]) for key in weights)
    assert records == resumed_records


def test_resume_of_a_run_killed_before_its_first_checkpoint(config, data, capsys):
    checkpoint = pretrain(config, data, Task())
    weights, records = final_files(config.out)
    shutil.rmtree(checkpoint.parent)
    assert pretrain(dataclasses.replace(config, resume=True), data, Task()) == checkpoint
    assert "has no checkpoint yet: starting from step 0" in capsys.readouterr().err
    again, records_again = final_files(config.out)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert records_again == records


def test_resume_of_a_finished_run_changes_nothing(config, data):
    checkpoint = pretrain(config, data, Task())
    before = (checkpoint / "model.safetensors").read_bytes()
    assert pretrain(dataclasses.replace(config, resume=True), data, Task()) == checkpoint
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_resume_refuses_other_settings_and_other_images(config, data):
    pretrain(dataclasses.replace(config, epochs=1), data, Task())
    other = dataclasses.replace(config, loss=LossConfig(mu=3.0), resume=True)
    with pytest.raises(UserError, match=r"other settings: loss\.mu, epochs"):
        pretrain(other, data, Task())
    train_images, test_images = data
    changed = dataclasses.replace(train_images, images=train_images.images // 2)
    same = dataclasses.replace(config, epochs=1, resume=True)
    with pytest.raises(UserError, match=r"data \(mean\), data \(std\)"):
        pretrain(same, (changed, test_images), Task())


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(0, 10, 2)) + '{"step": 1')
    MetricsFile(path, 4).write({"step": 5})
    assert [record["step"] for record in read_metrics(path)] == [0, 2, 4, 5]
    MetricsFile(path, 0)
    assert path.read_text() == ""


def test_ctrl_c_in_a_process(tmp_path):
    """SIGINT to ``mmae pretrain``: exit status 130, a checkpoint, and ``--resume`` goes on."""
    pytest.importorskip("sklearn")
    out = tmp_path / "run"
    command = [sys.executable, "-m", "mmae_fast.cli", "pretrain", "--data.train", "digits"]
    command += ["--out", str(out), "--epochs", "400", "--log-every", "1", "--device", "cpu"]
    command += ["--model.patch-size", "4", "--model.depth", "1", "--model.embed-dim", "16"]
    environment = os.environ | {
        "PYTHONPATH": str(Path(train.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while len(read_metrics(metrics)) < 3 and process.poll() is None:
        assert time.monotonic() < deadline, "training did not start"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume continues" in errors and "Traceback" not in errors
    step = int(latest_checkpoint(out).name.removeprefix("step-"))
    assert 2 <= step < 2000

    resumed = dataclasses.replace(read_config(out), out=out, resume=True)
    assert resumed.data == DataConfig(train="digits")
    with pytest.raises(Interrupted, match=f"stopped after step {step + 2}"):
        pretrain(resumed, task=Task(stop_after=step + 2))
