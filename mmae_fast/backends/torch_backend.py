"""The backend made of PyTorch calls: any device, closed-form gradients, no host synchronisation.

It serves devices without kernels of their own, and matrices too large for the compiled kernels,
where the vendor's factorisations are the right tool. z is read in pieces (rows.py), so that the
work memory is a few k x k matrices whatever the other dimension. What is kept for the backward pass
is the k x k matrix ``weight``, in the convention of all backends (derived in csrc/cpu/kernels.inl):

    V = d value / dG,   C = V with rows and columns centred (if centred),   D = Diag(||z_i||)
    samples side:   W' = 2 D⁻¹ (C - Diag(s)) D⁻¹,  s_i = ẑ_i·(C Ẑ)_i,   grad Z = grad · W' Z
    features side:  W' = 2 V,   y_i = ẑ_i W',   grad z_i = grad · (y_i - (ẑ_i·y_i) ẑ_i) / ||z_i||
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import factor, rational
from .rows import Rows, numbers, pieces, prepare

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


def _add_product(g: Tensor, a: Tensor, b: Tensor) -> None:
    """g += a b."""
    if g.dim() == 2:
        g.addmm_(a, b)
    else:
        g.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))


def _gram(
    z: Tensor, mask, samples: bool, normalize, center, dtype=None, scale_free=False
) -> GramParts:
    """:func:`gram` in the accumulation dtype or ``dtype``; scale_free: see rows.prepare."""
    k = z.shape[-2] if samples else z.shape[-1]
    rows = prepare(z, mask, normalize, center, k, dtype, scale_free)
    g = torch.zeros((*z.shape[:-2], k, k), dtype=rows.scale.dtype, device=z.device)
    for part in pieces(z, -1 if samples else -2, k):
        x = rows.prepared(columns=part) if samples else rows.prepared(rows=part)
        _add_product(g, *((x, x.mT) if samples else (x.mT, x)))
    g.tril_()  # a matrix product is symmetric up to rounding only
    g += g.tril(-1).mT
    if samples and normalize and not center:
        # The diagonal of normalised rows is 1 by definition: say so, instead of 1 ± rounding.
        diagonal = g.diagonal(dim1=-2, dim2=-1)
        valid = (rows.scale > 0) & torch.isfinite(rows.scale)
        diagonal.copy_(torch.where(valid, 1, diagonal))
    mean = rows.mean
    if mean is None:
        mean = torch.zeros(z.shape[:-2] + z.shape[-1:], dtype=g.dtype, device=z.device)
    return GramParts(g, rows.scale, mean)


@full_precision
def gram(z: Tensor, mask, samples: bool, normalize: bool, center: bool) -> GramParts:
    return _gram(z, mask, samples, normalize, center)


def coding_rate_of_gram(
    g: Tensor, scale: float, need_weight: bool, overwrite: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``log det(I + scale G)`` and ``V = scale (I + scale G)⁻¹``, which may take the place of G."""
    trace = g.diagonal(dim1=-2, dim2=-1).sum(-1)
    a = g.mul_(scale) if overwrite else g * scale
    a.diagonal(dim1=-2, dim2=-1).add_(1)
    lower, failed = factor.factorise(a)
    value = 2 * lower.diagonal(dim1=-2, dim2=-1).double().log().sum(-1)
    failed |= ~torch.isfinite(trace)
    value = torch.where(failed, math.nan, value).to(a.dtype)
    if not need_weight:
        return value, None
    lower.masked_fill_(failed[..., None, None], math.nan)
    return value, factor.inverse(lower).mul_(scale)


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


def eigh(g: Tensor, want_vectors: bool) -> tuple[Tensor, Tensor | None]:
    """Ascending eigenvalues and, if wanted, eigenvectors (columns)."""
    return torch.linalg.eigh(g) if want_vectors else (torch.linalg.eigvalsh(g), None)


def entropy_of_gram(
    g: Tensor,
    alpha: float,
    need_weight: bool,
    spectral=spectral_matrix,
    overwrite: bool = False,
    eigh=eigh,
) -> tuple[Tensor, Tensor | None]:
    """H_alpha of ``G / tr G`` and ``V = dH/dG``, which may take the place of G."""
    trace = g.diagonal(dim1=-2, dim2=-1).sum(-1)
    empty = trace == 0
    poison = trace - trace  # 0, or NaN where z had NaN or Inf
    tau = torch.where(empty, 1, trace)
    v = None
    if alpha == 2:
        rho = torch.div(g, tau[..., None, None], out=g if overwrite else None)
        purity = torch.linalg.vector_norm(rho, dim=-1).double().square().sum(-1)
        purity = torch.where(empty, 1, purity)
        h = -purity.log().to(g.dtype)
        if need_weight:
            v = rho.mul_((-2 / (purity * tau)).to(g.dtype)[..., None, None])
            v.diagonal(dim1=-2, dim2=-1).add_((2 / tau).unsqueeze(-1))
    else:
        # Eigensolvers reject NaN and Inf: they get I there. (On the CPU it costs nothing to look.)
        usable = ~empty & (poison == 0)
        if g.device.type != "cpu" or not usable.all():
            eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
            g = torch.where(usable[..., None, None], g, eye)
            tau = torch.where(usable, tau, g.shape[-1])
        lam, vectors = eigh(g, need_weight)
        h, f = entropy_of_spectrum(lam / tau.unsqueeze(-1), alpha)
        if need_weight:
            v = spectral(vectors, f / tau.unsqueeze(-1))
    h = torch.where(empty, 0, h) + poison
    if v is not None:
        v.masked_fill_(empty[..., None, None], 0).add_(poison[..., None, None])
    return h, v


