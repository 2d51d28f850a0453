"""On a CUDA device: the accuracy rule, streams, graphs, no host synchronisation, autocast.

The same checks run on the CPU where they mean something there, so that they are known to work.
"""

import math
from functools import partial

import pytest
import torch

from mmae_fast import fast_coding_rate, fast_gram, fast_matrix_entropy, reference
from mmae_fast.backends import cuda_backend, dispatch

from .accuracy import (
    Quantity,
    Result,
    coding_rate,
    entropy,
    expected,
    features,
    gram,
    largest,
    run,
)

HAS_CUDA = torch.cuda.is_available()
needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device: PyTorch sees none"),
]
cuda_only = lambda test: needs_cuda[0](needs_cuda[1](test))  # noqa: E731
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
CUDA_BACKENDS = [b for b in dispatch.BACKENDS if dispatch.refusal(b, "cuda") is None]
# One side smaller, the other one, more than one tile, more matrices than multiprocessors.
SHAPES = [
    (1, 1),
    (3, 7, 9),
    (17, 8),
    (2, 2, 33, 49),
    (4, 64, 64),
    (2, 197, 48),
    (130, 70),
    (150, 140),
    (300, 9, 5),
]
CAPTURED = [coding_rate(0.1), entropy(2.0)]


class Rational(Quantity):
    def fast(self, z, backend, **rows):
        return fast_matrix_entropy(z, method="rational", backend=backend, **rows)


# What a CUDA graph can hold: (backend, quantity, shape).
WITHOUT_EIGENVALUES = [*CAPTURED, Rational("rational", 1.0)]
CAPTURES = [
    (backend, q, shape)
    for backend in CUDA_BACKENDS
    for q in WITHOUT_EIGENVALUES
    for shape in [(64, 50, 96), (4, 300, 64), (500, 200)]
]
# By the kernels of csrc/cuda also what needs eigenvalues, which PyTorch's libraries look at.
CAPTURES += [
    ("cuda", entropy(alpha), shape)
    for alpha in (1.0, 3.0, math.inf)
    for shape in [(64, 50, 96), (4, 300, 64), (500, 140)]
    if "cuda" in CUDA_BACKENDS
]
QUANTITIES = [
    *CAPTURED,
    entropy(1.0),
    entropy(0.5),
    entropy(3.0),
    entropy(math.inf),
    gram("samples"),
    gram("features"),
]


def name(x):
    return f"{x.kind}-{x.parameter}" if hasattr(x, "kind") else None


def largest_order(q):
    """Of the compiled kernels for this quantity, on the current device."""
    key = {"coding_rate": "coding rate"}.get(q.kind, "other alpha")
    return cuda_backend.limits(device=torch.cuda.current_device())[key]


def check_on(device, q, z, backend, **rows):
    """The rule of accuracy.py for z (on the CPU), computed on a device."""
    truth, cotangent, *allowed = expected(q, z, rows)
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in rows.items()}
    fast = partial(q.fast, backend=backend, **moved)
    found = Result(*run(fast, z.to(device), cotangent.to(device)))
    assert found.value.device.type == found.grad.device.type == torch.device(device).type
    assert found.grad.dtype == z.dtype
    value_error = largest(found.value.cpu().double() - truth.value, 2 if q.kind == "gram" else 0)
    grad_error = largest(found.grad.cpu().double() - truth.grad, 2)
    for what, error, limit in zip(
        ("value", "grad"), (value_error, grad_error), allowed, strict=True
    ):
        worst = (error / limit).nan_to_num(torch.inf).max()
        assert worst <= 1, f"{backend} {name(q)} {tuple(z.shape)} {z.dtype} {what}: {worst:.3g}x"


def value_and_grad(q, z, cotangent, backend="auto"):
    z = z.detach().requires_grad_()
    value = q.fast(z, backend)
    return value.detach(), torch.autograd.grad(value, z, cotangent)[0]


