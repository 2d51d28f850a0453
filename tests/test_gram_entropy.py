"""Entropies of ready Gram matrices, by every backend, at the accuracy rule."""

import math

import pytest
import torch

from mmae_fast import reference
from mmae_fast.backends.dispatch import module

from .accuracy import BACKENDS, entropy, expected, features, largest

ALPHAS = (0.5, 1.0, 1.01, 2.0, 3.0, 5.0, math.inf)
# In vector lanes, full and not, and of orders around their blocks; one by one; shared; LAPACK's.
SHAPES = [(40, 5, 9), (2, 20, 16, 40), (19, 33, 50), (3, 17, 20), (1, 90, 120), (260, 300)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_derivative(shape, alpha, backend):
    """The gradient of Z that 2 V Z is has the floors of accuracy.py."""
    for turn, dtype in enumerate((torch.float32, torch.float64)):
        # For alpha < 1 the rounding of G itself may be all there is of the smallest eigenvalues.
        kinds = ("gaussian", "rank3", "decaying") if alpha >= 1 else ("gaussian",)
        z = features(kinds[(turn + len(shape)) % len(kinds)], *shape, dtype=dtype)
        options = {"normalize": False}
        truth, cotangent, allowed, grad_allowed = expected(entropy(alpha), z, options)
        g = reference.gram(z.double(), side="samples", **options).to(dtype)
        value, v = module(backend).gram_entropy_fwd(g, alpha, True)
        alone, _ = module(backend).gram_entropy_fwd(g, alpha, False)
        assert value.shape == shape[:-2] and value.dtype == v.dtype == dtype and v.shape == g.shape
        grad = 2 * cotangent[..., None, None] * (v.double() @ z.double())
        error = largest(grad - truth.grad, 2) / grad_allowed
        for what in (value, alone):
            assert ((what.double() - truth.value).abs() <= allowed).all()
        assert (error <= 1).all(), (dtype, error.max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", (1.0, 2.0, 3.0))
@pytest.mark.parametrize("k", (6, 40))
def test_any_scale(k, alpha, backend):
    """H(t G) = H(G) and V(t G) = V(G) / t, also where t² is out of range."""
    z = features("gaussian", 33, k, 2 * k)
    g = z @ z.mT
    value, v = module(backend).gram_entropy_fwd(g, alpha, True)
    for exponent in (-80, 80):
        scaled, scaled_v = module(backend).gram_entropy_fwd(g * 2.0**exponent, alpha, True)
        torch.testing.assert_close(scaled, value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            scaled_v * 2.0**exponent, v, rtol=1e-3, atol=1e-5 * v.abs().max()
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", (1.0, 2.0, 3.0))
def test_degenerate(alpha, backend):
    z = features("gaussian", 20, 6, 9)
    z[3] = 0
    z[5, 0, 0], z[6, 1, 2] = math.nan, math.inf
    g = z @ z.mT
    value, v = module(backend).gram_entropy_fwd(g.mT, alpha, True)
    assert value[3] == 0 and (v[3] == 0).all()
    assert value[5:7].isnan().all() and v[5:7].isnan().flatten(1).all()
    rest = [i for i in range(20) if i not in (5, 6)]
    assert value[rest].isfinite().all() and v[rest].isfinite().all()
    for shape in ((3, 0, 0), (0, 4, 4)):
        value, v = module(backend).gram_entropy_fwd(torch.zeros(shape), alpha, True)
        assert value.shape == shape[:-2] and (value == 0).all() and v.shape == shape


@pytest.mark.parametrize("k", (50, 150, 300))
@pytest.mark.parametrize("size", (1e-6, 1e-4, 1e-2))
def test_von_neumann_of_matrices_that_are_not_positive(k, size):
    """Eigenvalues below zero count as zero; what is below by rounding may count as rounding."""
    z = features("rank3", 20, k, k)
    noise = features("gaussian", 20, k, k, seed=1)
    g = z @ z.mT
    g = g + size * g.diagonal(dim1=-2, dim2=-1).mean() * (noise + noise.mT)
    truth = reference.entropy_of_gram(g.double(), 1.0)
    lam = torch.linalg.eigvalsh(g.double())
    below = torch.special.entr(-lam[:, 0] / lam.sum(-1)).max()
    allowed = 1e-5 * math.sqrt(k) + (k * below if size == 1e-6 else 0)
    for some in (g, g[:1]):  # in lanes and not
        value, v = module("cpu").gram_entropy_fwd(some, 1.0, True)
        assert ((value.double() - truth[: len(some)]).abs() < allowed).all()
        assert v.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_matrix_of_one_entry(backend):
    """1 / (1 + inf) is 0, which would look like a gradient."""
    value, v = module(backend).coding_rate_fwd(
        torch.full((2, 1, 3), math.inf), None, 1.0, False, False, True
    )
    assert value.isnan().all() and v.isnan().all()
