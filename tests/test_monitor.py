"""EntropyMonitor: what it records, and that it leaves no trace."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import mmae_fast
from mmae_fast import EntropyMonitor, effective_rank, fast_matrix_entropy


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))


def train(model, steps=5):
    """Losses, gradients of the last step, final weights, and the random state after it."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(16, 6)).square().mean()
        loss.backward()
        optimizer.step()
        seen.append(loss.detach())
    return [*seen, *(p.grad for p in model.parameters()), *model.state_dict().values()]


def test_outputs_gradients_and_random_states_are_bitwise_unchanged():
    plain = train(network())
    state = torch.get_rng_state()
    model = network()
    with EntropyMonitor(model[0], every=1) as first, EntropyMonitor(model, every=2, alpha=2.0):
        watched = train(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(plain) == len(watched)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert len(first.records) == 5


def test_records_are_the_entropies_of_the_output():
    model, outputs = nn.Linear(6, 8), []
    monitor = EntropyMonitor(model, every=3, alpha=2.0)
    for step in range(7):
        outputs.append(model(torch.randn(10, 6, generator=torch.Generator().manual_seed(step))))
        if step == 3:
            model.eval()
    assert [record["call"] for record in monitor.records] == [0, 3, 6]
    assert [record["training"] for record in monitor.records] == [True, True, False]
    for record, z in zip(monitor.records, outputs[::3], strict=True):
        assert record["rows"] == 10
        assert record["entropy"] == fast_matrix_entropy(z, 2.0).item()
        assert record["effective_rank"] == pytest.approx(effective_rank(z).item(), rel=1e-6)


class Identity(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    "options, shape, rows",
    [
        ({}, (4, 5, 6), lambda x: x.reshape(20, 6)),
        ({"tokens": "mean"}, (4, 5, 6), lambda x: x.mean(1)),
        ({"tokens": 0}, (4, 5, 6), lambda x: x[:, 0]),
        ({"tokens": -1}, (4, 5, 6), lambda x: x[:, -1]),
        ({"tokens": "mean"}, (4, 6), lambda x: x),
        ({"dim": 1}, (4, 6, 2, 3), lambda x: x.permute(0, 2, 3, 1).reshape(24, 6)),
        ({"dim": 1, "tokens": "mean"}, (4, 6, 2, 3), lambda x: x.mean((2, 3))),
        ({"center": True}, (4, 5, 6), lambda x: x.reshape(20, 6)),
    ],
)
def test_token_axes(options, shape, rows):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    module = Identity()
    with EntropyMonitor(module, **options) as monitor:
        module(x)
    (record,) = monitor.records
    expected = fast_matrix_entropy(rows(x).contiguous(), center=options.get("center", False))
    assert record["entropy"] == pytest.approx(expected.item(), rel=1e-6)
    assert record["rows"] == len(rows(x))
    assert record["effective_rank"] == pytest.approx(math.exp(record["entropy"]), rel=1e-6)


def test_removed_hooks_stay_away():
    module = Identity()
    monitor = EntropyMonitor(module, every=1)
    module(torch.randn(3, 4))
    monitor.remove()
    monitor.remove()
    module(torch.randn(3, 4))
    assert len(monitor.records) == 1 and not module._forward_hooks
    with pytest.raises(RuntimeError, match="on purpose"), EntropyMonitor(module):
        raise RuntimeError("on purpose")
    assert not module._forward_hooks


def test_half_precision_and_tuples():
    module = Identity()
    x = torch.randn(9, 4, dtype=torch.bfloat16)
    with EntropyMonitor(module) as monitor, torch.inference_mode():
        module((x, "aside"))
    assert monitor.records[0]["entropy"] == fast_matrix_entropy(x).item()


@pytest.mark.parametrize(
    "arguments, options, error, match",
    [
        (["module"], {}, TypeError, "torch.nn.Module, got str"),
        ([Identity()], {"every": 0}, ValueError, "every must be >= 1, got 0"),
        ([Identity()], {"every": 1.5}, TypeError, "every must be an int, got float"),
        ([Identity()], {"alpha": -1.0}, ValueError, "alpha must be > 0, got -1.0"),
        ([Identity()], {"tokens": "first"}, ValueError, "'mean' or an int, got 'first'"),
        ([Identity()], {"tokens": True}, ValueError, "'mean' or an int, got True"),
    ],
)
def test_bad_arguments(arguments, options, error, match):
    with pytest.raises(error, match=match):
        EntropyMonitor(*arguments, **options)


@pytest.mark.parametrize(
    "output, error, match",
    [
        ({"logits": torch.ones(2, 2)}, TypeError, "starts with one, got dict"),
        (torch.ones(3), ValueError, r"a feature axis, got shape \(3,\)"),
        (torch.ones(3, 2, dtype=torch.int64), TypeError, "int64"),
    ],
)
def test_outputs_that_do_not_fit(output, error, match):
    module = Identity()
    with EntropyMonitor(module), pytest.raises(error, match=match):
        module(output)


WORKER = """
import sys, torch, torch.distributed as dist
from mmae_fast import EntropyMonitor, fast_matrix_entropy
rank = int(sys.argv[1])
store = dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
torch.manual_seed(rank)
module, x = torch.nn.Identity(), torch.randn(8, 4)
monitor = EntropyMonitor(module, every=1)
for _ in range(1 + rank):  # unequal calls: nothing waits for the other rank
    module(x)
assert monitor.calls == 1 + rank
if rank == 0:
    assert [r["entropy"] for r in monitor.records] == [fast_matrix_entropy(x).item()]
else:
    assert monitor.records == []
dist.barrier()
dist.destroy_process_group()
"""


def test_first_rank_records_its_own(tmp_path):
    commands = [[sys.executable, "-c", WORKER, str(rank), str(tmp_path / "s")] for rank in (0, 1)]
    processes = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_it_is_loaded_when_asked_for():
    code = "import sys, mmae_fast; assert 'mmae_fast.monitor' not in sys.modules; "
    code += "mmae_fast.EntropyMonitor; assert 'mmae_fast.monitor' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "EntropyMonitor" in mmae_fast.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mmae_fast.nothing
