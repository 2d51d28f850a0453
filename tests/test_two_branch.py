"""Two-branch losses against the published code's values and gradients, and their definitions."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from mmae_fast import fast_matrix_entropy, information, losses
from mmae_fast.losses import (
    barlow_twins_loss,
    coding_rate_reduction,
    emp_ssl_tcr,
    info_nce_loss,
    ivne_loss,
    matrix_alignment_loss,
    matrix_uniformity_loss,
    spectral_contrastive_loss,
)

from .accuracy import BACKENDS, DTYPES, features

with np.load(Path(__file__).parent / "golden" / "two_branch_losses.npz") as file:
    GOLDEN = {key: torch.from_numpy(file[key]) for key in file.files}

PUBLISHED = {
    "barlow": barlow_twins_loss,
    "spectral_mu1": spectral_contrastive_loss,
    "spectral_mu10": lambda z1, z2: spectral_contrastive_loss(z1, z2, 10.0),
}
PAIRS = PUBLISHED | {
    "info_nce": info_nce_loss,
    "uniformity": matrix_uniformity_loss,
    "uniformity exact": lambda z1, z2: matrix_uniformity_loss(z1, z2, order=None),
    "alignment": matrix_alignment_loss,
    "alignment exact": lambda z1, z2: matrix_alignment_loss(z1, z2, order=None),
}


def views(*shape, dtype=torch.float64, noise=0.3):
    """A sample and its noisy copy, as two branches see them."""
    z = features("gaussian", *shape, dtype=torch.float64)
    other = z + noise * features("gaussian", *shape, dtype=torch.float64, seed=1)
    return z.to(dtype), other.to(dtype)


def value_and_grads(function, *z):
    z = [x.detach().clone().requires_grad_() for x in z]
    value = function(*z)
    return value.detach(), torch.autograd.grad(value.sum(), z)


# --------------------------------------------------------------------------------------------------
# Sources and definitions


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_published_values(case, name):
    z1, z2 = GOLDEN[f"{case}_z1"], GOLDEN[f"{case}_z2"]
    value, (grad1, grad2) = value_and_grads(PUBLISHED[name], z1, z2)
    key = f"{case}_{name}"
    torch.testing.assert_close(value, GOLDEN[key], rtol=1e-5, atol=1e-5)
    # Entries are of the order 1e-2 at most: relative to the largest.
    for grad, expected in ((grad1, GOLDEN[f"{key}_grad1"]), (grad2, GOLDEN[f"{key}_grad2"])):
        assert (grad - expected).abs().max() <= 1e-5 * expected.abs().max()


def plain_barlow(z1, z2, lambd=0.0051):
    d = z1.shape[-1]
    x1, x2 = (torch.nn.BatchNorm1d(d, affine=False, dtype=z1.dtype)(z) for z in (z1, z2))
    c = x1.T @ x2 / len(z1)
    off = c[~torch.eye(d, dtype=torch.bool)]
    return (1 - c.diagonal()).square().sum() + lambd * off.square().sum()


def plain_spectral(z1, z2, mu=1.0):
    n = len(z1)
    x1, x2 = (z * (mu**0.5 / z.norm(dim=-1, keepdim=True)).clamp(max=1) for z in (z1, z2))
    s = x1 @ x2.T
    off = s[~torch.eye(n, dtype=torch.bool)]
    return (-2 * s.diagonal().mean() + off.square().mean()) / mu


def plain_info_nce(z1, z2, temperature=0.1):
    """Sample by sample, as the paper writes it."""
    x = F.normalize(torch.cat([z1, z2]), dim=-1)
    n, terms = len(z1), []
    for i in range(2 * n):
        others = [x[i] @ x[k] / temperature for k in range(2 * n) if k != i]
        positive = x[i] @ x[(i + n) % (2 * n)] / temperature
        terms.append(torch.stack(others).exp().sum().log() - positive)
    return torch.stack(terms).mean()


def plain_covariance(z1, z2, mu):
    x1, x2 = F.normalize(z1, dim=-1), F.normalize(z2, dim=-1)
    n, d = x1.shape
    centre = torch.eye(n, dtype=x1.dtype) - 1 / n
    return x1.T @ centre @ x2 / n + mu * torch.eye(d, dtype=x1.dtype)


def plain_log(q, order):
    """Taylor polynomial of the logarithm around the identity."""
    m = q - torch.eye(len(q), dtype=q.dtype)
    powers = [torch.linalg.matrix_power(m, k) for k in range(1, order + 1)]
    return sum((-1) ** (k + 1) / k * power for k, power in enumerate(powers, 1))


def plain_uniformity(z1, z2, lambd=0.5, mu=0.5, order=4):
    return -lambd * plain_log(plain_covariance(z1, z2, mu), order).trace()


def plain_alignment(z1, z2, mu=0.5, order=4):
    p, q = plain_covariance(z1, z1, mu), plain_covariance(z2, z2, mu)
    return -(p @ plain_log(q, order)).trace()


PLAIN = [
    (barlow_twins_loss, plain_barlow, ({}, {"lambd": 0.5})),
    (spectral_contrastive_loss, plain_spectral, ({}, {"mu": 3.0}, {"mu": 1e3})),
    (info_nce_loss, plain_info_nce, ({}, {"temperature": 1.0})),
    (
        matrix_uniformity_loss,
        plain_uniformity,
        ({}, {"mu": 0.8, "lambd": 0.1}, {"order": 1}, {"order": 7}),
    ),
    (matrix_alignment_loss, plain_alignment, ({}, {"mu": 0.8}, {"order": 1}, {"order": 7})),
]


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (8, 8), (2, 3)], ids=str)
@pytest.mark.parametrize(("loss", "plain", "options"), PLAIN, ids=[p[0].__name__ for p in PLAIN])
def test_definitions(loss, plain, options, shape):
    z = views(3, *shape)
    for arguments in options:
        value, grads = value_and_grads(lambda a, b: loss(a, b, **arguments), *z)  # noqa: B023
        expected, expected_grads = value_and_grads(
            lambda a, b: torch.stack([plain(x, y, **arguments) for x, y in zip(a, b, strict=True)]),  # noqa: B023
            *z,
        )
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-11)
        for grad, other in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(30, 6), (6, 30)], ids=str)
def test_exact_logarithms_are_the_limit_of_the_published_series(shape):
    """Eigenvalues of Q in (0.5, 1.5): the series converges, and the published order is near."""
    z = views(*shape)
    limit = matrix_uniformity_loss(*z, order=80)
    torch.testing.assert_close(matrix_uniformity_loss(*z, order=None), limit, rtol=1e-9, atol=0)
    torch.testing.assert_close(matrix_uniformity_loss(*z), limit, rtol=2e-2, atol=0)
    limit = matrix_alignment_loss(*z, order=80)
    exact = matrix_alignment_loss(*z, order=None)
    torch.testing.assert_close(exact, limit, rtol=1e-9, atol=0)
    torch.testing.assert_close(matrix_alignment_loss(*z), limit, rtol=2e-2, atol=0)
    p, q = plain_covariance(z[0], z[0], 0.5), plain_covariance(z[1], z[1], 0.5)
    expected = information.matrix_cross_entropy(p, q) - q.trace()
    torch.testing.assert_close(exact, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ivne(backend):
    z = features("rank3", 2, 20, 9, dtype=torch.float64)
    x = F.normalize(z, dim=-1)
    lam = torch.linalg.eigvalsh(x.mT @ x / 20).clamp(min=1e-300)
    torch.testing.assert_close(ivne_loss(z, backend=backend), (lam * lam.log()).sum(-1))
    _, (grad,) = value_and_grads(lambda y: ivne_loss(y, backend=backend), z)
    assert grad.isfinite().all()
    assert torch.equal(ivne_loss(z, backend=backend), -fast_matrix_entropy(z, backend=backend))


def plain_rate(x, eps2):
    n, d = x.shape
    return 0.5 * torch.logdet(torch.eye(d, dtype=x.dtype) + d / (n * eps2) * x.T @ x)


def plain_reduction(z, labels, eps2=0.5, normalize=True):
    x = F.normalize(z, dim=-1) if normalize else z
    classes = [x[labels == j] for j in labels.unique()]
    return plain_rate(x, eps2) - sum(len(y) / len(x) * plain_rate(y, eps2) for y in classes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(20, 6), (6, 20)], ids=str)
def test_coding_rate_reduction(shape, normalize, backend):
    """Classes of unequal sizes, other classes in every matrix, any integers as labels."""
    z = features("gaussian", 3, *shape, dtype=torch.float64)
    labels = torch.randint(-2, 3, (3, shape[0]), generator=torch.Generator().manual_seed(0)) * 7
    labels[1] = 4  # one class only
    labels[2] = torch.arange(shape[0])  # a class each
    for eps2 in (0.5, 0.01):
        options = {"eps2": eps2, "normalize": normalize}
        value, (grad,) = value_and_grads(
            lambda y: coding_rate_reduction(y, labels, backend=backend, **options),  # noqa: B023
            z,
        )
        pairs = lambda y: zip(y, labels, strict=True)  # noqa: E731
        expected, (expected_grad,) = value_and_grads(
            lambda y: torch.stack([plain_reduction(*pair, **options) for pair in pairs(y)]),  # noqa: B023
            z,
        )
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-10)
        assert abs(value[1]) < 1e-11 and (value > -1e-11).all()


def test_coding_rate_reduction_is_largest_for_orthogonal_classes():
    labels = torch.arange(12) // 4
    apart = torch.eye(6).double()[labels * 2]
    mixed = torch.eye(6).double()[torch.arange(12) % 3 * 2]
    assert coding_rate_reduction(apart, labels) > coding_rate_reduction(mixed, labels) + 0.1
    for shape in ((0, 4), (4, 0), (2, 0, 4)):
        z = torch.zeros(shape, requires_grad=True)
        value = coding_rate_reduction(z, torch.zeros(shape[:-1], dtype=torch.int32))
        assert torch.equal(value, torch.zeros(shape[:-2]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_emp_ssl_tcr(backend):
    z = features("gaussian", 2, 5, 9, 14, dtype=torch.float64)
    expected = torch.stack(
        [torch.stack([plain_rate(F.normalize(y, dim=-1), 0.2) for y in x]).mean() for x in z]
    )
    torch.testing.assert_close(emp_ssl_tcr(z, backend=backend), expected)


# --------------------------------------------------------------------------------------------------
# What all share


@pytest.mark.parametrize("name", PAIRS)
def test_gradcheck_and_batches(name):
    for shape in ((4, 3), (3, 4)):
        z1, z2 = views(2, 2, *shape)
        value = PAIRS[name](z1, z2)
        assert value.shape == (2, 2)
        torch.testing.assert_close(value[1, 0], PAIRS[name](z1[1, 0], z2[1, 0]))
        assert gradcheck(PAIRS[name], (z1[0, 0].requires_grad_(), z2[0, 0].requires_grad_()))


@pytest.mark.parametrize("name", PAIRS)
def test_dtypes_and_autocast(name):
    for dtype in DTYPES:
        z1, z2 = views(9, 6, dtype=dtype)
        value, grads = value_and_grads(PAIRS[name], z1, z2)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert all(grad.dtype == dtype and grad.isfinite().all() for grad in grads)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(value_and_grads(PAIRS[name], z1, z2)[0], value)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", ["zeros", "collapsed", "duplicates", "zero rows", "rank1"])
def test_gradients_are_finite(name, kind):
    z1 = features(kind, 6, 9, dtype=torch.float32)
    z2 = features(kind, 6, 9, dtype=torch.float32, seed=1)
    for pair in ((z1, z2), (z1, z1)):
        value, grads = value_and_grads(PAIRS[name], *pair)
        assert value.isfinite() and all(grad.isfinite().all() for grad in grads)


def test_losses_at_their_minimum():
    z = torch.linalg.qr(torch.cat([torch.ones(16, 1), features("gaussian", 16, 5)], 1).double())[0]
    columns = 1e4 * z[:, 1:]  # orthogonal, mean 0; variance far above batch normalisation's eps
    assert abs(barlow_twins_loss(columns, columns)) < 1e-12
    rows = 3 * z.mT
    assert spectral_contrastive_loss(rows, rows).item() == pytest.approx(-2, abs=1e-14)
    far = torch.cat([rows, -rows])  # NT-Xent: opposite pairs as negatives
    assert info_nce_loss(rows, rows) < info_nce_loss(rows, rows.flip(0))
    assert info_nce_loss(far, far, 0.01) == pytest.approx(0, abs=1e-12)


def test_compile():
    torch._dynamo.reset()

    def total(z1, z2):
        value = barlow_twins_loss(z1, z2) + spectral_contrastive_loss(z1, z2)
        value = value + info_nce_loss(z1, z2) + ivne_loss(z1) + emp_ssl_tcr(z2.unsqueeze(0))
        return value + matrix_uniformity_loss(z1, z2) + matrix_alignment_loss(z1, z2, order=None)

    z = views(8, 6, dtype=torch.float32)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    value, grads = value_and_grads(compiled, *z)
    expected, expected_grads = value_and_grads(total, *z)
    torch.testing.assert_close(value, expected)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


A = torch.ones(3, 4)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    ("z1", "z2", "error", "message"),
    [
        (None, A, TypeError, "z1 must be a torch.Tensor, got NoneType"),
        (A, A.int(), TypeError, "z2 must be float32, .* got torch.int32"),
        (A, A.double(), TypeError, "one dtype, got torch.float32 and torch.float64"),
        (A, A[0], ValueError, r"z2 must have shape \(\.\.\., n, d\), got \(4,\)"),
        (A, A[:2], ValueError, r"got \(3, 4\) and \(2, 4\)"),
        (A, A[:, :2], ValueError, r"must have one shape, got \(3, 4\) and \(3, 2\)"),
    ],
)
def test_wrong_views(name, z1, z2, error, message):
    with pytest.raises(error, match=message):
        PAIRS[name](z1, z2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: barlow_twins_loss(A, A, 0), ValueError, r"lambd must be > 0 .* got 0\.0"),
        (lambda: spectral_contrastive_loss(A, A, "1"), TypeError, "mu must be .* got '1'"),
        (lambda: info_nce_loss(A, A, -1), ValueError, r"temperature must be > 0 .* got -1\.0"),
        (lambda: matrix_uniformity_loss(A, A, lambd=0), ValueError, "lambd must be > 0"),
        (lambda: matrix_alignment_loss(A, A, math.inf), ValueError, "mu must be .* got inf"),
        (lambda: matrix_alignment_loss(A, A, order=0), ValueError, "order must be .* got 0"),
        (lambda: matrix_uniformity_loss(A, A, order=2.0), TypeError, r"order must .* got 2\.0"),
        (lambda: emp_ssl_tcr(A), ValueError, r"\(\.\.\., patches, n, d\), got \(3, 4\)"),
        (lambda: emp_ssl_tcr(A[None], 0), ValueError, "eps2 must be > 0"),
        (lambda: coding_rate_reduction(A, [0, 1, 1]), TypeError, "integer tensor, got list"),
        (lambda: coding_rate_reduction(A, A[:, 0]), TypeError, "got torch.float32"),
        (lambda: coding_rate_reduction(A, A[0].long()), ValueError, r"\(3,\), got \(4,\)"),
        (lambda: coding_rate_reduction(A, A[:, 0].long(), 0), ValueError, "eps2 must be > 0"),
        (lambda: ivne_loss(A[0]), ValueError, r"got \(4,\)"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_public_names():
    assert set(PUBLISHED) <= set(PAIRS)
    assert all(callable(getattr(losses, name)) for name in losses.__all__)
