"""The CUDA kernels on ready Gram matrices: plans, convergence, sizes above the fused kernel's."""

import math

import pytest
import torch

from mmae_fast import reference
from mmae_fast.backends import cuda_backend, dispatch

from .accuracy import coding_rate, entropy, features, gram
from .cuda_emulation.harness import check, emulated, emulator, needs_emulator  # noqa: F401

pytestmark = needs_emulator

# Bytes of shared memory that a block may have: H100 and B200; A100; RTX 30, 40 and 50.
BUDGETS = (227 * 1024, 163 * 1024, 99 * 1024)


def test_orders():
    """What docs/cuda.md promises, and that the plans of all smaller orders fit as well."""
    m = emulator()
    limits = {
        ("packed_rate", False): (256, 256, 217),
        ("packed_rate", True): (233, 196, 151),
        ("packed_renyi2", False): (256, 256, 256),
        ("packed_renyi2", True): (256, 256, 256),
        ("jacobi", False): (235, 198, 153),
        ("jacobi", True): (165, 139, 103),
    }
    for (name, is_double), wanted in limits.items():
        kernel = getattr(m.Kernel, name)
        assert tuple(m.largest_order(kernel, is_double, b) for b in BUDGETS) == wanted, name
        for budget, limit in zip(BUDGETS, wanted, strict=True):
            for k in range(limit + 1):
                assert m.plan(kernel, k, is_double)["shared_bytes"] <= budget


def test_lanes():
    """The pairs of a warp lie in different banks, and a pair fits the registers of its lanes."""
    for k in range(257):
        for is_double in (False, True):
            plan = emulator().plan(emulator().Kernel.jacobi, k, is_double)
            lanes, ld = plan["lanes"], plan["ld"]
            assert ld >= k and lanes * emulator().entries_per_lane >= k
            assert plan["threads"] % 64 == 0 and plan["threads"] <= 512
            # A warp's access is one or, in float64, two: to the words of 32 or 16 lanes.
            words, pairs = (16, 16 // lanes) if is_double else (32, 32 // lanes)
            for step in (1, -1):
                starts = {step * pair * ld % words // min(lanes, words) for pair in range(pairs)}
                assert len(starts) == max(pairs, 0)


@pytest.mark.parametrize("kind", ["gaussian", "collapsed", "rank3", "decaying", "orthonormal"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((50, 64), torch.float32), ((64, 50), torch.float64), ((65, 66), torch.float32)],
    ids=str,
)
def test_spectra(shape, dtype, kind):
    z = features(kind, *shape, dtype=dtype)
    check(entropy(1.0), z, center=shape[0] == 50)


@pytest.mark.parametrize("alpha", [0.5, 1.01, 1.5, 5.0])
def test_orders_of_entropy(alpha):
    for dtype in (torch.float32, torch.float64):
        check(entropy(alpha), features("gaussian", 2, 11, 17, dtype=dtype))
        check(entropy(alpha), features("collapsed", 2, 17, 11, dtype=dtype))


@pytest.mark.parametrize(("n", "d"), [(129, 133), (133, 129), (97, 97)], ids=str)
def test_packed(ops, n, d):
    dtype = torch.float64 if n == 97 else torch.float32
    z = features("gaussian", n, d, dtype=dtype)
    check(coding_rate(1.0), z)
    check(coding_rate(1.0), z, center=True, need_grad=n == 97)
    check(entropy(2.0), z, normalize=False)
    assert all(len(launch) == 3 for launch in ops.launches)
    kernel = emulator().Kernel.packed_rate
    shared = emulator().plan(kernel, min(n, d), dtype == torch.float64)["shared_bytes"]
    assert [1, 512, shared] in ops.launches


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(197, 200), (200, 197), (256, 256)], ids=str)
@pytest.mark.parametrize("q", [coding_rate(1.0), entropy(2.0), entropy(1.0)], ids=str)
def test_large(shape, q):
    if q == entropy(1.0) and shape[0] == 256:
        pytest.skip("k = 256 does not fit into shared memory")
    check(q, features("gaussian", *shape), center=shape[0] == 200)


def test_a_pair_per_warp():
    """k > 128: the whole warp holds a pair of columns."""
    check(entropy(1.0), features("rank3", 129, 131), center=True)


