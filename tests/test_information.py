"""Joint entropy, mutual information and divergences of matrices.

The accuracy rule is that of accuracy.py, for two views; see :func:`joint_floors`.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from mmae_fast import fast_gram, fast_matrix_entropy, information, reference
from mmae_fast.information import (
    conditional_entropy,
    joint_entropy,
    matrix_cross_entropy,
    matrix_kl,
    mutual_information,
    rbf_gram,
)

from .accuracy import BACKENDS, DTYPES, eager_rows, entropy, features, largest, run, spectral_terms
from .test_properties import KINDS, SEEDS, cases

ALPHAS = (0.5, 1.0, 1.01, 2.0, 3.0, math.inf)
ROWS = [{}, {"center": True}, {"normalize": False}, {"normalize": False, "center": True}]


def views(*shape, d2=None, kind="gaussian", kind2="gaussian", dtype=torch.float64, seed=0):
    *batch, n, d = shape
    z1 = features(kind, *batch, n, d, dtype=dtype, seed=2 * seed)
    return z1, features(kind2, *batch, n, d2 or d, dtype=dtype, seed=2 * seed + 1)


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


def joint_floors(alpha, z1, z2, value, rows):
    """What rounding may do to the value and to both gradients; compare accuracy.floors.

    K1 ⊙ K2 is the Gram matrix of the rows w_i = x_i ⊗ y_i; r1, r2 are the longest rows. Gram
    matrices are off by e_v = 4 eps lam_max(K_v) (more if centred), and a Hadamard product with a
    positive semi-definite matrix of diagonal at most r² magnifies a norm by at most r², so

        delta = r2² e_1 + r1² e_2   in place of   4 eps lam_max.

    Row i of the gradient (V ⊙ K2) X1 is row i of V W contracted with y_i, so the floor is that of
    the features W, times r2 (and the like for view 2).
    """
    q = entropy(alpha)
    eps = torch.finfo(reference.accumulation_dtype(z1.dtype)).eps
    n = z1.shape[-2]
    x, longest, slopes, errors = [], [], [], []
    for z in (z1.detach().double(), z2.detach().double()):
        x.append(reference.prepare(z, **rows))
        uncentred = reference.prepare(z, **rows | {"center": False})
        longest.append(largest(torch.linalg.vector_norm(uncentred, dim=-1), 1))
        slope = torch.ones_like(longest[-1])
        if rows.get("normalize", True):
            norm = reference.prepare(z, normalize=False, mask=rows.get("mask")).norm(dim=-1)
            slope = largest(torch.where(norm > 0, 1 / norm, 0), 1)
        slopes.append(slope)
        norm = torch.linalg.matrix_norm(x[-1], 2)
        error = 4 * eps * norm**2
        if rows.get("center"):
            r = n**0.5 * longest[-1]
            error = error + 4 * eps * r * (norm + eps * r)
        errors.append(error)
    w = (x[0].unsqueeze(-1) * x[1].unsqueeze(-2)).flatten(-2)
    sigma = torch.linalg.svdvals(w)
    sigma = F.pad(sigma, (0, n - sigma.shape[-1]))  # the n x n matrix has n eigenvalues
    tau = sigma.square().sum(-1)
    tau = torch.where(tau == 0, 1, tau)
    delta = longest[1] ** 2 * errors[0] + longest[0] ** 2 * errors[1]
    rho, delta = sigma.square() / tau.unsqueeze(-1), (delta / tau).unsqueeze(-1)
    total = rho.pow(alpha).sum(-1, keepdim=True)
    total = torch.where(total == 0, 1, total)
    h = spectral_terms(q, rho, total)[0]
    _, f, size = spectral_terms(q, torch.maximum(rho, delta / 40), total)
    up, steep, _ = spectral_terms(q, rho + delta, total)
    down = spectral_terms(q, (rho - delta).clamp(min=0), total)[0]
    roundings = 4 * value.abs() + 4 * n**0.5
    if alpha not in (1, math.inf):
        roundings = roundings + 4 * abs(alpha / (1 - alpha))
    turn = (steep - f).abs()
    if alpha == math.inf and n > 1:
        gap = (rho[..., :1] - rho[..., 1:2]).clamp(min=1e-300)
        turn = turn + f.abs() * (delta / gap).clamp(max=1)
    derivative = 4 * eps * largest(size, 1) * (sigma[..., 0] * n**0.5 + longest[0] * longest[1])
    derivative = 2 * (derivative + largest(turn * sigma, 1)) / tau
    conditioning = torch.maximum((up - h).abs(), (down - h).abs()).norm(dim=-1)
    grads = (slopes[0] * longest[1] * derivative, slopes[1] * longest[0] * derivative)
    return eps * roundings + conditioning, grads


def run_pair(function, z1, z2, cotangent):
    z1, z2 = (z.detach().requires_grad_() for z in (z1, z2))
    value = function(z1, z2)
    (value * cotangent.to(value.dtype)).sum().backward()
    return value.detach(), (z1.grad, z2.grad)


def eager_joint_entropy(z1, z2, alpha, **rows):
    x1, x2 = (eager_rows(z, **rows) for z in (z1, z2))
    k = (x1 @ x1.mT) * (x2 @ x2.mT)
    return reference.entropy_of_gram(k.to(reference.accumulation_dtype(z1.dtype)), alpha)


def check_joint(alpha, z1, z2, *, need_grad=True, backends=BACKENDS, **rows):
    """max |fast - truth| <= 2 max |eager - truth| + floor: value and both gradients, per matrix."""
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(z1.shape[:-2], generator=generator, dtype=torch.float64)
    truth = partial(reference.joint_entropy, alpha=alpha, **rows)
    value, grads = run_pair(truth, z1.double(), z2.double(), cotangent)
    floor, grad_floors = joint_floors(alpha, z1, z2, value, rows)
    try:
        eager, eager_grads = run_pair(
            partial(eager_joint_entropy, alpha=alpha, **rows), z1, z2, cotangent
        )
        allowed = 2 * largest(eager.double() - value, 0) + floor
        pairs = zip(eager_grads, grads, strict=True)
        grads_allowed = [2 * largest(e.double() - g, 2) for e, g in pairs]
    except torch.linalg.LinAlgError:
        allowed = torch.full_like(floor, math.inf)
        grads_allowed = [allowed, allowed]
    for backend in backends:
        fast = partial(joint_entropy, alpha=alpha, backend=backend, **rows)
        actual, actual_grads = run_pair(fast, z1, z2, cotangent)
        about = f"{backend} alpha={alpha} {tuple(z1.shape)} {tuple(z2.shape)} {z1.dtype} {rows}"
        assert actual.dtype == reference.accumulation_dtype(z1.dtype)
        error = largest(actual.double() - value, 0)
        assert (error <= allowed).all(), f"{about}: value {error}, allowed {allowed}"
        if not need_grad:
            continue
        for view in range(2):
            limit = grads_allowed[view] + grad_floors[view] * cotangent.abs()
            if z1.dtype in (torch.bfloat16, torch.float16):
                info = torch.finfo(z1.dtype)
                tiny = info.smallest_normal * info.eps
                limit = limit + info.eps * largest(grads[view], 2) + tiny
            assert actual_grads[view].dtype == z1.dtype
            error = largest(actual_grads[view].double() - grads[view], 2)
            assert (error <= limit).all(), f"{about}: gradient {view + 1}: {error}, allowed {limit}"


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
# Derivatives


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradcheck(alpha, rows, backend):
    for d1, d2 in ((3, 9), (7, 7)):
        z1, z2 = (z.requires_grad_() for z in views(2, 5, d1, d2=d2))
        masks = [None]
        if alpha in (2.0, 3.0, math.inf):  # smooth at the zero eigenvalues that a mask makes
            masks.append(torch.tensor([1, 1, 0, 1, 1]).bool().expand(2, 5))
        for mask in masks:
            function = partial(joint_entropy, alpha=alpha, mask=mask, backend=backend, **rows)
            assert gradcheck(function, (z1, z2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_gradgradcheck(rows, backend):
    for d1, d2, mask in ((2, 5, None), (4, 3, torch.tensor([True, False, True, True]))):
        z = (z.requires_grad_() for z in views(4, d1, d2=d2))
        assert gradgradcheck(
            partial(joint_entropy, alpha=2.0, mask=mask, backend=backend, **rows), tuple(z)
        )


def symmetric(x):
    return (x + x.mT) / 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradcheck_of_a_ready_gram_matrix(alpha, backend):
    k1, k2 = (fast_gram(z, side="samples").requires_grad_() for z in views(2, 4, 6))

    def function(x, y):
        options = {"from_gram": True, "backend": backend}
        return mutual_information(symmetric(x), symmetric(y), alpha, **options)

    assert gradcheck(function, (k1, k2))
    if alpha == 2:
        assert gradgradcheck(function, (k1, k2))


@pytest.mark.parametrize("from_gram", [False, True])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0, math.inf])
def test_no_second_derivative_of_other_orders(alpha, from_gram):
    z1, z2 = (fast_gram(z).requires_grad_() for z in views(4, 7))
    h = joint_entropy(z1, z2, alpha, from_gram=from_gram)
    (grad,) = torch.autograd.grad(h, z1, create_graph=True)
    with pytest.raises(NotImplementedError, match=rf"alpha = 2 only, got alpha = {alpha}"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_divergences(backend):
    p, q = (fast_gram(z).requires_grad_() for z in views(2, 4, 6))
    for function in (matrix_cross_entropy, matrix_kl):
        assert gradcheck(lambda x, y: function(symmetric(x), symmetric(y), backend=backend), (p, q))  # noqa: B023
    value = matrix_cross_entropy(p, q, backend=backend).sum()
    (grad,) = torch.autograd.grad(value, q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative of a matrix logarithm"):
        grad.sum().backward()


def test_operators_without_weight_have_no_gradient():
    z1, z2 = (z.requires_grad_() for z in views(4, 4))
    ops = torch.ops.mmae_fast
    for value in (
        ops.joint_entropy_fwd(z1, z2, None, 2.0, True, False, False, "torch")[0],
        ops.gram_entropy_fwd(z1, 2.0, False, "torch")[0],
        ops.gram_coding_rate_fwd(z1, 2.0, False, "torch")[0],
    ):
        with pytest.raises(RuntimeError, match="_fwd: a gradient needs need_weight=True"):
            value.backward()


@pytest.mark.parametrize(
    ("backend", "requires_grad"), [("cpu", False), ("cpu", True), ("torch", False)]
)
def test_opcheck(backend, requires_grad):
    ops = torch.ops.mmae_fast
    mask = torch.arange(5).expand(2, 5) % 4 != 1
    for d1, d2, m, *rows in [(7, 3, None, True, False), (3, 4, mask, True, True)]:
        z1, z2 = views(2, 5, d1, d2=d2, dtype=torch.float32)
        weights = ops.joint_entropy_fwd(z1, z2, m, 2.0, *rows, True, backend)[1:]
        assert all(weight.shape == (2, 5, 5) for weight in weights)
        z1, z2 = (z.requires_grad_(requires_grad) for z in (z1, z2))
        one = torch.ones(2)
        arguments = (z1, z2, m, 2.0 if m is None else 1.0, *rows)
        torch.library.opcheck(ops.joint_entropy_fwd.default, (*arguments, True, backend))
        if not requires_grad:
            torch.library.opcheck(ops.joint_entropy_fwd.default, (*arguments, False, backend))
        arguments = (one, z1, z2, m, *weights, 2.0, *rows, backend)
        torch.library.opcheck(ops.joint_entropy_bwd.default, arguments)
    k = fast_gram(z1.detach(), side="samples")
    weight = ops.gram_entropy_fwd(k, 2.0, True, backend)[1]
    inverse = ops.gram_coding_rate_fwd(k, 2.0, True, backend)[1]
    log = ops.matrix_log_fwd(k, backend)
    k = k.requires_grad_(requires_grad)
    for need in (True,) if requires_grad else (True, False):
        torch.library.opcheck(ops.gram_entropy_fwd.default, (k, 1.0, need, backend))
        torch.library.opcheck(ops.gram_coding_rate_fwd.default, (k, 2.0, need, backend))
    torch.library.opcheck(ops.gram_entropy_bwd.default, (one, k, None, weight, 2.0))
    torch.library.opcheck(ops.gram_coding_rate_bwd.default, (one, k, None, inverse, 2.0))
    torch.library.opcheck(ops.matrix_log_fwd.default, (k, backend))
    torch.library.opcheck(ops.matrix_log_bwd.default, (k.detach(), *log, backend))


def total(x, y):  # of everything
    value = mutual_information(x, y, 1.0, center=True).sum()
    value = value + joint_entropy(rbf_gram(x), rbf_gram(y), 2.0, from_gram=True).sum()
    p, q = (fast_gram(z, side="features") + torch.eye(4) for z in (x, y))
    return value + matrix_kl(p, q).sum()


# The default compiler would write minutes of C++ for `total`; the graph is the same.
@pytest.mark.parametrize(
    ("function", "compiler"), [(joint_entropy, "inductor"), (total, "aot_eager")]
)
def test_compile(function, compiler):
    """One graph, forward and backward, with the eager result; and again for another batch size."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: function(x, y).sum(), fullgraph=True, backend=compiler)
    for batch in (2, 3):
        z = views(batch, 6, 4, dtype=torch.float32)
        one = run_pair(compiled, *z, torch.ones(()))
        two = run_pair(lambda x, y: function(x, y).sum(), *z, torch.ones(()))
        torch.testing.assert_close(one[0], two[0])
        for a, b in zip(one[1], two[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_func_transforms():
    z1, z2 = views(3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(
        torch.vmap(mutual_information)(z1, z2), mutual_information(z1, z2), rtol=1e-12, atol=1e-12
    )
    shared = torch.vmap(joint_entropy, in_dims=(0, None))(z1, z2[0])
    torch.testing.assert_close(shared, joint_entropy(z1, z2[:1].expand(3, 5, 4)))
    _, expected = run_pair(total_of_rows, z1, z2, torch.ones(3))
    actual = torch.vmap(torch.func.grad(total_of_rows, argnums=(0, 1)))(z1, z2)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def total_of_rows(x, y):
    p, q = (fast_gram(z, side="features") + torch.eye(4).double() for z in (x, y))
    return mutual_information(x, y, 2.0) + matrix_kl(p, q)


# --------------------------------------------------------------------------------------------------
# Properties. What holds, and why, is in docs/theory.md, section 0.


@st.composite
def two_views(draw, kinds=KINDS):
    n, d1, d2 = (draw(st.integers(1, 16)) for _ in range(3))
    kind, kind2 = draw(st.sampled_from(kinds)), draw(st.sampled_from(kinds))
    z1, z2 = views(n, d1, d2=d2, kind=kind, kind2=kind2, seed=draw(st.integers(0, 2**30)))
    relation = draw(st.sampled_from(("none", "none", "equal", "opposite", "permuted")))
    if relation == "equal":
        z2 = z1.clone()
    elif relation == "opposite":
        z2 = -z1
    elif relation == "permuted":
        z2 = z1[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    return z1, z2


# Zero rows have a zero on the diagonal, and a decaying spectrum in one dimension has them too.
UNIT = tuple(kind for kind in KINDS if kind != "zero rows")
ORDERS = st.sampled_from((0.5, 1.0, 1.5, 2.0, 3.0, math.inf))


@cases(150)
@given(two_views(UNIT), ORDERS)
def test_joint_entropy_is_at_least_either_and_at_most_log_n(z, alpha):
    """Unit diagonals: spectra of K1 ⊙ K2 are majorised by those of K1 and K2."""
    slack = 1e-6 if alpha < 1 else 1e-11  # sqrt of the rounding of zero eigenvalues
    joint = joint_entropy(*z, alpha)
    for view in z:
        assert joint >= fast_matrix_entropy(view, alpha) - slack
    assert joint <= math.log(z[0].shape[0]) + slack
    k1, k2 = (rbf_gram(view) for view in z)
    joint = joint_entropy(k1, k2, alpha, from_gram=True)
    for k in (k1, k2):
        one = torch.ones_like(k)
        assert joint >= joint_entropy(k, one, alpha, from_gram=True) - slack


@cases(150)
@given(two_views(UNIT))
def test_mutual_information_is_not_negative_at_alpha_1(z):
    """Unit diagonals: it is the quantum mutual information of a separable state."""
    assert mutual_information(*z, 1.0) >= -1e-11
    k1, k2 = (rbf_gram(view) for view in z)
    assert mutual_information(k1, k2, 1.0, from_gram=True) >= -1e-11


def test_mutual_information_may_be_negative_elsewhere():
    """The example of docs/theory.md: edges of two stars, at alpha = 2; and unequal diagonals."""
    left = torch.tensor([0] * 10 + list(range(1, 11)))
    right = torch.tensor(list(range(1, 11)) + [0] * 10)
    z1, z2 = (F.one_hot(index, 11).double() for index in (left, right))
    expected = math.log(20**3 / 110**2)
    assert mutual_information(z1, z2, 2.0).item() == pytest.approx(expected, abs=1e-12)
    assert expected < -0.4 < 0 < mutual_information(z1, z2, 1.0)
    z1, z2 = torch.diag(torch.tensor([1.0, 1e-3])), torch.diag(torch.tensor([1e-3, 1.0]))
    raw = partial(mutual_information, z1, z2, normalize=False)
    assert raw(1.0) == pytest.approx(-math.log(2), abs=1e-4)
    assert raw(2.0) == pytest.approx(-math.log(2), abs=1e-4)


@cases(60)
@given(two_views(), ORDERS, st.booleans())
def test_symmetry(z, alpha, normalize):
    slack = 1e-6 if alpha < 1 else 1e-11
    for function in (joint_entropy, mutual_information):
        one, two = (
            function(*z, alpha, normalize=normalize),
            function(*z[::-1], alpha, normalize=normalize),
        )
        torch.testing.assert_close(one, two, rtol=0, atol=slack)


@cases(60)
@given(two_views(), ORDERS)
def test_identities(z, alpha):
    """I = H1 + H2 - H12, H(1|2) = H12 - H2, and a view that says nothing (all rows equal)."""
    slack = 1e-6 if alpha < 1 else 1e-10
    joint = joint_entropy(*z, alpha)
    h1, h2 = (fast_matrix_entropy(view, alpha) for view in z)
    close = partial(torch.testing.assert_close, rtol=0, atol=slack)
    close(mutual_information(*z, alpha), h1 + h2 - joint)
    close(conditional_entropy(*z, alpha), joint - h2)
    silent = torch.ones(len(z[0]), 3).double()
    close(joint_entropy(z[0], silent, alpha), h1)
    close(mutual_information(z[0], silent, alpha), torch.zeros(()).double())


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_one_hot_features(n, alpha):
    z = torch.eye(n).double()
    for function in (joint_entropy, mutual_information):
        assert function(z, z, alpha).item() == pytest.approx(math.log(n), abs=1e-12)
    assert conditional_entropy(z, z, alpha).item() == pytest.approx(0, abs=1e-12)
    # One-hot classes: K ⊙ K = K, so that I(K, K) = H(K).
    labels = F.one_hot(torch.arange(12) % 4).double()
    expected = fast_matrix_entropy(labels, alpha)
    torch.testing.assert_close(mutual_information(labels, labels, alpha), expected)


@cases(40)
@given(two_views(), ORDERS, SEEDS)
def test_rotations_and_common_permutations_change_nothing(z, alpha, seed):
    slack = 1e-5 if alpha < 1 else 1e-9
    joint = joint_entropy(*z, alpha)
    order = torch.randperm(len(z[0]), generator=torch.Generator().manual_seed(seed))
    moved = joint_entropy(z[0][order], z[1][order], alpha)
    torch.testing.assert_close(moved, joint, rtol=0, atol=slack)
    d = z[0].shape[-1]
    turned = z[0] @ features("orthonormal", d, d, dtype=torch.float64, seed=seed)
    torch.testing.assert_close(joint_entropy(turned, z[1], alpha), joint, rtol=0, atol=slack)


# --------------------------------------------------------------------------------------------------
# Divergences


def test_divergences_of_commuting_matrices_are_those_of_their_spectra():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 5, generator=generator, dtype=torch.float64) + 0.1
    u = features("orthonormal", 5, 5, dtype=torch.float64)
    cross = (q - p * q.log()).sum()
    kl = (p * (p / q).log() - p + q).sum()
    p, q = ((u * x) @ u.mT for x in (p, q))
    torch.testing.assert_close(matrix_cross_entropy(p, q), cross)
    torch.testing.assert_close(matrix_kl(p, q), kl)


@cases(60)
@given(two_views(("gaussian", "decaying", "rank3", "collapsed", "duplicates")))
def test_kl_is_not_negative_and_zero_at_equality(z):
    p, q = (z[i] @ z[i].mT for i in range(2))
    p, q = (x / x.diagonal().sum() + 1e-3 * torch.eye(len(x)) for x in (p, q))
    kl = matrix_kl(p, q)
    assert kl >= -1e-12
    assert matrix_kl(p, p).abs() <= 1e-12
    difference = matrix_cross_entropy(p, q) - matrix_cross_entropy(p, p)
    torch.testing.assert_close(kl, difference, rtol=0, atol=1e-12)


def test_gradient_at_repeated_eigenvalues():
    """At Q = c I: d tr(-P log Q + Q) / dQ = I - P / c, where autograd through eigh gives NaN."""
    for dtype in (torch.float32, torch.float64):
        p = fast_gram(views(3, 4, 6, dtype=dtype)[0])
        q = (2 * torch.eye(4, dtype=dtype)).expand(3, 4, 4).clone().requires_grad_()
        p.requires_grad_()
        matrix_cross_entropy(p, q).sum().backward()
        torch.testing.assert_close(q.grad, torch.eye(4, dtype=dtype) - p.detach() / 2)
        log2 = (math.log(2) * torch.eye(4, dtype=dtype)).expand(3, 4, 4)
        torch.testing.assert_close(p.grad, -log2)


def test_gradient_at_nearly_repeated_eigenvalues():
    """Divided differences of the logarithm without cancellation: gaps down to one rounding."""
    u = features("orthonormal", 4, 4, dtype=torch.float64)
    p = fast_gram(views(4, 6)[0])
    for gap in (1e-15, 1e-12, 1e-8, 1e-4):
        lam = torch.tensor([1.0, 1.0 + gap, 1.0 + 2 * gap, 2.0], dtype=torch.float64)
        q = ((u * lam) @ u.mT).requires_grad_()
        matrix_cross_entropy(p, q).backward()
        a, b = lam.unsqueeze(-1), lam.unsqueeze(-2)
        # (log a - log b) / (a - b) = 2 artanh(x) / (a - b), x = (a - b) / (a + b); its series
        x = (a - b) / (a + b)
        series = sum(x ** (2 * k) / (2 * k + 1) for k in range(60)) * 2 / (a + b)
        expected = torch.eye(4).double() - u @ (series * (u.mT @ p @ u)) @ u.mT
        torch.testing.assert_close(q.grad, expected, rtol=1e-11, atol=1e-11)


def test_singular_q():
    """Finite as documented: the raised eigenvalue is eps lambda_max."""
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        q = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=dtype)).requires_grad_()
        inside = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=dtype))
        outside = torch.diag(torch.tensor([0.0, 0.0, 1.0], dtype=dtype))
        value = matrix_cross_entropy(inside, q)
        torch.testing.assert_close(value.item(), 3 - math.log(2), rtol=1e-6, atol=0)
        value = matrix_cross_entropy(outside, q)
        torch.testing.assert_close(value.item(), 3 - math.log(2 * eps), rtol=1e-6, atol=0)
        value.backward()
        assert q.grad.isfinite().all()
        assert q.grad[2, 2].item() == pytest.approx(1 - 1 / (2 * eps), rel=1e-5)
    assert matrix_kl(inside, inside).item() == pytest.approx(0, abs=1e-12)


