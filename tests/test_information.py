"""Joint entropy, mutual information and what else the module offers: values, accuracy, errors.

The accuracy rule is that of accuracy.py, for two views: pairs.py.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mmae_fast import fast_gram, fast_matrix_entropy, information, reference
from mmae_fast.information import (
    conditional_entropy,
    joint_entropy,
    matrix_cross_entropy,
    matrix_kl,
    mutual_information,
    rbf_gram,
)

from .accuracy import BACKENDS, DTYPES, features, run
from .pairs import ALPHAS, ROWS, check_joint, run_pair, views

# --------------------------------------------------------------------------------------------------
# The published code

with np.load(Path(__file__).parent / "golden" / "matrix_information.npz") as file:
    GOLDEN = {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", ["0.5", "1", "1.01", "2", "3", "5"])
@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_published_values(case, alpha, backend):
    z1, z2 = GOLDEN[f"{case}_z1"], GOLDEN[f"{case}_z2"]
    n, d = z1.shape
    # The published code takes eigenvalues of the n x n matrix: for n > d it adds up n - d roots of
    # rounding errors, sqrt(1e-17) each. The joint spectrum has no zeros.
    loose = 1e-7 if alpha == "0.5" and n > d else 1e-9
    for name, function, bound in [
        ("H12", joint_entropy, 1e-9),
        ("I", mutual_information, loose),
        ("Hcond", conditional_entropy, loose),
    ]:
        expected = GOLDEN[f"{case}_alpha{alpha}_{name}"]
        actual = function(z1, z2, float(alpha), backend=backend)
        torch.testing.assert_close(actual, expected, rtol=bound, atol=bound, msg=name)
        k1, k2 = (fast_gram(z, side="samples", backend=backend) for z in (z1, z2))
        actual = function(k1, k2, float(alpha), from_gram=True, backend=backend)
        torch.testing.assert_close(actual, expected, rtol=bound, atol=bound, msg=name)


# --------------------------------------------------------------------------------------------------
# The accuracy rule

SHAPES = [(1, 1, 1), (1, 5, 3), (2, 3, 3), (7, 9, 4), (8, 8, 8), (9, 7, 16), (16, 5, 40)]
SHAPES += [(17, 15, 17), (33, 20, 50), (48, 31, 8), (65, 70, 3)]
BATCHES = [(), (3,), (2, 3)]


def mask_of(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 1 / 3
    if len(shape) > 1:
        mask.reshape(-1, shape[-1])[-1] = False  # drops all of the last matrix
    return mask


def differentiable(alpha, z1, z2, rows):
    """Whether the order has a derivative: below 1 none at a zero eigenvalue of K1 ⊙ K2."""
    if alpha >= 1:
        return True
    x1, x2 = (reference.prepare(z.double(), **rows) for z in (z1, z2))
    w = (x1.unsqueeze(-1) * x2.unsqueeze(-2)).flatten(-2)
    lam = torch.linalg.svdvals(w).square()
    return w.shape[-2] <= w.shape[-1] and bool((lam[..., -1] > 1e-6 * lam[..., 0]).all())


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grid(shape, alpha):
    """Shapes with orders; dtype, batch, row options and mask take turns."""
    n, d1, d2 = shape
    i = SHAPES.index(shape) + 2 * ALPHAS.index(alpha)
    for turn in range(4):
        dtype = DTYPES[(i + turn) % 4]
        batch, rows = BATCHES[(i // 2 + turn) % 3], ROWS[(i // 3 + turn) % 4]
        z1, z2 = views(*batch, n, d1, d2=d2, dtype=dtype)
        if (i + turn) % 3 == 0:
            rows = rows | {"mask": mask_of(z1.shape[:-1])}
        # Centring one row, or two normalised ones of opposite sign, leaves nothing but rounding.
        if rows.get("center") and n <= 2:
            continue
        check_joint(alpha, z1, z2, need_grad=differentiable(alpha, z1, z2, rows), **rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "kind", ["collapsed", "rank1", "rank3", "duplicates", "zero rows", "zeros"]
)
@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_difficult_inputs(alpha, kind, dtype):
    for kind2 in ("gaussian", kind):
        z1, z2 = views(2, 20, 33, d2=12, kind=kind, kind2=kind2, dtype=dtype)
        for one, two in ((z1, z2), (z2, z1)):
            check_joint(alpha, one, two)
            check_joint(alpha, one, two, normalize=False)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_huge_and_tiny_scales(scale, alpha):
    """2^±60 in both views: products of Gram entries would leave the float32 range by far."""
    for rows in ROWS[:3]:
        z1, z2 = views(2, 12, 20, d2=9, dtype=torch.float32)
        check_joint(alpha, z1 * scale, z2 * scale, **rows)
        check_joint(alpha, z1 * scale, z2 / scale, **rows)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_more_samples_than_the_compiled_eigensolver_takes(alpha):
    z1, z2 = views(300, 12, d2=20, dtype=torch.float32)
    check_joint(alpha, z1, z2)


# --------------------------------------------------------------------------------------------------
# Special inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("shape", [(0, 4, 4), (4, 0, 3), (3, 4, 0), (0, 0, 0)], ids=str)
def test_empty(shape, alpha, backend):
    n, d1, d2 = shape
    z1, z2 = (torch.randn(2, n, d, requires_grad=True) for d in (d1, d2))
    for function in (joint_entropy, mutual_information, conditional_entropy):
        value = function(z1, z2, alpha, backend=backend)
        assert value.shape == (2,)
        z1.grad = z2.grad = None
        value.sum().backward()
        assert z1.grad.shape == z1.shape and z2.grad.shape == z2.shape
    assert torch.equal(joint_entropy(z1, z2, alpha, backend=backend), torch.zeros(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_and_inf_propagate_and_spare_the_neighbours(poison, alpha, backend):
    for rows in ROWS[:3]:
        function = partial(joint_entropy, alpha=alpha, backend=backend, **rows)
        z1, z2 = views(3, 6, 9, d2=4)
        clean, clean_grads = run_pair(function, z1, z2, torch.ones(3))
        z2[1, 2, 3] = poison
        value, grads = run_pair(function, z1, z2, torch.ones(3))
        assert value.isnan().tolist() == [False, True, False]
        assert not grads[0][1].isfinite().any() and not grads[1][1].isfinite().all()
        for i in (0, 2):
            assert torch.equal(value[i], clean[i])
            assert all(torch.equal(g[i], c[i]) for g, c in zip(grads, clean_grads, strict=True))
    gram = fast_gram(z2, side="samples")
    value = joint_entropy(gram, fast_gram(z1, side="samples"), alpha, from_gram=True)
    assert value.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [joint_entropy, mutual_information, conditional_entropy])
def test_mask_equals_dropping_rows(function, backend):
    z1, z2 = views(9, 6, d2=4)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    dirty = z1.clone()
    dirty[1], dirty[8, 2] = math.nan, math.inf
    for alpha in (1.0, 2.0, 3.0):
        for rows in ROWS:
            expected = function(z1[mask], z2[mask], alpha, backend=backend, **rows)
            actual = function(dirty, z2, alpha, mask=mask, backend=backend, **rows)
            torch.testing.assert_close(actual, expected)
        k1, k2 = (fast_gram(z, side="samples", backend=backend) for z in (dirty, z2))
        actual = function(k1, k2, alpha, mask=mask, from_gram=True, backend=backend)
        expected = function(z1[mask], z2[mask], alpha, backend=backend)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_and_autocast(dtype, backend):
    z1, z2 = views(2, 9, 20, d2=7, dtype=dtype)
    function = partial(mutual_information, alpha=1.0, backend=backend)
    value, grads = run_pair(function, z1, z2, torch.ones(2))
    assert value.dtype == torch.float32 and grads[0].dtype == grads[1].dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, cast_grads = run_pair(function, z1, z2, torch.ones(2))
    assert torch.equal(cast, value)
    assert all(torch.equal(c, g) for c, g in zip(cast_grads, grads, strict=True))
    p = fast_gram(z1).to(dtype)
    assert matrix_kl(p, p).dtype == rbf_gram(z1).dtype == torch.float32


def test_value_is_that_of_the_call_with_gradient():
    z1, z2 = views(2, 9, 20, d2=7, dtype=torch.float32)
    for backend in BACKENDS:
        for alpha in (1.0, 2.0, 3.0):
            with_grad = joint_entropy(z1.clone().requires_grad_(), z2, alpha, backend=backend)
            plain = joint_entropy(z1, z2, alpha, backend=backend)
            assert with_grad.requires_grad and not plain.requires_grad
            torch.testing.assert_close(plain, with_grad.detach(), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Errors

A, B = torch.ones(2, 3, 4), torch.ones(2, 3, 5)


@pytest.mark.parametrize("function", [joint_entropy, mutual_information, conditional_entropy])
@pytest.mark.parametrize(
    ("z1", "z2", "options", "error", "message"),
    [
        (None, B, {}, TypeError, "z1 must be a torch.Tensor, got NoneType"),
        (A, [1], {}, TypeError, "z2 must be a torch.Tensor, got list"),
        (A.int(), B, {}, TypeError, "z1 must be float32, .* got torch.int32"),
        (A, B.double(), {}, TypeError, "one dtype, got torch.float32 and torch.float64"),
        (A, B.to("meta"), {}, ValueError, "one device, got cpu and meta"),
        (A, B[0, 0], {}, ValueError, r"z2 must have shape \(\.\.\., n, d\), got \(5,\)"),
        (A, B[:, :2], {}, ValueError, r"same leading .* got \(2, 3, 4\) and \(2, 2, 5\)"),
        (A, B[:1], {}, ValueError, r"same leading .* got \(2, 3, 4\) and \(1, 3, 5\)"),
        (A, B, {"alpha": 0}, ValueError, r"alpha must be > 0, got 0\.0"),
        (A, B, {"alpha": "2"}, TypeError, "alpha must be a Python number, got '2'"),
        (A, B, {"mask": torch.ones(3).bool()}, ValueError, r"\(2, 3\), got \(3,\)"),
        (A, B, {"mask": torch.ones(2, 3)}, TypeError, "mask must be a bool tensor"),
        (A, B, {"backend": "gpu"}, ValueError, "got 'gpu'"),
        (A, B, {"backend": "cuda"}, RuntimeError, "'cuda' is not available"),
        (A, B, {"from_gram": True}, ValueError, r"z1 must be a Gram .* got \(2, 3, 4\)"),
        (
            A[..., :3],
            A[..., :3],
            {"from_gram": True, "center": True},
            ValueError,
            "center=True is not defined for from_gram=True",
        ),
    ],
)
def test_wrong_views(function, z1, z2, options, error, message):
    with pytest.raises(error, match=message):
        function(z1, z2, **options)


@pytest.mark.parametrize("function", [matrix_cross_entropy, matrix_kl])
@pytest.mark.parametrize(
    ("p", "q", "error", "message"),
    [
        (1.0, A, TypeError, "p must be a torch.Tensor, got float"),
        (A, A, ValueError, r"p must be square, \(\.\.\., d, d\), got \(2, 3, 4\)"),
        (torch.eye(3), torch.eye(3).double(), TypeError, "one dtype"),
        (torch.eye(3), torch.eye(4), ValueError, r"one shape, got \(3, 3\) and \(4, 4\)"),
        (torch.eye(3), torch.eye(3, device="meta"), ValueError, "one device"),
    ],
)
def test_wrong_matrices(function, p, q, error, message):
    with pytest.raises(error, match=message):
        function(p, q)


def test_wrong_bandwidth():
    for bandwidth, error in ((0, ValueError), (-1.0, ValueError), ("a", TypeError)):
        with pytest.raises(error, match="bandwidth must be"):
            rbf_gram(A, bandwidth)


def test_module_is_public():
    import mmae_fast

    assert mmae_fast.information is information


def test_run_helper_agrees_with_the_single_view():
    """H(K ⊙ 1 1ᵀ) is the entropy of one view, value and gradient (run is accuracy.py's)."""
    z = features("gaussian", 3, 6, 9, dtype=torch.float64)
    silent = torch.ones(3, 6, 1).double()
    for alpha in (1.0, 2.0):
        one = run(lambda y: joint_entropy(y, silent, alpha), z, torch.ones(3))  # noqa: B023
        two = run(lambda y: fast_matrix_entropy(y, alpha), z, torch.ones(3))  # noqa: B023
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b)
