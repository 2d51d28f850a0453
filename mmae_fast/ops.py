"""The public operations.

The life of a call: validate (here) → ``dispatch.select_backend`` → one operator of operators.py,
whose implementation is the backend's → for the backward pass z and one k x k matrix are kept → one
backward operator → gradient in z's dtype.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backends import dispatch, information_operators, operators
from .backends.torch_backend import swamped
from .distributed import Shards, over_ranks
from .reference import accumulation_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PRECISIONS = ("highest", "high", "medium")
_METHODS = ("eigen", "rational")
_SIDES = ("auto", "samples", "features")


def reduced_matrix_entropy(
    shards: Shards,
    z,
    alpha,
    method="eigen",
    normalize=True,
    center=False,
    mask=None,
    precision="highest",
    backend="auto",
) -> Tensor:
    alpha = _positive("alpha", alpha, allow_inf=True)
    _validate_method(method, alpha)
    z, mask, backend = _validate(z, mask, precision, backend)
    if not normalize:
        z = shards.in_range(z, mask)
    return gram_entropy(shards.gram(z, mask, normalize, center, backend), alpha, backend, method)


@over_ranks("z", rows=("mask",), reduced=reduced_matrix_entropy)
def fast_matrix_entropy(
    z: Tensor,
    alpha: float = 1.0,
    *,
    method: str = "eigen",
    normalize: bool = True,
    center: bool = False,
    mask: Tensor | None = None,
    precision: str = "highest",
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Matrix Renyi entropy of features, differentiable, in nats.

    Equivalent to (alpha = 1, the von Neumann entropy) ::

        x = torch.nn.functional.normalize(z, dim=-1)
        lam = torch.linalg.eigvalsh(x @ x.mT)
        lam = lam / lam.sum(-1, keepdim=True)
        -torch.special.xlogy(lam, lam).sum(-1)

    without the larger Gram matrix, without autograd's copies of z, and finite at zero eigenvalues.

        H_alpha(rho) = log tr(rho^alpha) / (1 - alpha),   rho = G / tr G,   G = Z Zᵀ or Zᵀ Z  [1, 2]

    Args:
        z: features, shape ``(..., n, d)``, any strides; float32, bfloat16, float16 or float64.
        alpha: order, > 0; 1 is von Neumann, 2 is ``-log ||rho||_F^2`` (no factorisation), ``inf``
            is ``-log lambda_max``.
        method: how the von Neumann entropy is computed. "eigen": from eigenvalues or, in float32 by
            the compiled CPU kernels, by what is as accurate and faster. "rational": from a few
            Cholesky factors of the whole matrix, to within k ||rho||_F times 4.8e-7 (float32) or
            3.8e-10 (float64); docs/algorithms.md has the errors of the gradient, and what it
            costs. alpha = 1 only.
        normalize: divide rows by their norm (zero rows stay zero).
        center: subtract the mean row, after normalisation, over the rows kept.
        mask: bool, shape ``(..., n)``; rows where it is False (padding) are dropped.
        precision: "highest", "high" or "medium", PyTorch's words for float32 matrix products; a
            permission that a GPU backend may use: backend "triton" multiplies float32 features as
            TF32 for either of the last two. The CPU always computes at full precision.
        process_group: z has the rows of this process, and the value is that of the rows of all
            ranks of this ``torch.distributed.ProcessGroup``, in any numbers; see
            :mod:`mmae_fast.distributed`. None: z is all there is.
        grad_scale: with a process group, "mean" for gradients that are averaged over its ranks
            (DDP, FSDP), "sum" for the plain gradient of the local rows.
        backend: "auto", or one of ``dispatch.BACKENDS``.
    Returns:
        shape ``(...)``, float32 (float64 for float64 z). A matrix without rows, or with zero rows
        only, has entropy 0. NaN or Inf in a kept row gives NaN.
    Raises:
        TypeError, ValueError: an argument is wrong; the message has the value received.
        RuntimeError: the named backend cannot serve z, with the reason.
        NotImplementedError: a second derivative unless alpha is 2, or with ``process_group``.
        With ``process_group`` all ranks raise: ValueError where their arguments differ in more than
        the number of rows, with what each rank had; RuntimeError without
        ``torch.distributed.init_process_group``.
    Note:
        Gram matrix and factors in float32 (float64 for float64), whatever autocast says; traces and
        sums of logs in float64. Deterministic. Extra memory O(k²) per matrix, k = min(n, d).

    [1] Giraldo et al., IEEE Trans. Inf. Theory 2015. [2] arXiv:2309.17281, section 2.
    """
    alpha = _positive("alpha", alpha, allow_inf=True)
    _validate_method(method, alpha)
    z, mask, backend = _validate(z, mask, precision, backend)
    need = z.requires_grad and torch.is_grad_enabled()
    operator = operators.rational_entropy if method == "rational" else operators.matrix_entropy
    return operator(z, mask, alpha, bool(normalize), bool(center), need, backend)[0]


