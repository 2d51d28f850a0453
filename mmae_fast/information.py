"""Matrix information theory of two views: joint entropy, mutual information, divergences.

Every function is batched over leading dimensions, differentiable with closed-form gradients that
stay finite at zero and at repeated eigenvalues, and returns float32 (float64 for float64 input),
in nats.

[1] Giraldo, Rao, Principe, Measures of entropy from data using infinitely divisible kernels,
    IEEE Trans. Inf. Theory 2015 (joint, conditional and mutual information by Hadamard products).
[2] Information Flow in Self-Supervised Learning, ICML 2024, arXiv:2309.17281, section 2.
[3] Matrix Information Theory for Self-Supervised Learning, ICML 2024, arXiv:2305.17326 (matrix
    cross-entropy, matrix KL divergence).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backends import dispatch, information_operators
from .distributed import over_ranks
from .ops import (
    _positive,
    _validate,
    _validate_features,
    fast_gram,
    fast_matrix_entropy,
    gram_entropy,
)
from .reference import accumulation_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@over_ranks("z1", "z2", rows=("mask",), unless="from_gram")
def joint_entropy(
    z1: Tensor,
    z2: Tensor,
    alpha: float = 1.0,
    *,
    normalize: bool = True,
    center: bool = False,
    mask: Tensor | None = None,
    from_gram: bool = False,
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Joint matrix entropy of two views of the same n samples, differentiable.

    Equivalent to (alpha = 2) ::

        x1, x2 = (torch.nn.functional.normalize(z, dim=-1) for z in (z1, z2))
        k = (x1 @ x1.mT) * (x2 @ x2.mT)
        -(k / k.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]).square().sum((-2, -1)).log()

    and, in general, to the matrix entropy of order alpha of the Hadamard product

        H_alpha((K1 ⊙ K2) / tr(K1 ⊙ K2)),   K = Z Zᵀ, n x n             (joint entropy of [1])

    alpha = 2 needs no factorisation.

    Args:
        z1, z2: features, shapes ``(..., n, d1)`` and ``(..., n, d2)``: the same samples in the same
            order, one dtype (float32, float64, bfloat16 or float16) and device, any strides.
        alpha, normalize, center, mask, process_group, grad_scale, backend: see
            :func:`mmae_fast.fast_matrix_entropy`; row options and the mask ``(..., n)`` hold for
            both views. With a process group the rows of all ranks are gathered.
        from_gram: z1 and z2 are ready Gram matrices ``(..., n, n)``, symmetric and positive
            semi-definite (not checked), e.g. of :func:`rbf_gram`. They are used as they are:
            ``normalize`` concerns rows of features and does nothing; ``mask`` drops rows and
            columns; ``center=True`` and ``process_group`` are errors.
    Returns:
        shape ``(...)``. 0 where the product has trace 0; NaN where a kept entry is NaN or Inf.
    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mmae_fast.fast_matrix_entropy`; ValueError
            for views of unequal batch or n, TypeError for unequal dtypes.
        NotImplementedError: a second derivative, unless alpha is 2.
    Note:
        Extra memory O(n²) per pair of views, whatever d1 and d2: a Hadamard product has no smaller
        side. Two n x n matrices are kept for the backward pass (one for Gram input).
    """
    alpha = _positive("alpha", alpha, allow_inf=True)
    mask, backend = _validate_views(z1, z2, center, mask, from_gram, backend)
    if from_gram:
        return gram_entropy(_dropped(z1, mask) * _dropped(z2, mask), alpha, backend)
    need = (z1.requires_grad or z2.requires_grad) and torch.is_grad_enabled()
    arguments = (alpha, bool(normalize), bool(center), need, backend)
    return information_operators.joint_entropy(z1, z2, mask, *arguments)[0]


