"""Two branches trained by several processes on a CPU: the same as by one."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmae_fast.training.batch_norm import GlooBatchNorm, over_processes
from mmae_fast.training.checkpoint import latest_checkpoint, load_model
from mmae_fast.training.config import TwoBranchConfig
from mmae_fast.training.models import build_model
from mmae_fast.training.runs import read_metrics

from . import together
from .ranks import Failure, Ranks
from .test_train_ranks import train_together

METHODS = ("barlow_twins", "spectral", "simclr")
WORLDS = (1, 2, 4)
BRANCHES = {"projector_hidden": 24, "projector_dim": 12}
STEPS = 24


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_branch")
    changes = {"epochs": STEPS / 2, "log_every": 1, "monitor_every": 0, "two_branch": BRANCHES}
    ways = {
        f"{method}{ranks}": {"ranks": ranks, "loss": {"method": method}} | changes
        for method in METHODS
        for ranks in WORLDS
    }
    said = train_together(folder, ways)
    for name, way in ways.items():
        assert f"{name}{' 0' * way['ranks']}\n" in said, said
    return folder


@pytest.mark.parametrize("ranks", WORLDS[1:])
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_curve_is_that_of_one_process(runs, method, ranks):
    one, other = (read_metrics(runs / f"{method}{n}" / "metrics.jsonl")[1:] for n in (1, ranks))
    assert [record["step"] for record in other] == list(range(1, STEPS + 1))
    for a, b in zip(one, other, strict=True):
        # The spectral loss is a difference of terms of the order 1, which passes through zero.
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5, abs=1e-5), a["step"]
    losses = [record["loss"] for record in one]
    assert max(losses) - min(losses) > 0.1  # there is something to be the same


@pytest.mark.parametrize("ranks", WORLDS[1:])
@pytest.mark.parametrize("method", METHODS)
def test_the_weights_are_those_of_one_process(runs, method, ranks):
    """BatchNorm's statistics included; under the same names, to be loaded by one process."""
    folders = [runs / f"{method}{n}" for n in (1, ranks)]
    a, b = (load_file(latest_checkpoint(folder) / "model.safetensors") for folder in folders)
    assert a.keys() == b.keys()
    assert int(b["projector.1.num_batches_tracked"]) == 2 * STEPS
    for name in a:
        # BatchNorm takes away what the last norm adds to all features alike: the gradient of its
        # bias is rounding, as that of the keys' bias, and AdamW makes whole steps of it.
        if name in ("backbone.norm.bias", "projector.1.running_mean"):
            continue
        if name.endswith("qkv.bias"):
            for tensor in (a[name], b[name]):
                tensor.view(3, -1)[1].zero_()
        tolerance = 2e-3 * a[name].abs().max() if a[name].is_floating_point() else 0
        assert (a[name] - b[name]).abs().max() <= tolerance, name
    model, _ = load_model(folders[1], torch.device("cpu"))
    assert not any(isinstance(module, GlooBatchNorm) for module in model.modules())


# --- BatchNorm -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks():
    started = Ranks()
    yield started
    started.stop()


def normalised(model, x):
    """Outputs, gradients of the input and of the parameters, statistics, output in evaluation."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.arange(y[0].numel()).view(y[0].shape).cos() * y.exp()).sum().backward()
    grads = [param.grad for param in model.parameters()]
    return y.detach(), x.grad, grads, list(model.buffers()), model.eval()(x).detach()


def made(shape, affine):
    torch.manual_seed(0)
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    model = nn.Sequential(kind(shape[1], affine=affine))
    for param in model.parameters():
        nn.init.uniform_(param, 0.5, 1.5)
    return model, 100 + torch.randn(shape) * torch.arange(1, 1 + shape[1]).view(
        1, -1, *[1] * (len(shape) - 2)
    )


def on_a_rank(group, rank, shape, affine):
    model, x = made(shape, affine)
    return normalised(over_processes(model, x.device), x.chunk(group.size())[rank])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(8, 5), (4, 3, 2, 6)])
def test_batch_norm_is_that_of_the_whole_batch(ranks, shape, affine):
    y, grad, grads, buffers, evaluated = normalised(*made(shape, affine))
    results = ranks(on_a_rank, 4, shape, affine)
    assert not any(isinstance(result, Failure) for result in results), results
    for whole, part in ((y, 0), (grad, 1), (evaluated, 4)):
        whole_batch = torch.cat([result[part] for result in results])
        torch.testing.assert_close(whole_batch, whole, rtol=1e-4, atol=1e-4)
    for result in results:
        torch.testing.assert_close(result[3], buffers, rtol=1e-5, atol=1e-5)
    for i, expected in enumerate(grads):
        total = sum(result[2][i] for result in results)
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)


def test_other_devices_take_pytorchs():
    config = dataclasses.replace(
        together.CONFIG,
        loss=dataclasses.replace(together.CONFIG.loss, method="simclr"),
        two_branch=TwoBranchConfig(**BRANCHES),
    )
    model = over_processes(build_model(config, (8, 8), 1), torch.device("cuda"))
    kinds = {type(module) for module in model.modules()}
    assert nn.SyncBatchNorm in kinds and not {GlooBatchNorm, nn.BatchNorm1d} & kinds
