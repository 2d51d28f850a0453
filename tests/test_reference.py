"""The definitions that every backend is held to, against closed forms and independent code."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmae_fast import reference

ALPHAS = (0.5, 1.0, 1.01, 2.0, 3.0, 5.0, math.inf)
ROWS = [{}, {"center": True}, {"normalize": False}, {"normalize": False, "center": True}]


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def renyi(p, alpha):
    """Renyi entropy of a probability vector, in numpy and by the definition."""
    p = p[p > 0]
    if alpha == 1:
        return -(p * np.log(p)).sum()
    if math.isinf(alpha):
        return -np.log(p.max())
    return np.log((p**alpha).sum()) / (1 - alpha)


def manual_rows(z, normalize=True, center=False):
    x = z.numpy()
    if normalize:
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x - x.mean(-2, keepdims=True) if center else x


@pytest.mark.parametrize("alpha", ALPHAS)
def test_entropy_of_a_known_spectrum(alpha):
    p = np.array([0.4, 0.3, 0.2, 0.1, 0.0])
    z = torch.from_numpy(np.diag(np.sqrt(7 * p)))
    actual = reference.matrix_entropy(z, alpha, normalize=False)
    assert actual.item() == pytest.approx(renyi(p, alpha), abs=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_orthonormal_rows_have_the_largest_entropy(n, alpha):
    z = torch.linalg.qr(randn(20, n))[0].mT
    assert reference.matrix_entropy(z, alpha).item() == pytest.approx(math.log(n), abs=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equal_rows_have_entropy_zero(alpha):
    z = randn(1, 6).expand(5, 6)
    # alpha < 1 sees the rounding of the four zero eigenvalues: sqrt(1e-16).
    assert reference.matrix_entropy(z, alpha).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_against_singular_values(shape, rows):
    z = randn(*shape)
    lam = np.linalg.svd(manual_rows(z, **rows), compute_uv=False) ** 2
    for alpha in ALPHAS[1:]:
        actual = reference.matrix_entropy(z, alpha, **rows).item()
        assert actual == pytest.approx(renyi(lam / lam.sum(), alpha), abs=1e-12)
    for scale in (1e-3, 1.0, 1e3):
        actual = reference.coding_rate(z, scale, **rows).item()
        assert actual == pytest.approx(np.log1p(scale * lam).sum(), rel=1e-12)
    p = lam / lam.sum()
    rank = reference.effective_rank(z, **rows).item()
    assert rank == pytest.approx(math.exp(renyi(p, 1)), rel=1e-12)
    x = manual_rows(z, **rows)
    for side, g in {"samples": x @ x.T, "features": x.T @ x}.items():
        np.testing.assert_allclose(reference.gram(z, side=side, **rows), g, atol=1e-13)
    smaller = min(shape)
    assert reference.gram(z, **rows).shape == (smaller, smaller)


def test_batches_are_independent():
    z = randn(2, 3, 5, 8)
    h = reference.matrix_entropy(z, 1.0)
    rate = reference.coding_rate(z, 2.0)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(h[i, j], reference.matrix_entropy(z[i, j], 1.0))
            torch.testing.assert_close(rate[i, j], reference.coding_rate(z[i, j], 2.0))


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_mask_equals_dropping_rows(rows):
    z = randn(9, 6)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    z[1, 2], z[4, 0] = math.nan, math.inf
    for alpha in ALPHAS[1:]:
        actual = reference.matrix_entropy(z, alpha, mask=mask, **rows)
        torch.testing.assert_close(actual, reference.matrix_entropy(z[mask], alpha, **rows))
    actual = reference.coding_rate(z, 3.0, mask=mask, **rows)
    torch.testing.assert_close(actual, reference.coding_rate(z[mask], 3.0, **rows))
    dropped = reference.prepare(z, mask=mask, **rows)
    assert (dropped[~mask] == 0).all()


def test_normalisation_is_that_of_pytorch_but_for_eps():
    z = randn(5, 7).float()
    torch.testing.assert_close(reference.prepare(z), F.normalize(z, dim=-1))
    unit = reference.prepare(z)
    for scale in (2.0**-100, 2.0**-60, 2.0**60, 2.0**120):
        assert torch.equal(reference.prepare(z * scale), unit)


def test_centring_follows_normalisation():
    z = randn(5, 7)
    x = F.normalize(z, dim=-1)
    torch.testing.assert_close(reference.prepare(z, center=True), x - x.mean(-2, keepdim=True))


def test_zero_rows_stay_zero_and_have_no_gradient():
    """Normalisation has no derivative at a zero row; zero is the convention."""
    z = randn(4, 3)
    z[1] = 0
    z.requires_grad_()
    x = reference.prepare(z)
    assert (x[1] == 0).all()
    (grad,) = torch.autograd.grad((x * randn(4, 3, seed=1)).sum(), z)
    assert grad.isfinite().all()
    assert (grad[1] == 0).all()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (2, 0, 4), (0, 3, 4)])
def test_empty(shape):
    z = torch.zeros(shape, requires_grad=True)
    for rows in ROWS:
        for alpha in ALPHAS:
            assert torch.equal(reference.matrix_entropy(z, alpha, **rows), torch.zeros(shape[:-2]))
        assert torch.equal(reference.coding_rate(z, 1.0, **rows), torch.zeros(shape[:-2]))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_all_zero_matrix(alpha):
    z = torch.zeros(2, 4, 3, dtype=torch.float64, requires_grad=True)
    for rows in ROWS:
        h = reference.matrix_entropy(z, alpha, **rows)
        assert torch.equal(h, torch.zeros(2, dtype=torch.float64))
        (grad,) = torch.autograd.grad(h.sum(), z)
        assert torch.equal(grad, torch.zeros_like(z))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_propagate(poison):
    z = randn(3, 4, 6)
    z[1, 2, 3] = poison
    for rows in ROWS:
        for alpha in ALPHAS:
            h = reference.matrix_entropy(z, alpha, **rows)
            assert h.isnan().tolist() == [False, True, False]
        rate = reference.coding_rate(z, 1.0, **rows)
        assert rate.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_accumulation_dtype(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert reference.accumulation_dtype(dtype) == expected
    z = randn(4, 6).to(dtype)
    for value in (reference.gram(z), reference.matrix_entropy(z), reference.coding_rate(z, 1.0)):
        assert value.dtype == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reference.gram(z), reference.gram(z.clone()))
        assert reference.gram(z).dtype == expected


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_gradients_against_finite_differences(shape, rows):
    z = randn(*shape).requires_grad_()
    # Centred rows on the samples side have a zero eigenvalue, where only some orders are smooth.
    smooth = (2.0, 3.0) if rows.get("center") and shape[0] < shape[1] else ALPHAS
    for alpha in smooth:
        assert torch.autograd.gradcheck(lambda y: reference.matrix_entropy(y, alpha, **rows), z)  # noqa: B023
    assert torch.autograd.gradcheck(lambda y: reference.coding_rate(y, 2.0, **rows), z)
    for side in ("samples", "features"):
        assert torch.autograd.gradcheck(lambda y: reference.gram(y, side=side, **rows), z)  # noqa: B023