def reduced_coding_rate(
    shards: Shards,
    z,
    scale,
    normalize=True,
    center=False,
    mask=None,
    precision="highest",
    backend="auto",
) -> Tensor:
    scale = _positive("scale", scale)
    z, mask, backend = _validate(z, mask, precision, backend)
    g = shards.gram(z, mask, normalize, center, backend)
    # As in torch_backend.coding_rate_fwd, where float32 would lose the identity in I + scale G. The
    # matrix, hence the choice, is the same on every rank.
    if g.device.type == "cpu" and swamped(g, scale).any():
        g = shards.gram(z.double(), mask, normalize, center, backend)
    need = g.requires_grad and torch.is_grad_enabled()
    value, _weight = information_operators.gram_coding_rate(g, scale, need, backend)
    return value.to(accumulation_dtype(z.dtype))


@over_ranks("z", rows=("mask",), reduced=reduced_coding_rate)
def fast_coding_rate(
    z: Tensor,
    scale: float,
    *,
    normalize: bool = True,
    center: bool = False,
    mask: Tensor | None = None,
    precision: str = "highest",
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Total coding rate ``log det(I + scale · ZᵀZ)``, differentiable, in nats.

    Equivalent to ::

        x = torch.nn.functional.normalize(z, dim=-1)
        torch.logdet(torch.eye(d) + scale * x.mT @ x)

    on the smaller of the two Gram matrices (Sylvester's identity), by Cholesky factorisation with
    the closed-form gradient ``2 scale Z (I + scale ZᵀZ)⁻¹``; twice differentiable.

    Args:
        z, normalize, center, mask, precision, process_group, grad_scale, backend: see
            :func:`fast_matrix_entropy`.
        scale: c in ``log det(I + c ZᵀZ)``, > 0. M-MAE's regulariser has c = mu / d ([1]), MCR² and
            EMP-SSL have c = d / (n eps²).
    Returns:
        shape ``(...)``, float32 (float64 for float64 z). NaN or Inf in a kept row gives NaN.
    Raises:
        As :func:`fast_matrix_entropy`.

    [1] Information Flow in Self-Supervised Learning, ICML 2024, arXiv:2309.17281.
    """
    scale = _positive("scale", scale)
    z, mask, backend = _validate(z, mask, precision, backend)
    need = z.requires_grad and torch.is_grad_enabled()
    return operators.coding_rate(z, mask, scale, bool(normalize), bool(center), need, backend)[0]


def reduced_gram(
    shards: Shards,
    z,
    side="features",
    normalize=True,
    center=False,
    mask=None,
    precision="highest",
    backend="auto",
) -> Tensor:
    if side == "samples":
        return NotImplemented
    _validate_side(side)
    z, mask, backend = _validate(z, mask, precision, backend)
    return shards.gram(z, mask, normalize, center, backend)


@over_ranks("z", rows=("mask",), reduced=reduced_gram)
def fast_gram(
    z: Tensor,
    *,
    side: str = "auto",
    normalize: bool = True,
    center: bool = False,
    mask: Tensor | None = None,
    precision: str = "highest",
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Gram matrix of the prepared rows, differentiable, exactly symmetric.

    Equivalent to ``x @ x.mT`` (side "samples") or ``x.mT @ x`` ("features") with
    ``x = torch.nn.functional.normalize(z, dim=-1)``, without materialising x.

    Args:
        z, normalize, center, mask, precision, process_group, grad_scale, backend: see
            :func:`fast_matrix_entropy`.
        side: "samples" for (n, n), "features" for (d, d), "auto" for the smaller ("samples" if
            n = d).
    Returns:
        shape ``(..., k, k)``, float32 (float64 for float64 z); n and k count the rows of all ranks
        of a process group, in the order of the ranks. With normalised, uncentred rows the
        diagonal of the samples side is exactly 1 (0 for zero or dropped rows).
    Raises:
        As :func:`fast_matrix_entropy`; ValueError for an unknown side.
    """
    _validate_side(side)
    z, mask, backend = _validate(z, mask, precision, backend)
    samples = side == "samples" or (side == "auto" and z.shape[-2] <= z.shape[-1])
    return operators.gram(z, mask, samples, bool(normalize), bool(center), backend)[0]


def effective_rank(
    z: Tensor,
    *,
    normalize: bool = True,
    center: bool = False,
    mask: Tensor | None = None,
    precision: str = "highest",
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Effective rank ``exp(H_1)`` of features, between 1 and min(n, d); differentiable.

    Equivalent to ``fast_matrix_entropy(z, 1.0, ...).exp()``, arguments and errors included. The
    spectrum is that of the Gram matrix, as in Diff-eRank (which centres before it normalises);
    RankMe puts the singular values of z in its place, which is a different number.

    [1] Roy, Vetterli, The effective rank, EUSIPCO 2007.
    """
    return fast_matrix_entropy(
        z,
        1.0,
        normalize=normalize,
        center=center,
        mask=mask,
        precision=precision,
        process_group=process_group,
        grad_scale=grad_scale,
        backend=backend,
    ).exp()


def gram_entropy(g: Tensor, alpha: float, backend: str, method: str = "eigen") -> Tensor:
    """Entropy of order alpha of ready Gram matrices ``(..., k, k)``, by a selected backend."""
    need = g.requires_grad and torch.is_grad_enabled()
    name = "gram_rational_entropy" if method == "rational" else "gram_entropy"
    return getattr(information_operators, name)(g, alpha, need, backend)[0]


def _validate_method(method, alpha: float) -> None:
    if method not in _METHODS:
        raise ValueError(f"method must be one of {_METHODS}, got {method!r}")
    if method == "rational" and alpha != 1:
        raise ValueError(f'method="rational" is for alpha = 1 only, got alpha = {alpha}')


def _validate_side(side) -> None:
    if side not in _SIDES:
        raise ValueError(f"side must be one of {_SIDES}, got {side!r}")


def _positive(name: str, value, allow_inf: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number, got {value!r}")
    value = float(value)
    if not value > 0 or (math.isinf(value) and not allow_inf):
        raise ValueError(f"{name} must be > 0{'' if allow_inf else ' and finite'}, got {value}")
    return value


def _validate_features(name: str, z) -> None:
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(z).__name__}")
    if z.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {z.dtype}")
    if z.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {z.layout}")
    if z.dim() < 2:
        raise ValueError(f"{name} must have shape (..., n, d), got {tuple(z.shape)}")


def _validate(z, mask, precision, backend) -> tuple[Tensor, Tensor | None, str]:
    _validate_features("z", z)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, got {got}")
        if mask.shape != z.shape[:-1]:
            raise ValueError(
                f"mask must have z's shape without its last dimension, {tuple(z.shape[:-1])}, "
                f"got {tuple(mask.shape)}"
            )
        if mask.device != z.device:
            raise ValueError(f"mask must be on z's device {z.device}, got {mask.device}")
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be one of {_PRECISIONS}, got {precision!r}")
    return z, mask, dispatch.select_backend(backend, z.device.type, precision)
