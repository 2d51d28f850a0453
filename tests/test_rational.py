"""method="rational": the poles, the errors that the docs state, gradients, what it refuses."""

import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from mmae_fast import fast_matrix_entropy, reference
from mmae_fast.backends import factor, rational

from .accuracy import BACKENDS, features, floors
from .accuracy import entropy as exact

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import rational as derivation

DTYPES = (torch.float32, torch.float64)


def entropy(z, **options):
    return fast_matrix_entropy(z, method="rational", **options)


def value_and_gradient(function, z):
    z = z.detach().requires_grad_()
    value = function(z)
    return value.detach().double(), torch.autograd.grad(value.sum(), z)[0].double()


@pytest.mark.parametrize("count", rational.POLES)
def test_largest_error_on_the_unit_interval(count):
    """It is what is stated: neither more nor, so that the extrema are really seen, much less."""
    poles = rational.POLES[count]
    u, w = (torch.tensor(x, dtype=torch.float64) for x in (poles.shifts, poles.weights))
    assert len(u) == len(w) == count and (u > 0).all() and (u.diff() > 0).all()
    x = torch.logspace(-18, 0, 200_001, dtype=torch.float64)
    r = (w * x[:, None] / (x[:, None] + u)).sum(1) + poles.slope * x
    error = (r - torch.special.entr(x)).abs().max().item()
    assert 0.99 * poles.largest_error < error <= poles.largest_error


def test_poles_are_those_of_the_derivation():
    derived = derivation.poles(max(rational.POLES))
    for count, poles in rational.POLES.items():
        u, w, b, error = derived[count]
        assert poles.shifts == pytest.approx(u, rel=1e-4)
        assert poles.weights == pytest.approx(w, rel=1e-4)
        assert poles.slope == pytest.approx(b, rel=1e-4)
        assert poles.largest_error == pytest.approx(error, rel=2e-3)