@full_precision
def fold(v: Tensor, parts: GramParts, z: Tensor, mask, samples: bool, normalize, center) -> Tensor:
    """V -> W', see the head of this file; in the place of V."""
    if not samples:
        return v.mul_(2)
    g, scale, mean = parts
    if center:
        kept = torch.ones_like(scale) if mask is None else mask.to(v.dtype)
        count = kept.sum(-1).clamp(min=1)[..., None, None]
        v -= v @ kept.unsqueeze(-1) / count
        v -= kept.unsqueeze(-2) @ v / count
        v.mul_(kept.unsqueeze(-1)).mul_(kept.unsqueeze(-2))
    if normalize:
        s = torch.linalg.vecdot(v, g)
        if center:  # ẑ_i has a part along the mean, which G does not see
            rows = Rows(z, mask, scale, mean)
            along = torch.zeros_like(scale)
            for part in pieces(z, -1, z.shape[-2]):
                along += (rows.prepared(columns=part) @ mean[..., part].unsqueeze(-1)).squeeze(-1)
            s = s + (v @ along.unsqueeze(-1)).squeeze(-1)
        v.diagonal(dim1=-2, dim2=-1).sub_(s)
    return v.mul_(2 * scale.unsqueeze(-1)).mul_(scale.unsqueeze(-2))


def swamped(g: Tensor, scale: float) -> Tensor:
    """Whether the rounding of G may swamp the identity in ``I + scale G``, shape ``(...)``."""
    trace = g.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (scale * trace * torch.finfo(g.dtype).eps > SWAMPED) & torch.isfinite(trace)


@full_precision
def coding_rate_fwd(z, mask, scale, normalize, center, need_weight):
    dtype = reference.accumulation_dtype(z.dtype)
    samples = z.shape[-2] <= z.shape[-1]
    parts = gram(z, mask, samples, normalize, center)
    # On the CPU only: elsewhere, to look would be to synchronise.
    if z.device.type == "cpu" and swamped(parts.gram, scale).any():
        parts = _gram(z, mask, samples, normalize, center, torch.float64)
    overwrite = not (samples and need_weight)
    value, v = coding_rate_of_gram(parts.gram, scale, need_weight, overwrite)
    if not need_weight:
        return value.to(dtype), None
    weight = fold(v, parts, z, mask, samples, normalize, center)
    return value.to(dtype), weight.to(dtype)


def _entropy_fwd(z, mask, normalize, center, need_weight, gram, of_gram: Callable):
    """``of_gram(g, need_weight, overwrite)`` of the Gram matrix of z, folded."""
    samples = z.shape[-2] <= z.shape[-1]
    if not min(z.shape[-2:]):
        zero = z.new_zeros(z.shape[:-2], dtype=reference.accumulation_dtype(z.dtype))
        return zero, zero.new_zeros((*zero.shape, 0, 0)) if need_weight else None
    if normalize:
        parts = gram(z, mask, samples, normalize, center)
    else:
        parts = _gram(z, mask, samples, normalize, center, scale_free=True)
    h, v = of_gram(parts.gram, need_weight, not (samples and need_weight))
    if not need_weight:
        return h, None
    weight = fold(v, parts, z, mask, samples, normalize, center)
    if not normalize and not samples:  # from the scaled rows to those of z
        weight.mul_(parts.scale.amax(-1).square()[..., None, None])
    return h, weight


@full_precision
def matrix_entropy_fwd(
    z, mask, alpha, normalize, center, need_weight, gram=gram, spectral=spectral_matrix
):
    def of_gram(g, need_weight, overwrite):
        return entropy_of_gram(g, alpha, need_weight, spectral, overwrite)

    return _entropy_fwd(z, mask, normalize, center, need_weight, gram, of_gram)


@full_precision
def rational_entropy_fwd(z, mask, alpha, normalize, center, need_weight, gram=gram):
    """The von Neumann entropy without eigenvalues (rational.py); alpha is 1."""
    of_gram = rational.von_neumann_of_gram
    return _entropy_fwd(z, mask, normalize, center, need_weight, gram, of_gram)


