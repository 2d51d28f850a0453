"""What the ranks of a group send each other, and hard inputs by either route."""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist

from mmae_fast import distributed, fast_coding_rate, fast_gram, fast_matrix_entropy

from .accuracy import features
from .ranks import GATHERED, REDUCED, assert_close, own_rows, value_and_grads


def count_on_rank(group, rank, z, sizes):
    """Bytes that this rank puts into collectives: forward pass of a value, then backward."""
    (own,), _ = own_rows(rank, [z], {}, sizes)
    own.requires_grad_()
    positions = {"all_reduce": 0, "all_gather": 1, "gather": 0, "broadcast": 0}
    sent = dict.fromkeys(positions, 0)

    def counted(name, position):
        original = getattr(dist, name)

        def collective(*args, **kwargs):
            tensor = args[position]
            sent[name] += tensor.numel() * tensor.element_size()
            return original(*args, **kwargs)

        return collective

    originals = {name: getattr(dist, name) for name in sent}
    for name, position in positions.items():
        setattr(dist, name, counted(name, position))
    try:
        value = fast_coding_rate(own, 1.0, process_group=group)
        forward = dict(sent)
        value.sum().backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return forward, {name: sent[name] - forward[name] for name in sent}


AGREEMENT = {"gather": 16, "broadcast": 32}  # bytes, of two ranks
SILENCE = dict.fromkeys(("all_reduce", "all_gather", *AGREEMENT), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route(ranks, dtype):
    """N = 4d gathers rows in their own dtype, one row more reduces the float32 Gram matrix."""
    d = 6
    for n, forward in [
        (4 * d, {"all_gather": 2 * d * d * dtype.itemsize}),
        (4 * d + 1, {"all_reduce": 4 * d * d}),
    ]:
        z = features("gaussian", n, d, dtype=dtype)
        for sent in ranks(count_on_rank, 2, z, [2 * d, n - 2 * d]):
            assert sent == (SILENCE | AGREEMENT | forward, SILENCE)


def routes_on_rank(group, rank, center, z, sizes):
    (own,), _ = own_rows(rank, [z], {}, sizes)
    results = []
    default = distributed.ROWS_PER_FEATURE
    for limit in (0, 10**9):
        distributed.ROWS_PER_FEATURE = limit
        function = partial(fast_matrix_entropy, center=center, process_group=group)
        results.append(value_and_grads(function, [own], {}))
    distributed.ROWS_PER_FEATURE = default
    return results


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("kind", ["collapsed", "decaying", "zero rows"])
def test_routes_agree_on_hard_features(ranks, kind, center):
    """Nearly collapsed ones above all: centred by the ranks' means, nothing cancels."""
    z = features(kind, 30, 6, dtype=torch.float64)
    for (value, (grad,)), (expected_value, (expected_grad,)) in ranks(
        routes_on_rank, 3, center, z, [10, 0, 20]
    ):
        torch.testing.assert_close(value, expected_value, rtol=1e-9, atol=0)
        largest = expected_grad.abs().max() if expected_grad.numel() else 1
        assert_close(grad, expected_grad, 1e-6, largest, kind)


def strided_on_rank(group, rank, z, sizes):
    (own,), _ = own_rows(rank, [z], {}, sizes)
    wide = torch.stack([own, own], -1).flatten(-2)
    results = []
    for x in (own, own.mT.contiguous().mT, wide[..., ::2]):
        results.append(value_and_grads(partial(fast_gram, process_group=group), [x], {}))
    return results


@pytest.mark.parametrize("shape", [(3, 1), (2, 5, 1), (2, 5, 4), (2, 20, 4)], ids=str)
def test_any_strides(ranks, shape):
    """A single number may have any stride and be contiguous."""
    z = features("gaussian", *shape, dtype=torch.float64)
    for first, *others in ranks(strided_on_rank, 2, z, [1, shape[-2] - 1]):
        for other in others:
            torch.testing.assert_close(other, first)


def empty_on_rank(group, rank, shape):
    z = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    value = fast_matrix_entropy(z, process_group=group)
    value.sum().backward()
    rate = fast_coding_rate(z, 1.0, center=True, process_group=group)
    return value.detach(), rate.detach(), z.grad


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 4, 3), (4, 0), (40, 3)])
def test_nothing_and_zeros(ranks, shape):
    zero = torch.zeros(shape[:-2], dtype=torch.float64)
    for value, rate, grad in ranks(empty_on_rank, 2, shape):
        assert torch.equal(value, zero) and torch.equal(rate, zero)
        assert grad.shape == shape and not grad.any()


def poisoned_on_rank(group, rank, shape, bad):
    z = features("gaussian", *shape, seed=rank)
    if rank == 1:
        z[0, 0, 0] = bad
    z.requires_grad_()
    value = fast_matrix_entropy(z, normalize=False, process_group=group)
    value.sum().backward()
    return value.detach(), z.grad


@pytest.mark.parametrize("shape", [(2, 20, 4), (2, 3, 4)], ids=["reduced", "gathered"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_of_one_rank_is_the_nan_of_all(ranks, bad, shape):
    for value, grad in ranks(poisoned_on_rank, 2, shape, bad):
        assert value.isnan().tolist() == [True, False]
        assert grad[0].isnan().all() and grad[1].isfinite().all()


def scaled_on_rank(group, rank, scale):
    z = features("gaussian", 20, 4, seed=rank) * scale
    return fast_matrix_entropy(z, 2.0, normalize=False, process_group=group)


def test_entropy_does_not_depend_on_the_scale(ranks):
    expected_value = ranks(scaled_on_rank, 2, 1.0)[0]
    for scale in (1e-25, 1e25):
        for value in ranks(scaled_on_rank, 2, scale):
            torch.testing.assert_close(value, expected_value, rtol=1e-6, atol=0)


NCCL = pytest.param(
    "nccl",
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


@pytest.mark.parametrize(("backend", "device"), [("gloo", "cpu"), NCCL])
@pytest.mark.parametrize("shape", [REDUCED, GATHERED], ids=["reduced", "gathered"])
def test_backend_of_the_group(backend, device, shape):
    """All that NCCL can be asked on one GPU: a group of one rank, through every collective."""
    store = dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        z = features("gaussian", *shape, dtype=torch.float64).to(device)
        for center in (False, True):
            function = partial(fast_matrix_entropy, center=center, normalize=False)
            one = value_and_grads(function, [z], {})
            shared = value_and_grads(partial(function, process_group=dist.group.WORLD), [z], {})
            torch.testing.assert_close(shared, one, rtol=1e-9, atol=1e-12)
    finally:
        dist.destroy_process_group()


def control_on_rank(group, rank):
    """As with a backend that carries no CPU tensors."""
    original = dist.get_backend_config
    dist.get_backend_config = lambda group: "cuda:nccl"
    try:
        first, second = (distributed._control_group(group) for _ in range(2))
    finally:
        dist.get_backend_config = original
    same = dist.get_process_group_ranks(first) == dist.get_process_group_ranks(group)
    return first is second, first is not group, same, distributed._control_group(group) is group


def test_a_group_without_cpu_gets_one_that_has(ranks):
    assert ranks(control_on_rank, 3) == [(True, True, True, True)] * 3