def bound(z, **rows):
    """What the docs state: largest_error k ||rho||_F, and rounding."""
    rho = reference.gram(z.double(), **rows)
    k, tau = rho.shape[-1], rho.diagonal(dim1=-2, dim2=-1).sum(-1)
    s = torch.linalg.matrix_norm(rho) / torch.where(tau == 0, 1, tau)
    eps = torch.finfo(reference.accumulation_dtype(z.dtype)).eps
    largest = rational.POLES[rational.COUNT[reference.accumulation_dtype(z.dtype)]].largest_error
    return k * s * (largest + 4 * eps) + 4 * eps * (math.log(k + 1) + k**0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gaussian", "rank3", "duplicates", "decaying", "orthonormal"])
@pytest.mark.parametrize("shape", [(3, 40, 150), (2, 2, 90, 33), (300, 280)])
def test_value(kind, shape, dtype, backend):
    z = features(kind, *shape, dtype=dtype)
    for rows in ({}, {"center": True}, {"normalize": False}):
        if rows.get("center") and kind == "orthonormal":
            continue
        truth = reference.matrix_entropy(z.double(), 1, **rows)
        error = (entropy(z, backend=backend, **rows).double() - truth).abs()
        assert (error <= bound(z, **rows)).all(), (rows, error / bound(z, **rows))


def gradient_bound(z, **rows):
    """The approximation's part of the error, and that of the Gram matrix's rounding.

    With e = r' - f' the gradient of the prepared rows is off by 2/tau (e(rho) - tr(rho e(rho)) I)
    times them. Rounding moves the eigenvalues; r' is taken where they may have gone.
    """
    dtype = reference.accumulation_dtype(z.dtype)
    poles = rational.POLES[rational.COUNT[dtype]]
    x = reference.prepare(z.double(), **rows)
    sigma = torch.linalg.svdvals(x)
    tau, norm = sigma.square().sum(-1, keepdim=True), sigma.pow(4).sum(-1, keepdim=True).sqrt()
    lam = sigma.square() / norm
    e = torch.zeros_like(lam)
    for moved in (-4, 0, 4):
        at = lam.unsqueeze(-1) + moved * torch.finfo(dtype).eps
        u, w = (torch.tensor(v, dtype=torch.float64) for v in (poles.shifts, poles.weights))
        slope = (w * u / (at + u).square()).sum(-1) + poles.slope
        e = torch.maximum(e, (slope + lam.clamp(min=1e-300).log() + 1).abs())
    spread = (e * sigma).amax(-1) + (lam * norm / tau * e).sum(-1) * sigma[..., 0]
    length = 1.0
    if rows.get("normalize", True):
        kept = reference.prepare(z.double(), normalize=False, mask=rows.get("mask")).norm(dim=-1)
        length = torch.where(kept > 0, 1 / kept, 0).amax(-1)
    value = reference.matrix_entropy(z.double(), 1, **rows)
    rounding = floors(exact(1.0), z, value, {"center": False, **rows})[1]
    return 2 * length / tau[..., 0] * spread + rounding


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gaussian", "rank3", "duplicates", "decaying"])
@pytest.mark.parametrize("shape", [(3, 40, 150), (90, 33), (300, 280)])
def test_gradient(kind, shape, dtype, backend):
    z = features(kind, *shape, dtype=dtype)
    mask = torch.arange(shape[-2]).expand(z.shape[:-1]) % 7 != 3
    for rows in ({}, {"mask": mask}, {"center": True}, {"normalize": False}):
        truth = value_and_gradient(partial(reference.matrix_entropy, alpha=1, **rows), z.double())
        found = value_and_gradient(partial(entropy, backend=backend, **rows), z)
        error = (found[1] - truth[1]).abs().amax((-2, -1))
        allowed = gradient_bound(z, **rows)
        assert (error <= allowed).all(), (rows, error / allowed)


def test_gradient_is_the_derivative_of_the_value():
    """Of the exact entropy, so as close to a difference of values as these are to it."""
    z = features("gaussian", 20, 12, dtype=torch.float64)
    step = features("gaussian", 20, 12, dtype=torch.float64, seed=1)
    _, grad = value_and_gradient(entropy, z)
    difference = (entropy(z + 1e-3 * step) - entropy(z - 1e-3 * step)) / 2e-3
    assert difference.item() == pytest.approx((grad * step).sum().item(), rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate(backend):
    z = torch.zeros(2, 5, 4)
    z[1] = torch.eye(5, 4)
    value, grad = value_and_gradient(lambda z: entropy(z, backend=backend), z)
    assert value[0] == 0 and value[1] == pytest.approx(math.log(4), abs=1e-5)
    assert (grad[0] == 0).all() and grad.isfinite().all()
    assert entropy(torch.ones(0, 3), backend=backend) == 0
    for bad in (math.nan, math.inf):
        z[0, 0, 0] = bad
        value, grad = value_and_gradient(lambda z: entropy(z, backend=backend), z)
        assert value[0].isnan() and not value[1].isnan()
        assert grad[0].isnan().any() and grad[1].isfinite().all()
    for size in (1e-25, 1e25):  # no square of theirs is in range
        z = size * features("gaussian", 30, 8)
        assert entropy(z, normalize=False, backend=backend) == pytest.approx(
            reference.matrix_entropy(z.double(), 1, normalize=False).item(), abs=1e-5
        )


@pytest.mark.parametrize("n", [4096, 300])
def test_collapsed_float32_has_its_factors(n):
    """One eigenvalue of 1, all others rounding: the smallest pole is above that."""
    z = torch.ones(n, 1200) * torch.linspace(1, 2, 1200)
    value, grad = value_and_gradient(entropy, z)
    assert value.abs() < 1e-3 and grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse_without_error_codes(dtype):
    """How it is computed where looking at error codes would synchronise."""
    x = features("gaussian", 3, 20, 50, dtype=dtype)
    a = x @ x.mT
    a[1] = -a[1]
    place = a.clone()
    lower, failed = factor.factorise(place)
    assert failed.tolist() == [False, True, False] and lower.data_ptr() == place.data_ptr()
    found = factor._inverse_by_products(lower.clone(memory_format=torch.preserve_format))
    expected = factor.inverse(lower)
    assert expected.data_ptr() == place.data_ptr()
    assert found[1].isnan().all() and expected[1].isnan().all()
    eps = torch.finfo(dtype).eps
    for inverse in (found, expected):
        product = (inverse.double() @ a.double())[::2]
        assert (product - torch.eye(20)).abs().max() < 100 * eps


def test_batches_are_served_together_and_alone(monkeypatch):
    z = features("gaussian", 4, 12, 20)
    together = entropy(z)
    monkeypatch.setattr(rational, "TOGETHER", 0)
    torch.testing.assert_close(entropy(z), together, rtol=1e-6, atol=1e-6)


def test_refuses():
    z = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"method must be one of .*'rational'.*, got 'svd'"):
        fast_matrix_entropy(z, method="svd")
    with pytest.raises(ValueError, match=r"for alpha = 1 only, got alpha = 2\.0"):
        fast_matrix_entropy(z, 2, method="rational")
    x = torch.randn(5, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(entropy(x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


def test_operator():
    z = features("gaussian", 2, 9, 6).requires_grad_()
    torch.library.opcheck(
        torch.ops.mmae_fast.rational_entropy_fwd.default, (z, None, 1.0, True, False, True, "cpu")
    )
    compiled = torch.compile(lambda z: entropy(z).sum(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z), entropy(z).sum())
    per_matrix = torch.func.vmap(torch.func.grad(entropy))(z.detach())
    torch.testing.assert_close(per_matrix, torch.autograd.grad(entropy(z).sum(), z)[0])
