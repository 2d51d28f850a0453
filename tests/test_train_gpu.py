"""Training on a CUDA device: nothing waits for it, bad steps are skipped on it, runs resume."""

import dataclasses
import math

import pytest
import torch

from mmae_fast.config import LossConfig, ModelConfig, PretrainConfig
from mmae_fast.data import ImageData
from mmae_fast.launch import World
from mmae_fast.models import build_model
from mmae_fast.objective import build_objective
from mmae_fast.runs import read_metrics
from mmae_fast.step import TrainingStep
from mmae_fast.train import pretrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG = PretrainConfig(
    model=ModelConfig(4, 64, 2, 2, 32, 1, 2),
    batch_size=16,
    precision="bf16",
    clip_grad=1.0,
    ema=0.9,
    log_every=2,
    device="cuda",
)


class Silent:
    def start(self, total, done=0):
        pass

    def advance(self, units=1):
        pass

    def say(self, note):
        pass


def make(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    world = World(torch.device("cuda"))
    torch.manual_seed(0)
    model = build_model(config, (32, 32), 3).cuda()
    return TrainingStep(model, build_objective(config.loss, world), config, world)


def batch(step):
    rng = torch.Generator().manual_seed(step)
    return (
        torch.randn(16, 3, 32, 32, generator=rng).cuda(),
        torch.rand(16, 64, generator=rng).cuda(),
    )


@pytest.mark.parametrize("method", ["mae", "u_mae", "m_mae"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_does_not_wait_for_the_device(method, accumulate):
    update = make(loss=LossConfig(method), accumulate=accumulate)
    inputs = batch(0)
    update(inputs, 1e-3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            update(inputs, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(update.read()["loss"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(accumulate):
    update = make(accumulate=accumulate)
    update(batch(0), 1e-3)
    before = {name: param.detach().clone() for name, param in update.params.items()}
    average = {name: value.clone() for name, value in update.average.items()}
    images, noise = batch(1)
    images[3, 0, 2, 2] = math.nan
    update((images, noise), 1e-3)
    assert update.read()["skipped_steps"] == 1
    assert all(torch.equal(param, before[name]) for name, param in update.params.items())
    assert all(torch.equal(value, average[name]) for name, value in update.average.items())
    assert all(update.optimizer.state[p]["step"] == 1 for p in update.params.values())


@pytest.mark.parametrize("changes", [{}, {"compile": True}])
def test_training_and_resuming(tmp_path, changes):
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=rng)
    data = ImageData(pixels, None, (), "made up"), None
    config = dataclasses.replace(CONFIG, out=tmp_path / "run", epochs=4, warmup_epochs=1, **changes)
    pretrain(config, data, Silent())
    records = read_metrics(config.out / "metrics.jsonl")
    assert records[-1]["step"] == 16 and math.isfinite(records[-1]["loss"])
    assert records[-1]["loss"] < records[1]["loss"]
    checkpoint = pretrain(dataclasses.replace(config, resume=True), data, Silent())
    assert checkpoint.name == "step-000016"