def example(device, *shape, seed=0):
    z = features("gaussian", *shape, seed=seed).to(device)
    return z, torch.ones(shape[:-2], device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("q", QUANTITIES, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_value_and_gradient(device, q, dtype):
    for backend in CUDA_BACKENDS if device == "cuda" else ["torch"]:
        shapes = SHAPES if device == "cuda" else SHAPES[1:3]
        if backend == "triton":  # a shape is a few compilations
            shapes = SHAPES[3::2]
        for i, shape in enumerate(shapes):
            check_on(device, q, features("gaussian", *shape, dtype=dtype, seed=i), backend)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("q", QUANTITIES, ids=name)
def test_rows(device, q):
    """Centring, masks, no normalisation; an expanded and a transposed input."""
    if q.kind == "entropy" and q.parameter < 1:
        pytest.skip("no derivative at the zero eigenvalues that centring and masks make")
    mask = torch.arange(9) % 3 != 1
    for backend in CUDA_BACKENDS if device == "cuda" else ["torch"]:
        z = features("gaussian", 3, 9, 14)
        check_on(device, q, z, backend, center=True)
        check_on(device, q, z, backend, normalize=False)
        check_on(device, q, z, backend, mask=mask.expand(3, 9), center=True)
        check_on(device, q, features("gaussian", 3, 14, 9).mT, backend)
        check_on(device, q, features("gaussian", 9, 14).expand(2, 9, 14), backend)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("q", QUANTITIES, ids=name)
def test_nonfinite_in_one_matrix(device, q):
    z, _ = example(device, 3, 6, 10)
    z[1, 2, 3] = torch.nan
    z = z.requires_grad_()
    value = q.fast(z, "auto")
    grad = torch.autograd.grad(value.sum(), z)[0]
    finite = torch.isfinite(value.detach().flatten(1) if value.dim() > 1 else value.unsqueeze(1))
    assert finite.all(1).tolist() == [True, False, True]
    assert torch.isfinite(grad[[0, 2]]).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("q", QUANTITIES, ids=name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(device, q, dtype):
    z, cotangent = example(device, 2, 12, 20)
    if q.kind == "gram":
        cotangent = torch.ones_like(q.fast(z, "auto"))
    plain = value_and_grad(q, z, cotangent)
    with torch.autocast(device, dtype=dtype):
        inside = value_and_grad(q, z, cotangent)
    for a, b in zip(plain, inside, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@cuda_only
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("q", QUANTITIES, ids=name)
def test_other_stream(q, backend):
    """z is filled late on a side stream; work put on another stream would read the zeros."""
    shape = (8, 24, 40)
    z, cotangent = example("cuda", *shape)
    if q.kind == "gram":
        cotangent = torch.ones_like(q.fast(z, backend))
    plain = value_and_grad(q, z, cotangent, backend)
    late = torch.zeros_like(z)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # cycles
        late.copy_(z)
        found = value_and_grad(q, late, cotangent, backend)
    torch.cuda.synchronize()
    for a, b in zip(plain, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@cuda_only
@pytest.mark.parametrize(("backend", "q", "shape"), CAPTURES, ids=name)
def test_cuda_graph(q, backend, shape):
    """Forward and backward in one graph, replayed on other data."""
    z, cotangent = example("cuda", *shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the libraries make handles and workspaces on first use
        for _ in range(2):
            value_and_grad(q, z, cotangent, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_grad(q, z, cotangent, backend)
    for seed in (1, 2):
        other, _ = example("cuda", *shape, seed=seed)
        z.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, value_and_grad(q, other, cotangent, backend), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@cuda_only
@pytest.mark.parametrize(("backend", "q", "shape"), CAPTURES, ids=name)
def test_no_host_synchronisation(q, backend, shape):
    z, cotangent = example("cuda", *shape)
    value_and_grad(q, z, cotangent, backend)  # handles and workspaces
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_grad(q, z, cotangent, backend)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@cuda_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("q", QUANTITIES, ids=name)
def test_second_device(q, backend):
    """The device of z counts, not the current one."""
    assert torch.cuda.current_device() == 0
    check_on("cuda:1", q, features("gaussian", 3, 12, 20), backend)
    assert torch.cuda.current_device() == 0


@cuda_only
@pytest.mark.parametrize("q", QUANTITIES, ids=name)
def test_large_matrix(q):
    """Beyond one tile and one wave of thread blocks, on both sides."""
    for backend in CUDA_BACKENDS:
        check_on("cuda", q, features("gaussian", 700, 520), backend)
        check_on("cuda", q, features("gaussian", 260, 1100), backend)


# --------------------------------------------------------------------------------------------------
# Triton: what the interpreter and the compiler cannot see (test_triton.py does the rest)

triton_only = lambda test: cuda_only(  # noqa: E731
    pytest.mark.skipif(
        "triton" not in CUDA_BACKENDS, reason=f"triton: {dispatch.refusal('triton', 'cuda')}"
    )(test)
)


@triton_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(300, 500), (500, 300), (1024, 768), (3, 280, 261), (4, 128, 200), (4, 200, 64)]
)
def test_triton_tiles(dtype, shape):
    """Every table of kernels/configs.py, split and whole depths, at the accuracy of float32."""
    for q in (coding_rate(0.1), entropy(2.0), gram("samples"), gram("features")):
        check_on("cuda", q, features("gaussian", *shape, dtype=dtype), "triton")
    check_on(
        "cuda", entropy(2.0), features("collapsed", *shape, dtype=dtype), "triton", center=True
    )


@triton_only
def test_triton_is_bitwise_reproducible():
    for shape in [(1024, 768), (64, 50, 768), (4096, 300)]:
        z, cotangent = example("cuda", *shape)
        for q in CAPTURED:
            first, second = (value_and_grad(q, z, cotangent, "triton") for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@triton_only
def test_triton_tf32_on_request():
    z, _ = example("cuda", 600, 400)
    truth = gram("features").truth(z.double()).float()
    full = fast_gram(z, backend="triton")
    less = fast_gram(z, backend="triton", precision="high")
    error = [(g - truth).abs().max() / truth.abs().max() for g in (full, less)]
    assert error[0] < 2e-6 and 1e-6 < error[1] < 2e-3


@triton_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_triton_memory(dtype, normalize):
    """Beside the gradient nothing of the size of z: 32 MiB of rows, and k x k matrices."""
    z = torch.randn(65536, 1024, device="cuda").to(dtype).requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = fast_coding_rate(z, 1e-3, normalize=normalize, center=True, backend="triton")
    (grad,) = torch.autograd.grad(value, z)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - grad.nbytes
    assert extra < (32 + 20 * 4 + 16) << 20


# --------------------------------------------------------------------------------------------------
# csrc/cuda: what the emulator cannot see (test_cuda_*.py do the rest)

compiled_only = lambda test: cuda_only(  # noqa: E731
    pytest.mark.skipif(
        "cuda" not in CUDA_BACKENDS, reason=f"cuda: {dispatch.refusal('cuda', 'cuda')}"
    )(test)
)


@compiled_only
@pytest.mark.parametrize("q", [coding_rate(0.1), entropy(1.0)], ids=name)
@pytest.mark.parametrize("side", ["samples", "features"])
def test_orders_around_the_limits(q, side):
    """The largest matrix that shared memory holds on this device, and the first beyond it."""
    limit = largest_order(q)
    for k in (limit, limit + 1):
        shape = (2, k, k + 3) if side == "samples" else (2, k + 3, k)
        check_on("cuda", q, features("gaussian", *shape), "cuda")


@compiled_only
def test_batched_eigensolver():
    if not cuda_backend.has_solver():
        pytest.skip("this process has no cusolverDnXsyevBatched (CUDA 12.6.2 or newer)")
    for dtype in (torch.float32, torch.float64):
        a = reference.gram(features("gaussian", 5, 40, 60, dtype=dtype).cuda())
        lam, vectors = cuda_backend._eigh_batched(a, True)
        torch.testing.assert_close(lam, torch.linalg.eigvalsh(a), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            (vectors * lam.unsqueeze(-2)) @ vectors.mT, a, rtol=1e-4, atol=1e-5
        )
        alone, _ = cuda_backend._eigh_batched(a, False)
        torch.testing.assert_close(alone, lam, rtol=1e-4, atol=1e-5)


@compiled_only
def test_precision():
    """The tensor cores' operand layout, which no emulator can know, and what each policy rounds."""
    z = features("gaussian", 3, 150, 170)
    for side in ("samples", "features"):
        truth = reference.gram(z.double(), side=side)
        errors = {
            precision: (
                fast_gram(z.cuda(), side=side, backend="cuda", precision=precision).cpu() - truth
            )
            .abs()
            .max()
            for precision in ("highest", "high", "medium")
        }
        assert errors["highest"] < 1e-6
        assert 1e-5 < errors["high"] < 2e-3 and errors["high"] == errors["medium"]


@compiled_only
@pytest.mark.parametrize("q", QUANTITIES, ids=name)
def test_two_runs_agree_bitwise(q):
    z, cotangent = example("cuda", 40, 60, 70)
    if q.kind == "gram":
        cotangent = torch.ones_like(q.fast(z, "cuda"))
    first, second = (value_and_grad(q, z, cotangent, "cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
