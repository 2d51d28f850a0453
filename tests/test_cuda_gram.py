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


def gradient_error(z, precision, normalize=True, center=False):
    """Of order 2, with a weight at full precision, relative to the largest entry."""
    x = z.double().requires_grad_()
    reference.matrix_entropy(x, 2.0, normalize=normalize, center=center).backward()
    _, weight = cuda_backend.matrix_entropy_fwd(z, None, 2.0, normalize, center, True)
    run = cuda_backend.at(precision).weight_bwd
    got = run(weight.new_ones(()), z, None, weight, normalize, center)
    return ((got - x.grad).abs().max() / x.grad.abs().max()).item()


def test_precision(ops):
    """Three passes are float32; one rounds to 2^-11 where it is permitted, and nowhere else."""
    z = features("gaussian", 70, 90)
    assert max(gram_errors(z)) < 1e-6
    for precision in ("high", "medium"):
        assert all(1e-5 < error < 2e-3 for error in gram_errors(z, precision=precision))
    assert max(gram_errors(z.double(), precision="medium")) < 1e-13
    assert dispatch.module("cuda:high").gram.keywords == {"tf32": True}
    truth = reference.matrix_entropy(z.double(), 2.0)
    for alpha in (1.0, 2.0):
        for ops.fused in (True, False):
            errors = []
            for precision in ("highest", "medium"):
                module = cuda_backend.at(precision)
                value, _ = module.matrix_entropy_fwd(z, None, alpha, True, False, False)
                truth = reference.matrix_entropy(z.double(), alpha)
                errors.append(abs(value.item() - truth.item()))
            assert errors[0] < 1e-6 and 1e-8 < errors[1] < 1e-3


@pytest.mark.parametrize("shape", [(70, 90), (90, 70), (300, 130)], ids=str)
@pytest.mark.parametrize("rows", [{}, {"center": True}, {"normalize": False}], ids=str)
def test_precision_of_gradients(shape, rows):
    z = features("gaussian", *shape)
    assert gradient_error(z, "highest", **rows) < 2e-6
    assert all(1e-5 < gradient_error(z, word, **rows) < 4e-3 for word in ("high", "medium"))
    assert gradient_error(z.double(), "medium", **rows) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_16_bit_numbers_are_exact(dtype):
    """Whatever the lengths of the rows; precision has nothing to permit on the samples side."""
    scales = torch.logspace(-30, 30, 20) if dtype == torch.bfloat16 else torch.logspace(-3, 3, 20)
    z = (features("gaussian", 20, 90) * scales.unsqueeze(-1)).to(dtype)
    samples, side = gram_errors(z), gram_errors(z, precision="medium")
    assert samples[0] < 3e-7 and side[0] == samples[0]
    assert samples[1] < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_range_of_16_bit_numbers(dtype):
    """The largest and the smallest that there are, in one row and in many, and beyond them."""
    info = torch.finfo(dtype)
    z = features("gaussian", 6, 40).clamp(-1, 1).double()
    largest, smallest = info.max * 0.9, info.smallest_normal * info.eps
    for scales in ([largest] * 6, [largest, 1, 1, 1, 1, smallest * 1e3], [smallest * 1e3] * 6):
        x = (z * torch.tensor(scales).unsqueeze(-1)).to(dtype)
        # A row shorter than 2^-128 has no float32 for one over its length.
        if dtype == torch.float16 or min(scales) > 2.0**-120:
            assert gram_errors(x)[0] < 3e-7
    x = z.to(dtype)
    for bad in (math.nan, math.inf):
        x[2, 3] = bad
        g = fast_gram(x, "samples")
        assert not g[2].isfinite().any() and not g[:, 2].isfinite().any()
        others = torch.arange(6) != 2
        assert g[others][:, others].isfinite().all()
        assert coding_rate_of(x).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_alignment_does_not_matter(ops, dtype):
    """Vectors where rows are aligned, single numbers where not: the same bits."""
    z = features("gaussian", 2, 21, 90, dtype=dtype)
    for d in (1, 7, 8, 90):
        spaced = torch.stack([z, z], -1).flatten(-2)[..., : 2 * d : 2]
        shifted = torch.cat([z[..., :1], z], -1)[..., 1 : d + 1]
        aligned = torch.nn.functional.pad(z[..., :d], (0, 96 - d))[..., :d]
        results = [(fast_gram(x, "samples"), coding_rate_of(x)) for x in (aligned, shifted, spaced)]
        for got, rate in results[1:]:
            assert torch.equal(got, results[0][0]) and torch.equal(rate, results[0][1])


