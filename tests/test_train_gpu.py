"""Training on a CUDA device: nothing waits for it, bad steps are skipped on it, runs resume."""

import dataclasses
import math

import pytest
import torch

from mmae_fast.training.config import LossConfig, ModelConfig, PretrainConfig
from mmae_fast.training.data import ImageData
from mmae_fast.training.launch import World
from mmae_fast.training.models import build_model
from mmae_fast.training.objective import build_objective
from mmae_fast.training.runs import read_metrics
from mmae_fast.training.step import TrainingStep
from mmae_fast.training.train import pretrain

needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# What means something on a CPU runs there too, so that it is known to work.
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
CONFIG = PretrainConfig(
    model=ModelConfig(4, 64, 2, 2, 32, 1, 2),
    batch_size=16,
    precision="bf16",
    clip_grad=1.0,
    ema=0.9,
    log_every=2,
)


class Silent:
    def start(self, total, done=0):
        pass

    def advance(self, units=1):
        pass

    def say(self, note):
        pass

    def tell(self, line):
        pass


def make(device, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    world = World(torch.device(device))
    torch.manual_seed(0)
    model = build_model(config, (32, 32), 3).to(device)
    return TrainingStep(model, build_objective(config.loss, world), config, world)


def batch(device, step):
    rng = torch.Generator().manual_seed(step)
    images = torch.randn(16, 3, 32, 32, generator=rng)
    return images.to(device), torch.rand(16, 64, generator=rng).to(device)


@pytest.mark.gpu
@needs_cuda[1]
@pytest.mark.parametrize("method", ["mae", "u_mae", "m_mae"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_does_not_wait_for_the_device(method, accumulate):
    update = make("cuda", loss=LossConfig(method), accumulate=accumulate)
    inputs = batch("cuda", 0)
    update(inputs, 1e-3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            update(inputs, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(update.read()["loss"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(device, accumulate):
    update = make(device, accumulate=accumulate)
    update(batch(device, 0), 1e-3)
    before = {name: param.detach().clone() for name, param in update.params.items()}
    average = {name: value.clone() for name, value in update.average.items()}
    images, noise = batch(device, 1)
    images[3, 0, 2, 2] = math.nan
    update((images, noise), 1e-3)
    assert update.read()["skipped_steps"] == 1
    assert all(torch.equal(param, before[name]) for name, param in update.params.items())
    assert all(torch.equal(value, average[name]) for name, value in update.average.items())
    assert all(update.optimizer.state[p]["step"] == 1 for p in update.params.values())


@pytest.mark.parametrize(
    ("device", "compile"),
    [("cpu", False), *(pytest.param("cuda", c, marks=needs_cuda) for c in (False, True))],
)
def test_training_and_resuming(tmp_path, device, compile):
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=rng)
    data = ImageData(pixels, None, (), "made up"), None
    changes = {"out": tmp_path / "run", "epochs": 4, "warmup_epochs": 1, "compile": compile}
    config = dataclasses.replace(CONFIG, device=device, **changes)
    pretrain(config, data, Silent())
    records = read_metrics(config.out / "metrics.jsonl")
    assert records[-1]["step"] == 16 and math.isfinite(records[-1]["loss"])
    assert records[-1]["loss"] < records[1]["loss"]
    checkpoint = pretrain(dataclasses.replace(config, resume=True), data, Silent())
    assert checkpoint.name == "step-000016"
