"""Cholesky factors and inverses of symmetric matrices, in place and without synchronisation."""

import torch
from torch import Tensor


def factorise(a: Tensor) -> tuple[Tensor, Tensor]:
    """L of A = L Lᵀ in the place of symmetric A ``(..., k, k)``, and ``(...)`` where there is none.

    There L is NaN. Elsewhere it is zero above the diagonal.
    """
    # LAPACK and its kin count by columns: the transpose of a symmetric matrix saves them a copy.
    factor = a.mT
    info = torch.empty(a.shape[:-2], dtype=torch.int32, device=a.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    failed = info != 0
    return factor.masked_fill_(failed[..., None, None], torch.nan), failed


def inverse(factor: Tensor) -> Tensor:
    """``(L Lᵀ)⁻¹`` in the place of L, a result of :func:`factorise`."""
    if factor.device.type == "cpu":
        return torch.cholesky_inverse(factor, out=factor).mT
    return _inverse_by_products(factor)


def _inverse_by_products(factor: Tensor) -> Tensor:
    """What ``torch.cholesky_inverse`` does, which looks at its error codes on the host."""
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    y = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    return torch.matmul(y.mT, y, out=factor.mT)