@over_ranks("z1", "z2", rows=("mask",), unless="from_gram")
def mutual_information(
    z1: Tensor,
    z2: Tensor,
    alpha: float = 1.0,
    *,
    normalize: bool = True,
    center: bool = False,
    mask: Tensor | None = None,
    from_gram: bool = False,
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Matrix mutual information ``H(K1) + H(K2) - H(K1 ⊙ K2)`` ([1]), differentiable.

    Equivalent to the two :func:`mmae_fast.fast_matrix_entropy` minus :func:`joint_entropy`, which
    documents the arguments, the errors and the memory. Symmetric in the views. At alpha = 1 it is
    the quantum mutual information of the state (1/n) Σ x_i x_iᵀ ⊗ y_i y_iᵀ if no row x_i of view 1
    or y_i of view 2 is zero after normalisation (uncentred), hence >= 0; at other orders, and for
    centred or unnormalised rows, it may be negative (docs/theory.md).
    """
    options = {"mask": mask, "from_gram": from_gram, "backend": backend}
    rows = {"normalize": normalize, "center": center}
    joint = joint_entropy(z1, z2, alpha, **rows, **options)
    h1, h2 = (_entropy(z, alpha, rows, **options) for z in (z1, z2))
    return h1 + h2 - joint


@over_ranks("z1", "z2", rows=("mask",), unless="from_gram")
def conditional_entropy(
    z1: Tensor,
    z2: Tensor,
    alpha: float = 1.0,
    *,
    normalize: bool = True,
    center: bool = False,
    mask: Tensor | None = None,
    from_gram: bool = False,
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Matrix conditional entropy of z1 given z2, ``H(K1 ⊙ K2) - H(K2)`` ([1]), differentiable.

    Arguments, errors and memory: :func:`joint_entropy`.
    """
    options = {"mask": mask, "from_gram": from_gram, "backend": backend}
    rows = {"normalize": normalize, "center": center}
    joint = joint_entropy(z1, z2, alpha, **rows, **options)
    return joint - _entropy(z2, alpha, rows, **options)


def matrix_cross_entropy(p: Tensor, q: Tensor, *, backend: str = "auto") -> Tensor:
    """Matrix cross-entropy ``MCE(P, Q) = tr(-P log Q + Q)`` ([3]), differentiable in both.

    Equivalent to ::

        lam, u = torch.linalg.eigh(q)
        lam = torch.maximum(lam, torch.finfo(q.dtype).eps * lam[..., -1:])
        (-p @ (u * lam.log().unsqueeze(-2)) @ u.mT + q).diagonal(dim1=-2, dim2=-1).sum(-1)

    with the derivative of log Q by divided differences of the logarithm, in place of autograd's
    through ``eigh``, which is not finite at repeated eigenvalues.

    Args:
        p, q: symmetric, positive semi-definite (not checked), shape ``(..., d, d)``, one dtype and
            device; 16-bit matrices are computed in float32.
    Returns:
        shape ``(...)``; over P fixed it is smallest at Q = P (Klein's inequality).
        Where Q is singular the mathematical value is infinite unless the range of P is in that of
        Q. Rounding cannot tell such a Q from a nearby regular one, so eigenvalues of Q below
        eps · lambda_max (eps of the dtype) count as that: the value is finite, at most about
        ``-log(eps lambda_max)`` per unit of P outside of Q's range, and the gradient is the one at
        the raised eigenvalues. A zero Q gives NaN or infinity. NaN or Inf in either gives NaN.
    Raises:
        TypeError, ValueError: wrong type, dtype or shape, with the one received.
        NotImplementedError: the second derivative with respect to q.
    """
    p, q, backend = _validate_pair(p, q, backend)
    log_q = information_operators.matrix_log(q, backend)[0]
    return q.diagonal(dim1=-2, dim2=-1).sum(-1) - (p * log_q).sum((-2, -1))


def matrix_kl(p: Tensor, q: Tensor, *, backend: str = "auto") -> Tensor:
    """Matrix KL divergence ``MKL(P, Q) = tr(P log P - P log Q - P + Q)`` ([3]), differentiable.

    Equivalent to ``matrix_cross_entropy(p, q) - matrix_cross_entropy(p, p)``, with x log x = 0 at
    zero eigenvalues of P. Not negative, and 0 for P = Q, up to rounding. The gradient of p is
    ``log P - log Q``. Arguments, errors, singular Q: :func:`matrix_cross_entropy`.
    """
    p, q, backend = _validate_pair(p, q, backend)
    trace = p.diagonal(dim1=-2, dim2=-1).sum(-1)
    # With rho = P / tr P: tr(P log P) = tr P · (log tr P - H_1(rho)).
    negative = torch.special.xlogy(trace, trace) - trace * gram_entropy(p, 1.0, backend)
    return negative - trace + matrix_cross_entropy(p, q, backend=backend)


@over_ranks("z", rows=("mask",))
def rbf_gram(
    z: Tensor,
    bandwidth: float | None = None,
    *,
    mask: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Gaussian-kernel Gram matrix ``K_ij = exp(-||z_i - z_j||² / (2 sigma²))``, differentiable.

    Equivalent to ::

        d = torch.cdist(z, z)
        sigma = d[torch.triu(torch.ones_like(d), 1).bool()].median()  # if bandwidth is None
        torch.exp(-d.square() / (2 * sigma**2))

    by one Gram matrix of the centred rows.

    Args:
        z: features, shape ``(..., n, d)``, as of :func:`mmae_fast.fast_gram`; not normalised here.
        bandwidth: sigma, > 0. None takes, for each matrix, the median distance over the pairs
            i < j of kept rows (the lower one of an even number), and the gradient goes through it.
        mask: bool, shape ``(..., n)``; rows and columns of dropped rows are 0.
        process_group, grad_scale, backend: see :func:`mmae_fast.fast_gram`; n counts the rows of
            all ranks.
    Returns:
        shape ``(..., n, n)``, symmetric with unit diagonal, positive semi-definite. Where the
        median distance is 0, K is its limit: 1 between equal rows, 0 between others.
    Raises:
        As :func:`mmae_fast.fast_gram`; TypeError, ValueError for the bandwidth.
    Note:
        Squared distances are right to a few eps times the largest ``||z_i - mean||²``; below 4 eps
        ``(||z_i - mean||² + ||z_j - mean||²)`` they count as 0.
    """
    if bandwidth is not None:
        bandwidth = _positive("bandwidth", bandwidth)
    options = {"normalize": False, "center": True, "mask": mask, "backend": backend}
    g = fast_gram(z, side="samples", **options)
    norm = g.diagonal(dim1=-2, dim2=-1)
    size = norm.unsqueeze(-1) + norm.unsqueeze(-2)
    distance = size - 2 * g
    # NaN fails the comparison, and must stay.
    distance = torch.where(distance <= 4 * torch.finfo(g.dtype).eps * size, 0, distance)
    kept = None if mask is None else mask.unsqueeze(-1) & mask.unsqueeze(-2)
    if bandwidth is None:
        variance = _median_of_pairs(distance, kept)[..., None, None]
        collapsed = variance == 0
        k = torch.exp(-distance / (2 * torch.where(collapsed, 1, variance)))
        k = torch.where(collapsed & (distance > 0), 0, k)
    else:
        k = torch.exp(-distance / (2 * bandwidth**2))
    return k if kept is None else torch.where(kept, k, 0)


def _median_of_pairs(x: Tensor, kept: Tensor | None) -> Tensor:
    """The lower median over i < j of ``(..., n, n)``, and 1 where there is no such pair."""
    n = x.shape[-1]
    i, j = torch.triu_indices(n, n, 1, device=x.device)
    pairs = x[..., i, j]
    if not pairs.shape[-1]:
        return x.new_ones(x.shape[:-2])
    if kept is None:
        return pairs.median(-1).values
    # nanmedian would pass over the NaN of a kept row; centring has spread that to all pairs.
    kept = kept[..., i, j]
    median = torch.where(kept, pairs, torch.nan).nanmedian(-1).values
    return torch.where(kept.any(-1), median, 1)


def _entropy(z, alpha, rows, mask, from_gram, backend) -> Tensor:
    if not from_gram:
        return fast_matrix_entropy(z, alpha, mask=mask, backend=backend, **rows)
    backend = dispatch.select_backend(backend, z.device.type)
    return gram_entropy(_dropped(z, mask), float(alpha), backend)


def _dropped(g: Tensor, mask: Tensor | None) -> Tensor:
    """A ready Gram matrix in the accumulation dtype, without the rows and columns of the mask."""
    g = g.to(accumulation_dtype(g.dtype))
    return g if mask is None else torch.where(mask.unsqueeze(-1) & mask.unsqueeze(-2), g, 0)


def _validate_views(z1, z2, center, mask, from_gram, backend) -> tuple[Tensor | None, str]:
    _validate_features("z1", z1)
    _validate_features("z2", z2)
    if z1.dtype != z2.dtype:
        raise TypeError(f"z1 and z2 must have one dtype, got {z1.dtype} and {z2.dtype}")
    if z1.device != z2.device:
        raise ValueError(f"z1 and z2 must be on one device, got {z1.device} and {z2.device}")
    if from_gram:
        for name, z in (("z1", z1), ("z2", z2)):
            if z.shape[-1] != z.shape[-2]:
                raise ValueError(
                    f"{name} must be a Gram matrix (..., n, n) with from_gram=True, got"
                    f" {tuple(z.shape)}"
                )
        if center:
            raise ValueError("center=True is not defined for from_gram=True")
    if z1.shape[:-1] != z2.shape[:-1]:
        raise ValueError(
            "z1 and z2 must have the same leading dimensions and n, got"
            f" {tuple(z1.shape)} and {tuple(z2.shape)}"
        )
    _, mask, backend = _validate(z1, mask, "highest", backend)
    return mask, backend


def _validate_pair(p, q, backend) -> tuple[Tensor, Tensor, str]:
    for name, x in (("p", p), ("q", q)):
        _validate_features(name, x)
        if x.shape[-1] != x.shape[-2]:
            raise ValueError(f"{name} must be square, (..., d, d), got {tuple(x.shape)}")
    if p.dtype != q.dtype:
        raise TypeError(f"p and q must have one dtype, got {p.dtype} and {q.dtype}")
    if p.device != q.device:
        raise ValueError(f"p and q must be on one device, got {p.device} and {q.device}")
    if p.shape != q.shape:
        raise ValueError(f"p and q must have one shape, got {tuple(p.shape)} and {tuple(q.shape)}")
    backend = dispatch.select_backend(backend, p.device.type)
    dtype = accumulation_dtype(p.dtype)
    return p.to(dtype), q.to(dtype), backend
