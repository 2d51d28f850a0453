"""The theorems behind the losses, as functions that return both sides of each inequality.

docs/theory.md derives them. [1] shows that at loss 0 the Barlow Twins and the spectral contrastive
loss have the largest matrix mutual information and joint entropy at alpha = 2, and that the
regulariser of U-MAE is the second-order Taylor term of M-MAE's; the bounds away from loss 0 and the
remainder are derived here, and need not have the constants of [1].

Float64 features are advised: the bounds are compared to values that differ by less than float32
resolves.

[1] Information Flow in Self-Supervised Learning, ICML 2024, arXiv:2309.17281.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .information import joint_entropy, mutual_information
from .ops import _positive, fast_coding_rate, fast_gram, fast_matrix_entropy
from .two_branch import (
    _same_width,
    _shortened,
    _standardized,
    barlow_twins_loss,
    spectral_contrastive_loss,
)


class Bound(NamedTuple):
    """``lower <= value <= upper``, each of shape ``(...)``."""

    lower: Tensor
    value: Tensor
    upper: Tensor


class TwoBranchBounds(NamedTuple):
    """What a loss says about two views at alpha = 2; both bounds meet at log m for excess 0.

    excess: the loss above its smallest possible value.
    """

    excess: Tensor
    joint_entropy: Bound
    mutual_information: Bound


class TaylorBound(NamedTuple):
    """``lower <= value <= upper`` for a coding rate, and ``radius = c · lambda_max``.

    The series of log(1 + x) that lower is cut from converges for radius < 1.
    """

    lower: Tensor
    value: Tensor
    upper: Tensor
    radius: Tensor


def barlow_twins_bounds(z1: Tensor, z2: Tensor, lambd: float = 0.0051) -> TwoBranchBounds:
    """Joint entropy and mutual information of the columns, bounded by the Barlow Twins loss L.

    With X the batch-normalised views (n, d), K = XᵀX / n (d x d: columns in place of samples),
    m = d, and from the loss alone

        δ = sqrt(d L) >= Σ_i (1 - C_ii),    o = sqrt(L / lambd) >= ||C - Diag(C)||_F

    the bounds are those of :func:`bounds_from_alignment`. Both entropies are log d at L = 0.

    Args: as :func:`mmae_fast.losses.barlow_twins_loss`.
    """
    loss = barlow_twins_loss(z1, z2, lambd).clamp(min=0)
    views = (_standardized(z).mT for z in _same_width(z1, z2))
    d = z1.shape[-1]
    return _two_branch_bounds(*views, loss, (d * loss).sqrt(), (loss / lambd).sqrt())


def spectral_contrastive_bounds(z1: Tensor, z2: Tensor, mu: float = 1.0) -> TwoBranchBounds:
    """Joint entropy and mutual information of the rows, bounded by the spectral contrastive loss.

    With X the views (n, d) whose rows are cut to length sqrt(mu), K = X Xᵀ / mu, m = n, S the cross
    similarities divided by mu, E = loss + 2 >= 0, and from the loss alone

        δ = n E / 2 >= Σ_i (1 - S_ii),    o = sqrt(n (n - 1) E / mu) >= ||S - Diag(S)||_F

    the bounds are those of :func:`bounds_from_alignment`. Both entropies are log n at E = 0, which
    needs n <= d.

    Args: as :func:`mmae_fast.losses.spectral_contrastive_loss`; n >= 2.
    """
    excess = (spectral_contrastive_loss(z1, z2, mu) + 2).clamp(min=0)
    views = (_shortened(z, math.sqrt(mu)) for z in _same_width(z1, z2))
    n = z1.shape[-2]
    off = (n * (n - 1) * excess / mu).sqrt()
    return _two_branch_bounds(*views, excess, n * excess / 2, off)


def bounds_from_alignment(m: int, delta: Tensor, off: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lower bounds on H_2 of either view and of both, and on I_2 (docs/theory.md, theorem 1).

    For vectors u_1 … u_m and v_1 … v_m no longer than 1, with ``Σ_i (1 - u_i·v_i) <= delta`` and
    ``Σ_{i≠j} (u_i·v_j)² <= off²``:

        ||K - Diag(K)||_F <= T = o + δ + sqrt(δ² + 2 δ (1 + o))            for both Gram matrices
        H_2(K1), H_2(K2)  >= 2 log(m - 2δ) - log(m + T²)
        H_2(K1 ⊙ K2)      >= 2 log(m - 2δ) - log(m + min(T², T⁴))
        I_2               >= H_2(K1) + H_2(K2) - log m

    Entropies are not negative either; where m <= 2δ the bounds say no more than that.
    """
    t = off + delta + (delta.square() + 2 * delta * (1 + off)).sqrt()
    square = t.square().clamp(max=m * (m - 1))
    trace = 2 * (m - 2 * delta).clamp(min=0).log()
    single = (trace - (m + square).log()).clamp(min=0)
    joint = (trace - (m + torch.minimum(square, square.square())).log()).clamp(min=0)
    return single, joint, 2 * single - math.log(m)


def _two_branch_bounds(x1, x2, excess, delta, off) -> TwoBranchBounds:
    m = x1.shape[-2]
    _, joint, mutual = bounds_from_alignment(m, delta, off)
    largest = torch.full_like(joint, math.log(m))
    h = joint_entropy(x1, x2, 2.0, normalize=False)
    i = mutual_information(x1, x2, 2.0, normalize=False)
    return TwoBranchBounds(excess, Bound(joint, h, largest), Bound(mutual, i, 2 * largest - joint))


def coding_rate_taylor(z: Tensor, mu: float = 1.0) -> TaylorBound:
    """The total coding rate of M-MAE between two second-order expressions, U-MAE's term in both.

    With Ẑ the normalised rows, G = ẐẐᵀ, c = mu / d, and the uniformity term U of U-MAE in
    ``S = c² ||G||_F² = c² n² U``, U = mean_ij (ẑ_i·ẑ_j)²:

        c tr G - S/2  <=  log det(I + cG)  <=  c tr G - S/2 + (c lambda_max) S/3

    for every c > 0 (docs/theory.md, theorem 2). What is left over is at most the fraction
    2/3 · c lambda_max of the second-order term S/2: M-MAE is U-MAE with weight c² n² / 2 in the
    limit of small c lambda_max. Collapsed features (lambda_max = n) leave it where n >= d / mu.

    Args:
        z: features, shape ``(..., n, d)``.
        mu: as :func:`mmae_fast.losses.tcr_loss`.
    """
    c = _positive("mu", mu) / z.shape[-1]
    g = fast_gram(z)
    trace = g.diagonal(dim1=-2, dim2=-1).sum(-1)
    second = c**2 * g.square().sum((-2, -1))
    radius = c * trace * (-fast_matrix_entropy(z, math.inf)).exp()
    lower = c * trace - second / 2
    return TaylorBound(lower, fast_coding_rate(z, c), lower + radius / 3 * second, radius)
