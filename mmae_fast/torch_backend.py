"""The backend made of PyTorch calls: any device, closed-form gradients, no host synchronisation.

It serves devices without kernels of their own, and matrices too large for the compiled kernels,
where the vendor's factorisations are the right tool. What is kept for the backward pass is the
k x k matrix ``weight``, in the convention of all backends (derived in csrc/cpu/kernels.inl):

    V = d value / dG,   C = V with rows and columns centred (if centred),   D = Diag(||z_i||)
    samples side:   W' = 2 D⁻¹ (C - Diag(s)) D⁻¹,  s_i = ẑ_i·(C Ẑ)_i,   grad Z = grad · W' Z
    features side:  W' = 2 V,   y_i = ẑ_i W',   grad z_i = grad · (y_i - (ẑ_i·y_i) ẑ_i) / ||z_i||
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference

# c · lambda_max · eps (lambda_max at most the trace) above which the rounding of a float32 Gram
# matrix may swamp the identity in I + cG: on the CPU float64 takes over, as in its kernels;
# elsewhere the result is NaN where I + cG is not positive definite in float32.
SWAMPED = 1e-3


class GramParts(NamedTuple):
    """Gram matrix ``(..., k, k)`` with the row scale ``(..., n)`` and mean row ``(..., d)``."""

    gram: Tensor
    scale: Tensor
    mean: Tensor


def full_precision(function):
    """Autocast must not reach the Gram matrix or its factor."""

    @functools.wraps(function)
    def wrapped(*args, **options):
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        with torch.autocast(device, enabled=False):
            return function(*args, **options)

    return wrapped


def row_scale(z: Tensor, mask: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor]:
    """z in the accumulation dtype, dropped rows zero; and 1 / row norm.

    That is 0 for zero and dropped rows, and 1 for all others without normalisation.
    """
    z = z.to(reference.accumulation_dtype(z.dtype))
    if mask is not None:
        z = torch.where(mask.unsqueeze(-1), z, 0)
    if not normalize:
        return z, z.new_ones(z.shape[:-1]) if mask is None else mask.to(z.dtype)
    if not z.shape[-1]:
        return z, z.new_zeros(z.shape[:-1])
    # Scaled by the largest entry, so that no square vanishes or overflows.
    largest = z.abs().amax(-1)
    safe = torch.where(largest == 0, 1, largest)
    norm = torch.linalg.vector_norm(z / safe.unsqueeze(-1), dim=-1) * safe
    return z, torch.where(norm == 0, 0, 1 / norm)


def mean_row(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.sum(-2) / max(x.shape[-2], 1)
    return x.sum(-2) / mask.sum(-1, keepdim=True).clamp(min=1)


def prepared(z: Tensor, mask: Tensor | None, normalize: bool, center: bool):
    """Prepared rows (see :func:`reference.prepare`), their scale and the mean row."""
    z, scale = row_scale(z, mask, normalize)
    x = z * scale.unsqueeze(-1)
    if not center:
        return x, scale, x.new_zeros(x.shape[:-2] + x.shape[-1:])
    mean = mean_row(x, mask)
    x = x - mean.unsqueeze(-2)
    return (x if mask is None else torch.where(mask.unsqueeze(-1), x, 0)), scale, mean


@full_precision
def gram(z: Tensor, mask, samples: bool, normalize: bool, center: bool) -> GramParts:
    x, scale, mean = prepared(z, mask, normalize, center)
    g = x @ x.mT if samples else x.mT @ x
    g = g.tril() + g.tril(-1).mT  # a matrix product is symmetric up to rounding only
    if samples and normalize and not center:
        # The diagonal of normalised rows is 1 by definition: say so, instead of 1 ± rounding.
        diagonal = g.diagonal(dim1=-2, dim2=-1)
        diagonal.copy_(torch.where((scale > 0) & torch.isfinite(scale), 1, diagonal))
    return GramParts(g, scale, mean)


def coding_rate_of_gram(g: Tensor, scale: float, need_weight: bool) -> tuple[Tensor, Tensor | None]:
    """``log det(I + scale G)`` and ``V = scale (I + scale G)⁻¹``."""
    a = g * scale
    a.diagonal(dim1=-2, dim2=-1).add_(1)
    factor, info = torch.linalg.cholesky_ex(a)
    log_diagonal = factor.diagonal(dim1=-2, dim2=-1).double().log()
    value = 2 * log_diagonal.sum(-1)
    trace = g.diagonal(dim1=-2, dim2=-1).sum(-1)
    failed = (info != 0) | ~torch.isfinite(trace)
    value = torch.where(failed, math.nan, value).to(g.dtype)
    if not need_weight:
        return value, None
    eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    v = scale * torch.cholesky_inverse(torch.where(failed[..., None, None], eye, factor))
    return value, torch.where(failed[..., None, None], math.nan, v)


def entropy_of_spectrum(lam: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """H_alpha of the eigenvalues ``(..., k)`` of rho, and f with ``d H = sum f_r d lam_r``.

    f is singular at zero; eigenvalues below the rounding of the dtype are noise around zero, and
    f takes a tenth of that rounding in their place.
    """
    largest = lam.amax(-1, keepdim=True)
    floored = torch.maximum(lam, 0.1 * torch.finfo(lam.dtype).eps * largest)
    positive = lam > 0
    safe = torch.where(positive, lam, 1)
    if alpha == 1:
        h = -(safe * safe.log()).sum(-1)
        return h, -(floored.log() + h.unsqueeze(-1))
    if math.isinf(alpha):
        top = torch.zeros_like(lam)
        top[..., -1] = 1  # eigenvalues come in ascending order
        return -lam[..., -1].log(), 1 - top / largest
    total = torch.where(positive, safe.pow(alpha), 0).sum(-1, keepdim=True)
    f = alpha / (1 - alpha) * (floored.pow(alpha - 1) / total - 1)
    return total.squeeze(-1).log() / (1 - alpha), f


def spectral_matrix(vectors: Tensor, f: Tensor) -> Tensor:
    """``sum_r f_r v_r v_rᵀ``, v_r the columns of ``vectors`` (..., k, k), f (..., k)."""
    return (vectors * f.unsqueeze(-2)) @ vectors.mT


def entropy_of_gram(
    g: Tensor, alpha: float, need_weight: bool, spectral=spectral_matrix
) -> tuple[Tensor, Tensor | None]:
    """H_alpha of ``G / tr G`` and ``V = dH/dG``."""
    trace = g.diagonal(dim1=-2, dim2=-1).sum(-1)
    empty = trace == 0
    poison = trace - trace  # 0, or NaN where z had NaN or Inf
    tau = torch.where(empty, 1, trace)
    v = None
    if alpha == 2:
        square = torch.linalg.vector_norm(g, dim=(-2, -1), dtype=torch.float64).square()
        square = torch.where(empty, 1, square)
        h = (2 * tau.double().log() - square.log()).to(g.dtype)
        if need_weight:
            v = g * (-2 / square).to(g.dtype)[..., None, None]
            v.diagonal(dim1=-2, dim2=-1).add_((2 / tau).unsqueeze(-1))
    else:
        # Eigensolvers reject NaN and Inf: they get I there. (On the CPU it costs nothing to look.)
        usable = ~empty & (poison == 0)
        if g.device.type != "cpu" or not usable.all():
            eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
            g = torch.where(usable[..., None, None], g, eye)
            tau = torch.where(usable, tau, g.shape[-1])
        if need_weight:
            lam, vectors = torch.linalg.eigh(g)
            h, f = entropy_of_spectrum(lam / tau.unsqueeze(-1), alpha)
            v = spectral(vectors, f / tau.unsqueeze(-1))
        else:
            h, _ = entropy_of_spectrum(torch.linalg.eigvalsh(g) / tau.unsqueeze(-1), alpha)
    h = torch.where(empty, 0, h) + poison
    if v is not None:
        v = torch.where(empty[..., None, None], 0, v) + poison[..., None, None]
    return h, v


@full_precision
def fold(v: Tensor, parts: GramParts, z: Tensor, mask, samples: bool, normalize, center) -> Tensor:
    """V -> W', see the head of this file; in place where it can."""
    if not samples:
        return v.mul_(2)
    g, scale, mean = parts
    if center:
        kept = torch.ones_like(scale) if mask is None else mask.to(v.dtype)
        count = kept.sum(-1, keepdim=True).clamp(min=1)
        for side in (-1, -2):
            v = v - (v * kept.unsqueeze(-3 - side)).sum(side, keepdim=True) / count.unsqueeze(-1)
        v = v * kept.unsqueeze(-1) * kept.unsqueeze(-2)
    if normalize:
        s = torch.linalg.vecdot(v, g)
        if center:
            x, _, _ = prepared(z, mask, normalize, center)
            s = s + (v @ (x @ mean.unsqueeze(-1))).squeeze(-1)
        v.diagonal(dim1=-2, dim2=-1).sub_(s)
    return v.mul_(2 * scale.unsqueeze(-1)).mul_(scale.unsqueeze(-2))


