"""Micro-batches and one batch have the same gradients, whatever is drawn at random."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from mmae_fast.accumulate import accumulate_gradients
from mmae_fast.losses import MatrixEntropyRegularizer, info_nce_loss

from .accuracy import features
from .ranks import Failure

MASKS = torch.Generator()


class Model(nn.Module):
    """A loss per sample and features; dropout, a mask of its own generator, and running statistics.

    BatchNorm only counts: its batch statistics would make a micro-batch differ from a batch.
    """

    def __init__(self, random):
        super().__init__()
        self.random = random
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.3 * random))
        self.norm = nn.BatchNorm1d(6, affine=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        self.norm(x)
        if self.random:
            x = x * (torch.rand(x.shape, generator=MASKS) > 0.3)
        z = self.head(self.encoder(x))
        return z.square().mean(), z


def setting(random=False, dtype=torch.float64):
    torch.manual_seed(0)
    MASKS.manual_seed(1)
    return Model(random).to(dtype), features("gaussian", 48, 6, dtype=dtype)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain(model, forward, batches, regularizer):
    """What accumulate_gradients says it is equivalent to: all graphs at once."""
    losses, parts = zip(*(forward(batch) for batch in batches), strict=True)
    rows = torch.tensor([len(batch) for batch in batches])
    loss = (torch.stack(losses) * rows / rows.sum()).sum()
    term = regularizer(torch.cat(parts, -2))
    (loss + term).backward()
    return loss.detach(), term.detach()


KINDS = [kind for kind in MatrixEntropyRegularizer.KINDS if kind != "none"]


@pytest.mark.parametrize("sizes", [[6] * 8, [2, 20, 6, 20], [48]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_are_one_batch(kind, sizes):
    regularizer = MatrixEntropyRegularizer(kind, 0.5)
    model, x = setting()
    expected = plain(model, model, [x], regularizer)
    expected_grads = gradients(model)
    model, x = setting()
    actual = accumulate_gradients(model, model, iter(x.split(sizes)), regularizer)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(model), expected_grads, rtol=1e-9, atol=1e-15)
    if len(sizes) > 1:  # and accumulation of the parts' own terms is something else
        naive, x = setting()
        for batch in x.split(sizes):
            (regularizer(naive(batch)[1]) / len(sizes)).backward()
        difference = naive.head.weight.grad - expected_grads["head.weight"]
        assert difference.norm() > 0.01 * expected_grads["head.weight"].norm()


def test_random_numbers_are_replayed():
    """Gradients, running statistics and all generators are as after one pass."""
    regularizer = MatrixEntropyRegularizer("tcr", 0.5)
    model, x = setting(random=True)
    expected = plain(model, model, x.split(6), regularizer)
    states = torch.get_rng_state(), MASKS.get_state()
    expected_grads, buffers = gradients(model), dict(model.named_buffers())
    model, x = setting(random=True)
    actual = accumulate_gradients(model, model, x.split(6), regularizer, generators=[MASKS])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(model), expected_grads, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(MASKS.get_state(), states[1])


@pytest.mark.parametrize("outside", [False, True])
def test_autocast(outside):
    """Also around the call, where autocast keeps the copies of the weights of the first pass."""
    regularizer = MatrixEntropyRegularizer("von_neumann", 0.5)

    def forward(batch):
        with torch.autocast("cpu", torch.bfloat16):
            loss, z = model(batch)
        assert z.dtype == torch.bfloat16
        return loss.float(), z

    model, x = setting(dtype=torch.float32)
    expected = plain(model, forward, x.split(6), regularizer)
    expected_grads = gradients(model)
    model, x = setting(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        actual = accumulate_gradients(model, forward, x.split(6), regularizer)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert gradients(model).keys() == expected_grads.keys()
    # Sums over micro-batches of products with bfloat16 operands, in another order.
    torch.testing.assert_close(gradients(model), expected_grads, rtol=0.02, atol=1e-4)


def test_gradient_scaler():
    regularizer = MatrixEntropyRegularizer("tcr", 0.5)
    model, x = setting()
    expected = accumulate_gradients(model, model, x.split(6), regularizer)
    expected_grads = gradients(model)
    model, x = setting()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    actual = accumulate_gradients(model, model, x.split(6), regularizer, scale=scaler.scale)
    torch.testing.assert_close(actual, expected)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, 1024 * expected_grads[name])


def test_two_views_and_no_loss():
    model, x = setting()

    def forward(batch):
        return None, (model(batch)[1], model(batch.flip(-1))[1])

    term = info_nce_loss(*forward(x)[1])
    term.backward()
    expected_grads = gradients(model)
    model, x = setting()
    loss, actual = accumulate_gradients(model, forward, x.split(6), info_nce_loss)
    assert loss is None
    torch.testing.assert_close(actual, term.detach())
    torch.testing.assert_close(gradients(model), expected_grads, rtol=1e-9, atol=1e-15)


def test_no_regularizer():
    model, x = setting()
    model(x)[0].backward()
    expected_grads = gradients(model)
    model, x = setting()
    _, term = accumulate_gradients(model, model, x.split(6), MatrixEntropyRegularizer("none"))
    assert term == 0
    torch.testing.assert_close(gradients(model), expected_grads)


def test_gradients_add_up_and_frozen_parameters_have_none():
    regularizer = MatrixEntropyRegularizer("tcr", 0.5)
    model, x = setting()
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(False)
    twice = copy.deepcopy(model)
    accumulate_gradients(model, model, x.split(6), regularizer)
    for _ in range(2):
        accumulate_gradients(twice, twice, x.split(6), regularizer)
    assert set(gradients(model)) == {"head.weight", "head.bias"}
    for name, grad in gradients(twice).items():
        torch.testing.assert_close(grad, 2 * gradients(model)[name])


def test_errors():
    model, x = setting()
    regularizer = MatrixEntropyRegularizer("tcr")
    with pytest.raises(ValueError, match="at least one micro-batch, got none"):
        accumulate_gradients(model, model, [], regularizer)

    def forward(batch):
        loss, z = model(batch)
        return (loss if len(batch) > 6 else None), z

    with pytest.raises(ValueError, match="2 of 3 micro-batches have no loss"):
        accumulate_gradients(model, forward, [x[:6], x[6:42], x[42:]], regularizer)


# --------------------------------------------------------------------------------------------------
# Several processes


def accumulated_on_rank(group, rank, wrap, world, sizes):
    model, x = setting()
    start = sum(sum(own) for own in sizes[:rank])
    own = x[start : start + sum(sizes[rank])]
    if wrap == "ddp":
        model = nn.parallel.DistributedDataParallel(model, process_group=group)
    else:
        mesh = DeviceMesh.from_group(group, "cpu")
        for layer in (model.encoder, model.head, model):
            fully_shard(layer, mesh=mesh)
    regularizer = MatrixEntropyRegularizer("tcr", 0.5, process_group=group)

    def forward(batch):
        loss, z = model(batch)
        return loss * len(own) * world / len(x), z  # the mean of all rows, when averaged

    accumulate_gradients(model, forward, own.split(sizes[rank]), regularizer)
    grads = gradients(model).items()
    if wrap == "fsdp":
        return {name: grad.full_tensor() for name, grad in grads}
    return {name.removeprefix("module."): grad for name, grad in grads}


@pytest.mark.parametrize(
    ("wrap", "sizes"),
    [
        ("ddp", [[6, 6, 6, 6], [6, 6, 6, 6]]),
        ("ddp", [[10], [3, 4, 5], [20, 6]]),
        ("fsdp", [[6, 6, 6, 6], [6, 6, 6, 6]]),
        ("fsdp", [[7, 5], [3, 13], [10, 10]]),
    ],
)
def test_ranks_and_micro_batches_are_one_batch(ranks, wrap, sizes):
    model, x = setting()
    plain(model, model, [x], MatrixEntropyRegularizer("tcr", 0.5))
    for grads in ranks(accumulated_on_rank, len(sizes), wrap, len(sizes), sizes):
        assert not isinstance(grads, Failure), grads
        torch.testing.assert_close(grads, gradients(model), rtol=1e-9, atol=1e-15)
