"""Every inequality of docs/theory.md on random and adversarial features, in float64.

Rounding allowance: both sides of an entropy bound are sums of at most 24² terms of order 1, divided
by numbers of order m, and their slopes in the loss are of the order m²: 1e-10 is ample, and small
against the gap of any bound that could be wrong.
"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmae_fast import fast_coding_rate, losses, theory
from mmae_fast.theory import (
    barlow_twins_bounds,
    bounds_from_alignment,
    coding_rate_taylor,
    spectral_contrastive_bounds,
)

from .accuracy import features
from .test_properties import cases

ALLOWANCE = 1e-10
KINDS = ("gaussian", "collapsed", "rank1", "rank3", "duplicates", "zero rows", "zeros")
KINDS += ("decaying", "orthonormal")


@st.composite
def pairs(draw, least=2):
    """Two views: unrelated, equal, nearly equal, anti-correlated, permuted; of any kind."""
    n, d = draw(st.integers(least, 24)), draw(st.integers(1, 24))
    seed = draw(st.integers(0, 2**30))
    z1 = features(draw(st.sampled_from(KINDS)), n, d, dtype=torch.float64, seed=seed)
    relation = draw(st.sampled_from(("unrelated", "equal", "near", "opposite", "permuted")))
    if relation == "unrelated":
        z2 = features(draw(st.sampled_from(KINDS)), n, d, dtype=torch.float64, seed=seed + 1)
    elif relation == "near":
        noise = features("gaussian", n, d, dtype=torch.float64, seed=seed + 1)
        z2 = z1 + 10.0 ** draw(st.integers(-6, 0)) * z1.square().mean().sqrt() * noise
    elif relation == "permuted":
        z2 = z1[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    else:
        z2 = z1 if relation == "equal" else -z1
    return z1, z2, 10.0 ** draw(st.sampled_from((-2, 0, 0, 2, 4)))


def holds(bound):
    assert bound.lower <= bound.value + ALLOWANCE, bound
    assert bound.value <= bound.upper + ALLOWANCE, bound


@cases(300)
@given(pairs(), st.sampled_from((0.0051, 0.1, 1.0)))
def test_barlow_twins(views, lambd):
    z1, z2, scale = views
    bounds = barlow_twins_bounds(scale * z1, scale * z2, lambd)
    assert bounds.excess >= 0
    holds(bounds.joint_entropy)
    holds(bounds.mutual_information)


@cases(300)
@given(pairs(), st.sampled_from((0.5, 1.0, 10.0)))
def test_spectral_contrastive(views, mu):
    z1, z2, scale = views
    bounds = spectral_contrastive_bounds(scale * z1, scale * z2, mu)
    assert bounds.excess >= 0
    holds(bounds.joint_entropy)
    holds(bounds.mutual_information)


@cases(300)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(-8, 0), st.integers(0, 2**30))
def test_alignment_theorem_near_its_equality(m, d, exponent, seed):
    """Theorem 1 itself, with the exact δ and o, also for vectors shorter than 1."""
    generator = torch.Generator().manual_seed(seed)
    d = max(d, m)
    u = torch.linalg.qr(torch.randn(d, m, generator=generator, dtype=torch.float64))[0].mT
    u = u + 10.0**exponent * torch.randn(m, d, generator=generator, dtype=torch.float64)
    v = u + 10.0**exponent * torch.randn(m, d, generator=generator, dtype=torch.float64)
    u, v = (x / x.norm(dim=-1, keepdim=True).clamp(min=1) for x in (u, v))
    c = u @ v.mT
    delta = (1 - c.diagonal()).sum()
    off = (c - torch.diag(c.diagonal())).norm()
    single, joint, mutual = bounds_from_alignment(m, delta, off)
    # T itself is steep in δ at 0, and 1 - C_ii is off by a few eps.
    rounded = delta + 4 * m * torch.finfo(c.dtype).eps
    t = off + rounded + (rounded**2 + 2 * rounded * (1 + off)).sqrt()
    k = [x @ x.mT for x in (u, v)]

    def h(g):
        return 2 * g.trace().log() - 2 * g.norm().log()

    for g in k:
        assert (g - torch.diag(g.diagonal())).norm() <= t + ALLOWANCE
        assert single <= h(g) + ALLOWANCE
    assert joint <= h(k[0] * k[1]) + ALLOWANCE
    assert mutual <= h(k[0]) + h(k[1]) - h(k[0] * k[1]) + ALLOWANCE


@pytest.mark.parametrize("m", [2, 5, 12])
def test_bounds_are_tight_at_loss_0(m):
    """Lower bound, value and upper bound are one number there, log m."""
    z = torch.cat([torch.ones(20, 1), features("gaussian", 20, m)], 1).double()
    z = torch.linalg.qr(z)[0][:, 1:]
    # Batch normalisation's eps keeps the loss of finite columns above 0, so they are long.
    for bounds, loose in (
        (barlow_twins_bounds(1e7 * z, 1e7 * z), 1e-9),
        (spectral_contrastive_bounds(2 * z.mT, 2 * z.mT), 1e-12),
    ):
        assert bounds.excess.item() == pytest.approx(0, abs=1e-13)
        for bound in bounds[1:]:
            for side in bound:
                assert side.item() == pytest.approx(math.log(m), abs=loose)


def test_bounds_say_something_away_from_loss_0():
    """They close in on log m like δ + o²: not a bound that holds because it is vacuous."""
    z = torch.linalg.qr(features("gaussian", 32, 8).double())[0].mT
    noise = features("gaussian", 8, 32, dtype=torch.float64) / 32**0.5
    gaps = []
    for step in (1e-1, 1e-2, 1e-3):
        bounds = spectral_contrastive_bounds(2 * z, 2 * (z + step * noise))
        gaps.append([math.log(8) - bound.lower.item() for bound in bounds[1:]])
    assert max(gaps[0]) < math.log(8) / 2
    for larger, smaller in pairwise(gaps):
        assert all(0 < s < l / 50 for s, l in zip(smaller, larger, strict=True))


def test_bounds_are_batched():
    z1, z2 = (features("gaussian", 3, 6, 5, dtype=torch.float64, seed=seed) for seed in (0, 1))
    for function in (barlow_twins_bounds, spectral_contrastive_bounds):
        batch = function(z1, z2)
        one = function(z1[1], z2[1])
        torch.testing.assert_close(batch.excess[1], one.excess)
        for many, single in zip(batch[1:], one[1:], strict=True):
            for a, b in zip(many, single, strict=True):
                assert a.shape == (3,)
                torch.testing.assert_close(a[1], b)


@cases(300)
@given(pairs(least=1), st.sampled_from((1e-3, 0.1, 1.0, 3.0, 30.0, 1e3)))
def test_taylor(views, mu):
    z, _, scale = views
    bound = coding_rate_taylor(scale * z, mu)
    size = ALLOWANCE * (1 + bound.upper.abs())  # sums of (c lambda)² and (c lambda)³
    assert bound.lower <= bound.value + size, bound
    assert bound.value <= bound.upper + size, bound


def test_taylor_is_the_published_relation():
    """-TCR + c n = (c² n² / 2) · U-MAE's term up to the remainder, by the losses themselves."""
    z = features("gaussian", 20, 40, dtype=torch.float64)
    n, d = z.shape
    for mu in (1e-3, 1e-2, 0.1, 1.0):
        bound = coding_rate_taylor(z, mu)
        c = mu / d
        tcr = losses.tcr_loss(z, mu)
        term = c**2 * n**2 / 2 * losses.uniformity_loss(z)
        torch.testing.assert_close(-tcr, bound.value)
        torch.testing.assert_close(bound.lower, c * n - term)
        remainder = (c * n - term + tcr).abs()
        assert remainder <= 2 / 3 * bound.radius * term * (1 + 1e-6) + 1e-14
        assert bound.radius.item() == pytest.approx(
            c * torch.linalg.matrix_norm(z / z.norm(dim=-1, keepdim=True), 2).item() ** 2
        )


def test_taylor_fails_for_collapsed_features():
    """n >= d / mu equal rows: radius >= 1, and the two losses part."""
    z = features("gaussian", 1, 8, dtype=torch.float64).expand(16, 8)
    bound = coding_rate_taylor(z)
    assert bound.radius.item() == pytest.approx(2)
    assert bound.value.item() == pytest.approx(math.log(3))
    assert bound.lower.item() == pytest.approx(2 - 2**2 / 2)
    assert bound.upper.item() == pytest.approx(2 - 2 + 2**3 / 3)
    torch.testing.assert_close(bound.value, fast_coding_rate(z, 1 / 8))


def test_errors_come_through():
    z = features("gaussian", 4, 6)
    with pytest.raises(ValueError, match=r"got \(4, 6\) and \(4, 5\)"):
        barlow_twins_bounds(z, z[:, :5])
    with pytest.raises(ValueError, match=r"mu must be > 0 and finite, got 0\.0"):
        spectral_contrastive_bounds(z, z, 0)
    with pytest.raises(ValueError, match=r"mu must be > 0 and finite, got -1\.0"):
        coding_rate_taylor(z, -1)
    assert theory.Bound._fields == ("lower", "value", "upper")
