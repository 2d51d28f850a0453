"""Divergences of matrices, and the Gaussian kernel."""

import math
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from mmae_fast import fast_gram
from mmae_fast.information import joint_entropy, matrix_cross_entropy, matrix_kl, rbf_gram

from .accuracy import BACKENDS, features
from .pairs import views

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
