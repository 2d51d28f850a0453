"""Every quantity of the project in plain PyTorch: the definition that all backends are held to.

In float64 this file is the truth of the test suite; in float32 it is the eager baseline of the
benchmarks, written as users write it (normalise, matmul, ``torch.linalg``, autograd).

Symbols: ``Z (..., n, d)`` features, n samples (rows) by d features; ``G`` Gram matrix;
``k = min(n, d)``; ``rho = G / tr G`` density matrix; ``H`` entropy in nats; ``c`` scale.

[1] Information Flow in Self-Supervised Learning, ICML 2024, arXiv:2309.17281.
[2] Giraldo, Rao, Principe, Measures of entropy from data using infinitely divisible kernels,
    IEEE Trans. Inf. Theory 2015 (matrix-based Renyi entropy).
[3] Roy, Vetterli, The effective rank, EUSIPCO 2007.
"""

import math

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which Gram matrix and factor live: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def prepare(
    z: Tensor, *, normalize: bool = True, center: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Rows as the Gram matrix sees them: divided by their norm, centred, dropped rows zero.

    Differs from ``torch.nn.functional.normalize`` only in having no eps: a row of norm 1e-18 is
    normalised like any other, a row of zeros stays zero. The mean that ``center`` subtracts is
    that of the normalised rows which ``mask`` keeps (the order of the published code).
    """
    z = z.to(accumulation_dtype(z.dtype))
    if mask is not None:
        z = torch.where(mask.unsqueeze(-1), z, 0)
    if normalize:
        # Two steps, so that squares of tiny and huge entries neither vanish nor overflow. The
        # scale is a constant for autograd: it cancels.
        scale = z.detach().abs().amax(-1, keepdim=True) if z.shape[-1] else z[..., :0]
        z = z / torch.where(scale == 0, 1, scale)
        # A zero row must not reach vector_norm: its derivative at 0 is 0/0. Its own is set to 0.
        empty = (z.detach() == 0).all(-1, keepdim=True)
        norm = torch.linalg.vector_norm(torch.where(empty, 1, z), dim=-1, keepdim=True)
        z = torch.where(empty, 0, z / norm)
    if center:
        if mask is None:
            z = z - z.mean(-2, keepdim=True) if z.shape[-2] else z
        else:
            kept = mask.unsqueeze(-1).sum(-2, keepdim=True).clamp(min=1)
            z = torch.where(mask.unsqueeze(-1), z - z.sum(-2, keepdim=True) / kept, 0)
    return z


def gram(
    z: Tensor,
    *,
    side: str = "auto",
    normalize: bool = True,
    center: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """``Z Zᵀ`` (side "samples"), ``Zᵀ Z`` ("features") or the smaller of the two ("auto")."""
    z = prepare(z, normalize=normalize, center=center, mask=mask)
    samples = side == "samples" or (side == "auto" and z.shape[-2] <= z.shape[-1])
    with torch.autocast(z.device.type, enabled=False):
        return z @ z.mT if samples else z.mT @ z


def coding_rate(z: Tensor, scale: float, **rows) -> Tensor:
    """Total coding rate ``log det(I + scale · ZᵀZ)`` ([1], eq. of TCR), on the smaller side.

    ``rows`` are the keyword arguments of :func:`prepare`.
    """
    return coding_rate_of_gram(gram(z, **rows), scale)


def coding_rate_of_gram(g: Tensor, scale: float) -> Tensor:
    """:func:`coding_rate` of a ready Gram matrix, shape ``(..., k, k)``."""
    eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    return torch.logdet(eye + scale * g)


def matrix_entropy(z: Tensor, alpha: float = 1.0, **rows) -> Tensor:
    """Matrix Renyi entropy ``H_alpha(rho) = log tr(rho^alpha) / (1 - alpha)`` in nats ([2]).

    alpha = 1 is the von Neumann entropy ``-tr(rho log rho)``, alpha = 2 is ``-log ||rho||_F^2``
    and needs no eigenvalues, alpha = inf is ``-log lambda_max``. A Gram matrix of trace zero
    (no rows, or only zero rows) has entropy 0 and gradient 0.
    """
    return entropy_of_gram(gram(z, **rows), alpha)


def entropy_of_gram(g: Tensor, alpha: float = 1.0) -> Tensor:
    """:func:`matrix_entropy` of a ready Gram matrix, shape ``(..., k, k)``."""
    trace = g.diagonal(dim1=-2, dim2=-1).sum(-1)
    # NaN fails the comparison and must stay in: it has to reach the result.
    empty = trace == 0
    tau = torch.where(empty, 1, trace)
    if alpha == 2:
        rho = g / tau[..., None, None]
        purity = rho.square().sum((-2, -1))
        return -torch.where(empty, 1, purity).log()
    # LAPACK rejects NaN and Inf: it gets a zero matrix, and `poison` brings the NaN back.
    poison = trace - trace
    lam = torch.linalg.eigvalsh(torch.where((poison == 0)[..., None, None], g, 0))
    lam = lam / tau[..., None]
    # Rounding leaves zero eigenvalues slightly negative; x log x and x^alpha are 0 there.
    positive = lam > 0
    lam = torch.where(positive, lam, 1)
    if alpha == 1:
        h = -(lam * lam.log()).sum(-1)
    elif math.isinf(alpha):
        h = -torch.where(positive, lam, 0).amax(-1).log() if lam.shape[-1] else trace
    else:
        h = torch.where(positive, lam.pow(alpha), 0).sum(-1).log() / (1 - alpha)
    return torch.where(empty, 0, h) + poison


def joint_entropy(z1: Tensor, z2: Tensor, alpha: float = 1.0, **rows) -> Tensor:
    """:func:`matrix_entropy` of the Hadamard product of the two n x n Gram matrices ([2])."""
    k1, k2 = (gram(z, side="samples", **rows) for z in (z1, z2))
    return entropy_of_gram(k1 * k2, alpha)


def mutual_information(z1: Tensor, z2: Tensor, alpha: float = 1.0, **rows) -> Tensor:
    """``H(K1) + H(K2) - H(K1 ⊙ K2)`` ([2])."""
    h1, h2 = (matrix_entropy(z, alpha, **rows) for z in (z1, z2))
    return h1 + h2 - joint_entropy(z1, z2, alpha, **rows)


def matrix_log(q: Tensor) -> Tensor:
    """Logarithm of a symmetric matrix, its eigenvalues raised to at least eps · lambda_max."""
    lam, vectors = torch.linalg.eigh(q)
    lam = torch.maximum(lam, torch.finfo(q.dtype).eps * lam[..., -1:])
    return (vectors * lam.log().unsqueeze(-2)) @ vectors.mT


def effective_rank(z: Tensor, **rows) -> Tensor:
    """``exp(H_1)`` ([3] applied to the Gram spectrum; RankMe uses the singular values of Z)."""
    return matrix_entropy(z, 1.0, **rows).exp()
