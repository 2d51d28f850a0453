"""Prepared rows (:func:`reference.prepare`) a piece at a time, so that no copy of z is made whole.

A pass over features reads pieces of some rows, or of some columns, each prepared into a copy that
is small beside the k x k matrices the features are reduced to.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference

# Numbers in a piece: half of what the k x k matrices of the batch have, so that a piece, its
# product and a temporary stay below two of them; but not so few that calls outweigh the work, which
# needs more of it elsewhere than on a CPU.
LEAST_ON_CPU, LEAST = 1 << 18, 1 << 21


def pieces(z: Tensor, dim: int, k: int) -> list[slice]:
    """Slices of dimension ``dim`` of z (-2: rows, -1: columns)."""
    if not z.numel():
        return []
    n, d = z.shape[-2:]
    least = LEAST_ON_CPU if z.device.type == "cpu" else LEAST
    budget = max(z.numel() // (n * d) * k * k // 2, least)
    step = max(1, z.shape[dim] * budget // z.numel())
    return [slice(at, at + step) for at in range(0, z.shape[dim], step)]


def numbers(z: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """z in dtype, dropped rows zero; z itself where that is nothing to do."""
    z = z.to(dtype)
    return z if mask is None else torch.where(mask.unsqueeze(-1), z, 0)


class Rows(NamedTuple):
    """Features ``z (..., n, d)`` and what prepares them: ``x = scale · z - mean``.

    scale ``(..., n)``: 1 / row norm, 0 for zero and dropped rows; without normalisation a number
    common to the matrix, or 0. mean ``(..., d)``: None unless centred. Both in the dtype that the
    pieces are to have.
    """

    z: Tensor
    mask: Tensor | None
    scale: Tensor
    mean: Tensor | None

    def prepared(self, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        kept = None if self.mask is None else self.mask[..., rows]
        part = self.z[..., rows, columns]
        x = numbers(part, kept, self.scale.dtype)
        scale = self.scale[..., rows].unsqueeze(-1)
        x = x * scale if x is part else x.mul_(scale)
        if self.mean is None:
            return x
        x -= self.mean[..., columns].unsqueeze(-2)
        return x if kept is None else x.masked_fill_(~kept.unsqueeze(-1), 0)

    def uncentred(self, x: Tensor) -> Tensor:
        """x, in place, with the mean added back; dropped rows need no care where scale is 0."""
        return x if self.mean is None else x.add_(self.mean.unsqueeze(-2))


def prepare(
    z: Tensor,
    mask: Tensor | None,
    normalize: bool,
    center: bool,
    k: int,
    dtype: torch.dtype | None = None,
    scale_free: bool = False,
) -> Rows:
    """Scales and mean row. ``scale_free``: rows that are not normalised get a common scale.

    That brings the entries of the matrix to at most 1 and keeps their squares in range, for
    quantities that do not see it.
    """
    dtype = dtype or reference.accumulation_dtype(z.dtype)
    scale = torch.zeros(z.shape[:-1], dtype=dtype, device=z.device)
    largest = torch.zeros(z.shape[:-2], dtype=dtype, device=z.device)
    for part in pieces(z, -2, k) if normalize or scale_free else ():
        x = numbers(z[..., part, :], None if mask is None else mask[..., part], dtype)
        peak = torch.linalg.vector_norm(x, torch.inf, dim=-1)
        largest = torch.maximum(largest, peak.amax(-1))
        if not normalize:
            continue
        # Scaled by the largest entry, so that no square vanishes or overflows.
        safe = torch.where(peak == 0, 1, peak)
        norm = torch.linalg.vector_norm(x / safe.unsqueeze(-1), dim=-1) * safe
        scale[..., part] = torch.where(norm == 0, 0, 1 / norm)
    if not normalize:
        # 1 without scale_free, where largest stayed 0.
        common = torch.where((largest == 0) | ~torch.isfinite(largest), 1, 1 / largest)
        scale += common.unsqueeze(-1) if mask is None else mask * common.unsqueeze(-1)
    rows = Rows(z, mask, scale, None)
    if not center:
        return rows
    total = torch.zeros(z.shape[:-2] + z.shape[-1:], dtype=torch.float64, device=z.device)
    for part in pieces(z, -2, k):
        total += rows.prepared(part).sum(-2)
    count = max(z.shape[-2], 1) if mask is None else mask.sum(-1, keepdim=True).clamp(min=1)
    return rows._replace(mean=(total / count).to(dtype))