def coding_rate_of(z):
    return cuda_backend.coding_rate_fwd(z, None, 1.0, True, False, False)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 9), (33, 70), (65, 66), (70, 33), (130, 129)], ids=str)
def test_gradients_of_16_bit_features(shape, dtype):
    z = features("gaussian", *shape, dtype=dtype)
    for rows in ({}, {"center": True}, {"normalize": False}):
        check(coding_rate(1.0), z, **rows)
        check(entropy(1.0), z, **rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lanes_of_tensor_cores(dtype):
    """The emulated instructions against a description of their operands by someone else."""
    depth = 8 if dtype == torch.float32 else 16
    left = torch.arange(16.0 * depth).reshape(16, depth).sin().mul(64).round().to(dtype)
    right = torch.arange(8.0 * depth).reshape(8, depth).cos().mul(64).round().to(dtype)
    assert torch.equal(warp_product(left, right), left.float() @ right.float().mT)  # integers


def warp_product(left, right):
    """left (16, depth) right (8, depth)ᵀ by one emulated instruction."""
    out = torch.empty(16, 8)
    code = (torch.float32, torch.float64, torch.bfloat16, torch.float16).index(left.dtype)
    emulator().warp_product(code, left.data_ptr(), right.data_ptr(), out.data_ptr())
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_truncation_of_tensor_cores(dtype):
    """Terms end one bit below float32's last of the largest; each half of the depth is a sum."""
    depth = 8 if dtype == torch.float32 else 16
    eps, second = 2.0**-23, depth // 2
    sums = (  # products by position, and what becomes of their sum
        ({0: 1, 1: eps / 2}, 1),
        ({0: 1, 1: eps / 2, 2: eps / 2}, 1 + eps),
        ({0: 1, 1: eps / 4, 2: eps / 4, 3: eps / 4}, 1),  # none reaches the bit
        ({0: 1, 1: eps / 2, second: eps / 2}, 1),  # apart
        ({second: 1, second + 1: eps / 2, second + 2: eps / 2}, 1 + eps),
        ({0: 1, 1: -eps / 4}, 1),
        ({0: 1, 1: -eps / 2}, 1 - eps / 2),
        ({0: 1 + 2.0**-7, 1: -1, 2: eps / 4}, 2.0**-7),  # they cancel too late
    )
    left, right = torch.zeros(16, depth), torch.full((8, depth), 2.0**-12)
    for row, (products, _) in enumerate(sums):
        for at, x in products.items():
            left[row, at] = x * 2.0**12
    for sign in (1, -1):
        got = warp_product((sign * left).to(dtype), right.to(dtype))
        for row, (_, wanted) in enumerate(sums):
            assert (got[row] == sign * wanted).all(), (row, got[row] - sign * wanted)


def test_banks():
    """What the lanes of a warp read or write at once lies in 32 banks."""
    for depth in (32, 128, 256):
        for writes in (True, False):
            assert sorted(emulator().banks(depth, writes)) == list(range(32))


@pytest.mark.parametrize("side", ["samples", "features"])
def test_sums_of_tensor_cores_stay_short(side):
    """Thousands of nearly equal products, all of which truncated sums would round down."""
    z = features("collapsed", 3, 3000)
    check(gram(side), z if side == "samples" else z.mT.contiguous())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for d in (128, 384, 3000):  # eager has rows of rank 1 right to the last bit
            check(gram(side), features("rank1", 4, d, dtype=dtype), need_grad=side == "samples")


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