@pytest.mark.parametrize("k", [1, 2, 7, 33])
@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0, math.inf])
def test_ready_matrices(alpha, k):
    """Gram matrices that no features are known of, such as a product of two."""
    x = features("gaussian", 2, 3, k, k + 2, dtype=torch.float64)
    g = reference.gram(x) * reference.gram(x.flip(0)) * 1e-3
    value, v = cuda_backend.gram_entropy_fwd(g.float(), alpha, True)
    exact = g.float().double().requires_grad_()
    wanted = reference.entropy_of_gram(exact, alpha)
    wanted.sum().backward()
    torch.testing.assert_close(value.double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    # A symmetric derivative, up to the multiple of G that scaling does not see.
    symmetric = (exact.grad + exact.grad.mT) / 2
    scale = (
        symmetric.abs().amax((-2, -1), keepdim=True)
        + 1 / exact.detach().diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    )
    assert ((v - symmetric).abs() / scale).max() < 2e-5


def test_ready_matrices_that_are_not_finite():
    g = torch.eye(5).expand(3, 5, 5).clone()
    g[1, 0, 3] = math.nan  # off the diagonal: the trace does not show it
    g[2, 2, 2] = math.inf
    for alpha in (1.0, 3.0, math.inf):
        value, weight = cuda_backend.gram_entropy_fwd(g, alpha, True)
        assert value.isfinite().tolist() == [True, False, False]
        assert weight[0].isfinite().all() and weight[1:].isnan().all()
    value, weight = cuda_backend.gram_entropy_fwd(torch.zeros(2, 4, 4), 1.0, True)
    assert (value == 0).all() and (weight == 0).all()


def test_joint_entropy():
    """Both views' gradients through the backend."""
    z1, z2 = (features("gaussian", 2, 9, 12, seed=seed, dtype=torch.float64) for seed in (1, 2))
    got = cuda_backend.joint_entropy_fwd(z1, z2, None, 1.0, True, False, False)[0]
    torch.testing.assert_close(got, reference.joint_entropy(z1, z2, 1.0))


def test_ladder_of_eigensolvers(ops):
    """Above the kernels: the vendor's batched one for a batch, PyTorch's for a matrix."""
    ops.shared = 16 * 1024
    one, many = features("gaussian", 60, 61), features("gaussian", 2, 60, 61)
    for z, solver, called in ((one, True, False), (many, True, True), (many, False, False)):
        ops.solver, ops.launches = solver, []
        check(entropy(1.0), z, center=True)
        assert ("eigh" in ops.launches) == called
    ops.solver = True
    joint = cuda_backend.joint_entropy_fwd(many, many, None, 3.0, True, False, True)
    truth = reference.joint_entropy(many.double(), many.double(), 3.0)
    torch.testing.assert_close(joint[0].double(), truth, rtol=1e-5, atol=1e-6)
    assert "eigh" in ops.launches


def test_limits(ops):
    assert cuda_backend.limits() == {"coding rate": 256, "alpha = 2": 256, "other alpha": 235}
    ops.shared = 99 * 1024
    assert cuda_backend.limits(True) == {"coding rate": 151, "alpha = 2": 256, "other alpha": 103}


def gram_errors(z, **options):
    """Largest errors of both sides' Gram matrices."""
    return [
        (fast_gram(z, side, **options).double() - reference.gram(z.double(), side=side))
        .abs()
        .max()
        .item()
        for side in ("samples", "features")
    ]


def fast_gram(z, side, precision="highest"):
    module = cuda_backend.at(precision)
    return module.gram(z, None, side == "samples", True, False).gram


def test_precision():
    """Three passes are float32; one rounds to 2^-11 where it is permitted, and nowhere else."""
    z = features("gaussian", 70, 90)
    assert max(gram_errors(z)) < 1e-6
    for precision in ("high", "medium"):
        assert all(1e-5 < error < 2e-3 for error in gram_errors(z, precision=precision))
    assert max(gram_errors(z.double(), precision="medium")) < 1e-13
    assert dispatch.module("cuda:high").gram.keywords == {"tf32": True}
    value, _ = cuda_backend.at("medium").matrix_entropy_fwd(z, None, 1.0, True, False, False)
    truth = reference.matrix_entropy(z.double())
    assert 1e-8 < abs(value.item() - truth.item()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_16_bit_numbers_are_exact(dtype):
    """Whatever the lengths of the rows; precision has nothing to permit on the samples side."""
    scales = torch.logspace(-30, 30, 20) if dtype == torch.bfloat16 else torch.logspace(-3, 3, 20)
    z = (features("gaussian", 20, 90) * scales.unsqueeze(-1)).to(dtype)
    samples, side = gram_errors(z), gram_errors(z, precision="medium")
    assert samples[0] < 3e-7 and side[0] == samples[0]
    assert samples[1] < 3e-6


@pytest.mark.parametrize("side", ["samples", "features"])
def test_sums_of_tensor_cores_stay_short(side):
    """Thousands of nearly equal products, all of which truncated sums would round down."""
    z = features("collapsed", 3, 3000)
    check(gram(side), z if side == "samples" else z.mT.contiguous())


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("none", None),
        ("short", "does not fit into the plan's shared memory"),
        ("stride", "index 90 of a shared array of 90"),
        ("overlap", "race"),
    ],
)
def test_mistakes_in_a_plan_are_found(ops, mistake, message):
    g = reference.gram(features("gaussian", 10, 12))
    value, weight = torch.zeros(()), torch.zeros(10, 10)
    run = emulator().mistaken_jacobi
    arguments = (ops.describe(g, None, False, False), value.data_ptr(), weight.data_ptr())
    if message is None:
        run(emulator().Mistake.none, *arguments)
        torch.testing.assert_close(value, reference.entropy_of_gram(g))
    else:
        with pytest.raises(RuntimeError, match=message):
            run(getattr(emulator().Mistake, mistake), *arguments)