@full_precision
def gram_rational_entropy_fwd(g, alpha, need_weight):
    """The von Neumann entropy of a ready Gram matrix by rational.py, and V; alpha is 1."""
    if not g.shape[-1]:
        return g.new_zeros(g.shape[:-2]), torch.zeros_like(g) if need_weight else None
    return rational.von_neumann_of_gram(g, need_weight)


@full_precision
def gram_coding_rate_fwd(g, scale, need_weight):
    """``log det(I + scale G)`` of a ready Gram matrix ``(..., k, k)``, and V."""
    return coding_rate_of_gram(g, scale, need_weight)


@full_precision
def gram_entropy_fwd(g, alpha, need_weight, spectral=spectral_matrix):
    """H_alpha of a ready Gram matrix ``(..., k, k)``, and V."""
    if not g.shape[-1]:
        return g.new_zeros(g.shape[:-2]), torch.zeros_like(g) if need_weight else None
    return entropy_of_gram(g, alpha, need_weight, spectral)


@full_precision
def joint_entropy_fwd(
    z1, z2, mask, alpha, normalize, center, need_weight, gram=gram, spectral=spectral_matrix,
    of_gram=None,
):  # fmt: skip
    """H_alpha of K1 ⊙ K2, and the two n x n weights W' of ``samples_bwd``.

    With V = dH / d(K1 ⊙ K2): dH/dK1 = V ⊙ K2 and dH/dK2 = V ⊙ K1, each folded like any other V.
    """
    views, parts = [], []
    for z in (z1, z2):
        if not z.shape[-1]:  # no features: K = 0
            z = z.new_zeros((*z.shape[:-1], 1))
        views.append(z)
        if normalize:
            parts.append(gram(z, mask, True, normalize, center))
        else:
            parts.append(_gram(z, mask, True, normalize, center, scale_free=True))
    of_gram = of_gram or functools.partial(gram_entropy_fwd, spectral=spectral)
    value, v = of_gram(parts[0].gram * parts[1].gram, alpha, need_weight)
    if not need_weight:
        return value, None, None
    weights = []
    for z, own, other in zip(views, parts, reversed(parts), strict=True):
        weights.append(fold(v * other.gram, own, z, mask, True, normalize, center))
    return value, *weights


def _assembled(z: Tensor, dim: int, k: int, piece: Callable[[slice], Tensor]) -> Tensor:
    """A tensor like z from its pieces along ``dim``."""
    parts = pieces(z, dim, k)
    if len(parts) == 1:
        return piece(parts[0]).to(z.dtype)
    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    for part in parts:
        (out[..., part] if dim == -1 else out[..., part, :]).copy_(piece(part))
    return out


@full_precision
def samples_bwd(grad, z, mask, weight) -> Tensor:
    """Gradient of z ``(..., n, d)``, z's dtype, from grad ``(...)`` and weight ``(..., n, n)``."""
    weight = weight * grad[..., None, None]
    return _assembled(
        z, -1, z.shape[-2], lambda part: weight @ numbers(z[..., part], mask, weight.dtype)
    )


def _features_bwd(grad, rows: Rows, weight, normalize) -> Tensor:
    def piece(part):
        x = rows.prepared(part)
        y = (x @ weight).mul_(grad[..., None, None])
        if normalize:
            x = rows.uncentred(x)
            y.addcmul_((x * y).sum(-1, keepdim=True), x, value=-1)
            y.mul_(rows.scale[..., part].unsqueeze(-1))
        return y if rows.mask is None else y.masked_fill_(~rows.mask[..., part].unsqueeze(-1), 0)

    return _assembled(rows.z, -2, rows.z.shape[-1], piece)


@full_precision
def weight_bwd(grad, z, mask, weight, normalize, center) -> Tensor:
    """Gradient of z ``(..., n, d)``, z's dtype, from grad ``(...)`` and weight ``(..., k, k)``."""
    if z.shape[-2] <= z.shape[-1]:
        return samples_bwd(grad, z, mask, weight)
    rows = prepare(z, mask, normalize, center, z.shape[-1])
    return _features_bwd(grad, rows, weight, normalize)


@full_precision
def gram_bwd(grad, z, mask, parts: GramParts, samples, normalize, center) -> Tensor:
    """Gradient of z from the gradient ``(..., k, k)`` of the Gram matrix of either side."""
    weight = fold((grad + grad.mT) / 2, parts, z, mask, samples, normalize, center)
    one = weight.new_ones(z.shape[:-2])
    if samples:
        return samples_bwd(one, z, mask, weight)
    rows = Rows(z, mask, parts.scale, parts.mean if center else None)
    return _features_bwd(one, rows, weight, normalize)


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