def test_divergences_propagate_nan_and_spare_the_neighbours():
    p, q = (fast_gram(z) for z in views(3, 4, 6))
    clean = matrix_kl(p, q)
    for poisoned in ((0, math.nan), (1, math.nan), (1, math.inf)):
        pair = [p.clone(), q.clone()]
        pair[poisoned[0]][1, 2, 3] = poisoned[1]
        for function in (matrix_kl, matrix_cross_entropy):
            assert function(*pair).isnan().tolist() == [False, True, False]
        torch.testing.assert_close(matrix_kl(*pair)[[0, 2]], clean[[0, 2]])


# --------------------------------------------------------------------------------------------------
# Gaussian kernel


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bandwidth", [None, 0.7, 3])
@pytest.mark.parametrize("shape", [(1, 3), (2, 3), (3, 7, 20), (2, 2, 30, 4)])
def test_rbf_gram(shape, bandwidth, dtype, backend):
    z = 5 + features("gaussian", *shape, dtype=dtype)
    n = shape[-2]
    d = torch.cdist(z.double(), z.double(), compute_mode="donot_use_mm_for_euclid_dist")
    i, j = torch.triu_indices(n, n, 1)
    sigma = bandwidth
    if bandwidth is None:
        sigma = d[..., i, j].median(-1).values[..., None, None] if n > 1 else 1
    expected = torch.exp(-d.square() / (2 * sigma**2))
    k = rbf_gram(z, bandwidth, backend=backend)
    assert k.dtype == dtype
    assert torch.equal(k, k.mT) and (k.diagonal(dim1=-2, dim2=-1) == 1).all()
    bound = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(k.double(), expected, rtol=0, atol=bound)