@full_precision
def coding_rate_fwd(z, mask, scale, normalize, center, need_weight):
    dtype = reference.accumulation_dtype(z.dtype)
    samples = z.shape[-2] <= z.shape[-1]
    parts = gram(z, mask, samples, normalize, center)
    if z.device.type == "cpu":  # elsewhere, to look would be to synchronise
        trace = parts.gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        swamped = scale * trace * torch.finfo(dtype).eps > SWAMPED
        if (swamped & torch.isfinite(trace)).any():
            z = z.double()
            parts = gram(z, mask, samples, normalize, center)
    value, v = coding_rate_of_gram(parts.gram, scale, need_weight)
    if not need_weight:
        return value.to(dtype), None
    weight = fold(v, parts, z, mask, samples, normalize, center)
    return value.to(dtype), weight.to(dtype)


def in_range(z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """z times a factor ``(..., 1, 1)`` that brings its entries to at most 1, and the factor.

    Entropies do not see it; it keeps the squares of unnormalised features in range. W' then carries
    the square of the factor.
    """
    z = z.to(reference.accumulation_dtype(z.dtype))
    entries = z if mask is None else torch.where(mask.unsqueeze(-1), z, 0)
    largest = entries.abs().amax((-2, -1), keepdim=True)
    factor = torch.where((largest == 0) | ~torch.isfinite(largest), 1, 1 / largest)
    return z * factor, factor


@full_precision
def matrix_entropy_fwd(
    z, mask, alpha, normalize, center, need_weight, gram=gram, spectral=spectral_matrix
):
    samples = z.shape[-2] <= z.shape[-1]
    if not min(z.shape[-2:]):
        zero = z.new_zeros(z.shape[:-2], dtype=reference.accumulation_dtype(z.dtype))
        return zero, zero.new_zeros((*zero.shape, 0, 0)) if need_weight else None
    factor = None
    if not normalize:
        z, factor = in_range(z, mask)
    parts = gram(z, mask, samples, normalize, center)
    h, v = entropy_of_gram(parts.gram, alpha, need_weight, spectral)
    if not need_weight:
        return h, None
    weight = fold(v, parts, z, mask, samples, normalize, center)
    return h, weight if factor is None else weight * factor * factor


@full_precision
def gram_entropy_fwd(g, alpha, need_weight, spectral=spectral_matrix):
    """H_alpha of a ready Gram matrix ``(..., k, k)``, and V."""
    if not g.shape[-1]:
        return g.new_zeros(g.shape[:-2]), torch.zeros_like(g) if need_weight else None
    return entropy_of_gram(g, alpha, need_weight, spectral)


@full_precision
def joint_entropy_fwd(
    z1, z2, mask, alpha, normalize, center, need_weight, gram=gram, spectral=spectral_matrix
):
    """H_alpha of K1 ⊙ K2, and the two n x n weights W' of ``samples_bwd``.

    With V = dH / d(K1 ⊙ K2): dH/dK1 = V ⊙ K2 and dH/dK2 = V ⊙ K1, each folded like any other V.
    """
    views, parts, factors = [], [], []
    for z in (z1, z2):
        if not z.shape[-1]:  # no features: K = 0
            z = z.new_zeros((*z.shape[:-1], 1))
        z, factor = (z, None) if normalize or not z.shape[-2] else in_range(z, mask)
        views.append(z)
        factors.append(factor)
        parts.append(gram(z, mask, True, normalize, center))
    value, v = gram_entropy_fwd(parts[0].gram * parts[1].gram, alpha, need_weight, spectral)
    if not need_weight:
        return value, None, None
    weights = []
    for z, own, other, factor in zip(views, parts, reversed(parts), factors, strict=True):
        weight = fold(v * other.gram, own, z, mask, True, normalize, center)
        weights.append(weight if factor is None else weight * factor * factor)
    return value, *weights


@full_precision
def samples_bwd(grad, z, mask, weight) -> Tensor:
    """Gradient of z ``(..., n, d)``, z's dtype, from grad ``(...)`` and weight ``(..., n, n)``."""
    raw, _ = row_scale(z, mask, False)
    return (weight * grad[..., None, None] @ raw).to(z.dtype)


@full_precision
def weight_bwd(grad, z, mask, weight, normalize, center) -> Tensor:
    """Gradient of z ``(..., n, d)``, z's dtype, from grad ``(...)`` and weight ``(..., k, k)``."""
    if z.shape[-2] <= z.shape[-1]:
        return samples_bwd(grad, z, mask, weight)
    weight = weight * grad[..., None, None]
    x, scale, mean = prepared(z, mask, normalize, center)
    y = x @ weight
    if normalize:
        x = x + mean.unsqueeze(-2)
        y = y - (x * y).sum(-1, keepdim=True) * x
        y = y * scale.unsqueeze(-1)
    return (y if mask is None else torch.where(mask.unsqueeze(-1), y, 0)).to(z.dtype)


@full_precision
def gram_bwd(grad, z, mask, parts: GramParts, samples, normalize, center) -> Tensor:
    """Gradient of z from the gradient ``(..., k, k)`` of the Gram matrix of either side."""
    x, scale, mean = prepared(z, mask, normalize, center)
    symmetric = grad + grad.mT
    y = symmetric @ x if samples else x @ symmetric
    if center:
        kept = y if mask is None else torch.where(mask.unsqueeze(-1), y, 0)
        y = y - mean_row(kept, mask).unsqueeze(-2)
    if normalize:
        x = x + mean.unsqueeze(-2)
        y = (y - (x * y).sum(-1, keepdim=True) * x) * scale.unsqueeze(-1)
    return (y if mask is None else torch.where(mask.unsqueeze(-1), y, 0)).to(z.dtype)


@full_precision
def matrix_log_fwd(q) -> tuple[Tensor, Tensor, Tensor]:
    """log Q, and the eigenvalues (raised to eps · lambda_max) and eigenvectors it is made of.

    NaN where Q has NaN or Inf.
    """
    if not q.shape[-1]:
        return q, q.new_zeros(q.shape[:-1]), q
    poison = (q - q).sum((-2, -1))[..., None, None]
    lam, vectors = torch.linalg.eigh(torch.where(poison == 0, q, 0))
    lam = torch.maximum(lam, torch.finfo(q.dtype).eps * lam[..., -1:])
    log = (vectors * lam.log().unsqueeze(-2)) @ vectors.mT
    return log.tril() + log.tril(-1).mT + poison, lam, vectors


@full_precision
def matrix_log_bwd(grad, log, lam, vectors) -> Tensor:
    """Gradient of Q from that of log Q: U (D ⊙ Uᵀ grad U) Uᵀ with the divided differences D of log.

    D_ij = (log a - log b) / (a - b) = log1p(t) / t / b with t = (a - b) / b, and 1 / b at a = b.
    """
    a, b = lam.unsqueeze(-1), lam.unsqueeze(-2)
    a, b = torch.maximum(a, b), torch.minimum(a, b)
    t = (a - b) / b
    ratio = torch.where(t == 0, 1, torch.log1p(t) / torch.where(t == 0, 1, t)) / b
    inner = vectors.mT @ ((grad + grad.mT) / 2) @ vectors
    return vectors @ (ratio * inner) @ vectors.mT + (log - log)
