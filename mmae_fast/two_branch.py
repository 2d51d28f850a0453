"""Losses of two-branch self-supervised learning, and the entropy used with them.

Every function is batched over leading dimensions, differentiable, and computed in float32 (float64
for float64 input) whatever autocast says. Shapes: z1, z2 ``(..., n, d)``, row i of both the same
sample; one dtype (float32, bfloat16, float16 or float64) and device. All raise TypeError or
ValueError for views that do not fit, as :func:`mmae_fast.information.joint_entropy` does.
``process_group`` and ``grad_scale``: the loss of the rows of all ranks, which losses of two views
gather; see :func:`mmae_fast.fast_matrix_entropy`.

[1] Barlow Twins, ICML 2021, arXiv:2103.03230.
[2] Provable Guarantees for Self-Supervised Deep Learning with Spectral Contrastive Loss,
    NeurIPS 2021, arXiv:2106.04156.
[3] A Simple Framework for Contrastive Learning of Visual Representations (SimCLR), ICML 2020,
    arXiv:2002.05709.
[4] VNE: An Effective Method for Improving Deep Representation by Manipulating Eigenvalue
    Distribution, CVPR 2023, arXiv:2304.01434.
[5] Matrix Information Theory for Self-Supervised Learning (Matrix-SSL), ICML 2024,
    arXiv:2305.17326.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .distributed import over_ranks
from .information import _validate_views, matrix_cross_entropy
from .ops import _positive, fast_matrix_entropy
from .reference import accumulation_dtype, prepare

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BATCH_NORM_EPS = 1e-5


@over_ranks("z1", "z2")
def barlow_twins_loss(
    z1: Tensor,
    z2: Tensor,
    lambd: float = 0.0051,
    *,
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
) -> Tensor:
    """Redundancy reduction ([1], eq. 1).

    Equivalent to ::

        x1, x2 = (torch.nn.BatchNorm1d(d, affine=False)(z) for z in (z1, z2))
        c = x1.T @ x2 / n
        on, off = c.diagonal(), c[~torch.eye(d, dtype=bool)]
        (1 - on).square().sum() + lambd * off.square().sum()

    with batch statistics (biased variance, eps 1e-5). For n < d the d x d cross-correlation is not
    formed: ``||C||² = <X1 X1ᵀ, X2 X2ᵀ> / n²``, and the off-diagonal part is its difference with the
    diagonal (absolute rounding about eps · ||C||²).

    Args: lambd: weight of the off-diagonal part, > 0; 0.0051 in the published code.
    Returns: shape ``(...)``, dimensionless.
    """
    lambd = _positive("lambd", lambd)
    z1, z2 = _same_width(z1, z2)
    n, d = z1.shape[-2:]
    with torch.autocast(z1.device.type, enabled=False):
        x1, x2 = _standardized(z1), _standardized(z2)
        on = (x1 * x2).sum(-2) / n
        if n < d:
            square = ((x1 @ x1.mT) * (x2 @ x2.mT)).sum((-2, -1)) / n**2
            off = square - on.square().sum(-1)
        else:
            c = x1.mT @ x2 / n
            off = _off_diagonal(c).square().sum((-2, -1))
        return (1 - on).square().sum(-1) + lambd * off


@over_ranks("z1", "z2")
def spectral_contrastive_loss(
    z1: Tensor,
    z2: Tensor,
    mu: float = 1.0,
    *,
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
) -> Tensor:
    """Spectral contrastive loss ([2], as the authors' program computes it).

    Equivalent to ::

        x1, x2 = (z * (mu**0.5 / z.norm(dim=-1, keepdim=True)).clamp(max=1) for z in (z1, z2))
        s = x1 @ x2.T
        off = s[~torch.eye(n, dtype=bool)]
        (-2 * s.diagonal().mean() + off.square().mean()) / mu

    For d < n the n x n similarities are not formed: ``||S||² = <X1ᵀX1, X2ᵀX2>``, and the
    off-diagonal part is its difference with the diagonal (absolute rounding about
    eps · ||S||² / n²).

    Args: mu: rows longer than sqrt(mu) are cut to that length; > 0.
    Returns: shape ``(...)``, dimensionless, at least -2. NaN for n < 2.
    """
    mu = _positive("mu", mu)
    z1, z2 = _same_width(z1, z2)
    n, d = z1.shape[-2:]
    with torch.autocast(z1.device.type, enabled=False):
        x1, x2 = (_shortened(z, math.sqrt(mu)) for z in (z1, z2))
        on = (x1 * x2).sum(-1)
        if d < n:
            square = ((x1.mT @ x1) * (x2.mT @ x2)).sum((-2, -1))
            off = square - on.square().sum(-1)
        else:
            off = _off_diagonal(x1 @ x2.mT).square().sum((-2, -1))
        mean = off / (n * (n - 1)) if n > 1 else off * math.nan
        return (mean - 2 * on.sum(-1) / max(n, 1)) / mu


@over_ranks("z1", "z2")
def info_nce_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float = 0.1,
    *,
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
) -> Tensor:
    """Normalised temperature-scaled cross-entropy over the 2n views (NT-Xent, [3], eq. 1).

    Equivalent to ::

        x = torch.nn.functional.normalize(torch.cat([z1, z2]), dim=-1)
        s = (x @ x.T / temperature).fill_diagonal_(-torch.inf)
        torch.nn.functional.cross_entropy(s, torch.arange(2 * n).roll(n))

    Args: temperature: > 0.
    Returns: shape ``(...)``, in nats. Extra memory O(n²).
    """
    temperature = _positive("temperature", temperature)
    z1, z2 = _same_width(z1, z2)
    n = z1.shape[-2]
    with torch.autocast(z1.device.type, enabled=False):
        x = prepare(torch.cat([z1, z2], -2))
        s = x @ x.mT / temperature
        itself = torch.eye(2 * n, dtype=torch.bool, device=s.device)
        positive = s.diagonal(n, -2, -1)
        negative = s.masked_fill(itself, -math.inf).logsumexp(-1)
        return negative.mean(-1) - positive.mean(-1)


def ivne_loss(
    z: Tensor,
    *,
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Negative von Neumann entropy of the autocorrelation of normalised features ([4], I-VNE).

    Equivalent to ``-mmae_fast.fast_matrix_entropy(z, 1.0)``, i.e. to ``sum(lam * log(lam))`` over
    the eigenvalues of ``ẐᵀẐ / n``, finite at zero eigenvalues and in its gradient. (With zero rows
    the trace of that matrix is below 1 in [4]; here it is 1.) Arguments and errors: there.
    """
    options = {"process_group": process_group, "grad_scale": grad_scale, "backend": backend}
    return -fast_matrix_entropy(z, 1.0, **options)


@over_ranks("z1", "z2")
def matrix_uniformity_loss(
    z1: Tensor,
    z2: Tensor,
    lambd: float = 0.5,
    mu: float = 0.5,
    order: int | None = 4,
    *,
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
) -> Tensor:
    """Matrix uniformity ``tr(-lambd log Q)``, ``Q = mu I + C(Z1, Z2)`` (Matrix-SSL, [5]).

        C(Z1, Z2) = Ẑ1ᵀ H Ẑ2 / n   (H centres; Ẑ the normalised rows),   d x d, not symmetric

    It is the matrix cross-entropy MCE(lambd I, Q) without its term tr Q, as in the authors'
    program, whose defaults these are; the paper writes MCE(I/d, C).

    Args:
        lambd, mu: > 0.
        order: log Q by the Taylor polynomial of this order around I, as published; that converges
            while the eigenvalues of Q are within 1 of 1. None: exactly, i.e.
            ``-lambd * torch.logdet(Q)``, which is NaN where det Q < 0.
    Returns: shape ``(...)``, in nats.
    Raises: TypeError, ValueError: for order as well, unless it is a positive int or None.
    """
    lambd, mu, order = _positive("lambd", lambd), _positive("mu", mu), _order(order)
    z1, z2 = _same_width(z1, z2)
    with torch.autocast(z1.device.type, enabled=False):
        q = _covariance(z1, z2, mu)
        if order is None:
            return -lambd * torch.logdet(q)
        return -lambd * _trace_of_log(None, q, order)


@over_ranks("z1", "z2")
def matrix_alignment_loss(
    z1: Tensor,
    z2: Tensor,
    mu: float = 0.5,
    order: int | None = 4,
    *,
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Matrix alignment ``tr(-P log Q)`` of the two covariance matrices (Matrix-SSL, [5]).

        P = mu I + C(Z1, Z1),   Q = mu I + C(Z2, Z2),   C as in :func:`matrix_uniformity_loss`

    It is the matrix cross-entropy MCE(P, Q) without its term tr Q, as in the authors' program,
    which adds the losses of both orders of the views and halves them.

    Args:
        mu, order: see :func:`matrix_uniformity_loss`; order None is
            :func:`mmae_fast.information.matrix_cross_entropy` minus tr Q.
        backend: of the exact logarithm.
    Returns: shape ``(...)``, in nats.
    Raises: as :func:`matrix_uniformity_loss`.
    """
    mu, order = _positive("mu", mu), _order(order)
    z1, z2 = _same_width(z1, z2)
    with torch.autocast(z1.device.type, enabled=False):
        p, q = _covariance(z1, z1, mu), _covariance(z2, z2, mu)
        if order is None:
            trace = q.diagonal(dim1=-2, dim2=-1).sum(-1)
            return matrix_cross_entropy(p, q, backend=backend) - trace
        return -_trace_of_log(p, q, order)


def _same_width(z1, z2) -> tuple[Tensor, Tensor]:
    _validate_views(z1, z2, False, None, False, "auto")
    if z1.shape != z2.shape:
        raise ValueError(
            f"z1 and z2 must have one shape, got {tuple(z1.shape)} and {tuple(z2.shape)}"
        )
    dtype = accumulation_dtype(z1.dtype)
    return z1.to(dtype), z2.to(dtype)


def _order(order) -> int | None:
    if order is None:
        return None
    if isinstance(order, bool) or not isinstance(order, int):
        raise TypeError(f"order must be a positive int or None, got {order!r}")
    if order < 1:
        raise ValueError(f"order must be a positive int or None, got {order}")
    return order


def _standardized(z: Tensor) -> Tensor:
    """Columns of mean 0 and variance 1, as BatchNorm makes them from a batch."""
    centred = z - z.mean(-2, keepdim=True)
    variance = centred.square().mean(-2, keepdim=True)
    return centred * (variance + BATCH_NORM_EPS).rsqrt()


def _shortened(z: Tensor, longest: float) -> Tensor:
    """Rows cut to a largest length."""
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    long = norm > longest
    # The short must not reach the quotient: its derivative at a zero row is 0/0.
    norm = torch.linalg.vector_norm(torch.where(long, z, 1), dim=-1, keepdim=True)
    return torch.where(long, z * (longest / norm), z)


def _off_diagonal(x: Tensor) -> Tensor:
    return x - torch.diag_embed(x.diagonal(dim1=-2, dim2=-1))


def _covariance(z1: Tensor, z2: Tensor, mu: float) -> Tensor:
    x1 = prepare(z1, center=True)
    x2 = x1 if z2 is z1 else prepare(z2)  # centring one side centres both
    eye = torch.eye(z1.shape[-1], dtype=x1.dtype, device=x1.device)
    return x1.mT @ x2 / max(z1.shape[-2], 1) + mu * eye


def _trace_of_log(p: Tensor | None, q: Tensor, order: int) -> Tensor:
    """tr(P log Q), log by its Taylor polynomial around I; P = I if None."""
    m = q - torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    power, total = p, 0
    for k in range(1, order + 1):
        if power is None:
            term, power = m.diagonal(dim1=-2, dim2=-1).sum(-1), m
        else:
            term = (power * m.mT).sum((-2, -1))
            power = power @ m if k < order else None
        total = total - (-1) ** k / k * term
    return total