def test_rbf_gram_of_equal_rows():
    for backend in BACKENDS:
        for dtype in (torch.float32, torch.float64):
            z = features("gaussian", 1, 300, dtype=dtype).expand(6, 300)
            assert torch.equal(rbf_gram(z, backend=backend), torch.ones(6, 6, dtype=dtype))
            pairs = features("duplicates", 8, 300, dtype=dtype)
            k = rbf_gram(pairs, backend=backend)
            assert (k[::2, 1::2].diagonal() == 1).all() and (k[0, 2:] < 1).all()
            # Median 0: the limit of small bandwidths.
            most = torch.cat([z, features("gaussian", 1, 300, dtype=dtype, seed=1)])
            expected = torch.block_diag(torch.ones(6, 6), torch.ones(1, 1)).to(dtype)
            assert torch.equal(rbf_gram(most, backend=backend), expected)


def test_rbf_gram_is_positive_and_its_entropy_is_finite():
    z = features("collapsed", 3, 20, 5, dtype=torch.float64).requires_grad_()
    k = rbf_gram(z)
    assert torch.linalg.eigvalsh(k).min() > -1e-12
    joint_entropy(k, rbf_gram(z, 2.0), 1.0, from_gram=True).sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("bandwidth", [None, 1.5])
def test_rbf_gram_derivatives(bandwidth):
    z = features("gaussian", 2, 5, 3, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([1, 1, 0, 1, 1]).bool().expand(2, 5)
    for m in (None, mask):
        function = partial(rbf_gram, bandwidth=bandwidth, mask=m)
        assert gradcheck(function, z)
        assert gradgradcheck(function, z)


def test_rbf_gram_mask():
    z = features("gaussian", 2, 9, 4, dtype=torch.float64)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 1]).bool()
    z[:, 1] = math.nan
    for bandwidth in (None, 1.0):
        k = rbf_gram(z, bandwidth, mask=mask.expand(2, 9))
        torch.testing.assert_close(k[:, mask][:, :, mask], rbf_gram(z[:, mask], bandwidth))
        assert (k[:, ~mask] == 0).all() and (k[:, :, ~mask] == 0).all()
    z[0, 0, 0] = math.nan
    assert rbf_gram(z, mask=mask.expand(2, 9))[0, 2, 3].isnan()
    nothing = torch.zeros(2, 9, dtype=torch.bool)
    assert torch.equal(rbf_gram(z, mask=nothing), torch.zeros(2, 9, 9).double())


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
