"""Batches of small coding rates: log det(I + X), X = cG, and the gradient's weight in one block.

One block per matrix, BLOCK x BLOCK numbers of it in registers, BLOCK the power of two that holds k:
Gram matrix in the tensor cores, then k steps of the symmetric sweep, j = 0 ... k - 1:

    p = 1 + X_jj,   X_il -= X_ij X_jl / p,   row and column j /= p

**The identity is never stored**: of a pivot only X_jj is kept, so that a small X keeps the digits
that 1 + x would round away. log det = sum log(1 + X_jj) in float64, and off its diagonal X ends as
-M, M = (I + cG)⁻¹: value and inverse of one pass over registers. (For a value alone, row and column
j need no care.) The diagonals m of M and y of I - M have recurrences of their own, each good where
the other cancels: m_j = 1 / p, then m_i += X_ij² / p;   y_i -= X_ij² / p, y_j = X_jj / p.

The weight (torch_backend.py has the convention), V = c M:
    features                  2 V; if normalised and not centred, where the projection removes
                              multiples of the identity, 2 (V - c I) while M is near I: -c y keeps
                              the digits of a small X
    samples, not normalised   2 V_il s_i s_l
    samples, normalised       2 (V - Diag(y))_il s_i s_l, since diag(VG) = y; on the diagonal
                              c M_ii - y_i = t_i - c y_i, where t_i = sum_j X_ij² / p over the steps
                              cancels nothing while M is near I
    samples, centred          V and G, for the caller to fold

Nothing but z, scale and mean is read, nothing but value and weight written; k² m + k³ flops a
block: bound by reading z at small k, by the k dependent steps above. Sizes: configs.coding_rate.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiles import gram_step, kept_rows, power_below


@triton.jit(do_not_specialize=["n", "depth", "c"])
def _coding_rate_kernel(
    z,  # (batch, n, d)
    scale,  # (batch, n)
    mean,  # (batch, d), read if CENTER
    mask,  # (batch, n) bool, read if HAS_MASK
    value,  # (batch,)
    weight,  # (batch, k, k), written if WEIGHT
    gram,  # (batch, k, k), written if WEIGHT and SAMPLES and CENTER
    n, d, order, depth, stride_b, stride_n, stride_d, c,
    SAMPLES: tl.constexpr, CENTER: tl.constexpr, NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr,
    WEIGHT: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    z += batch * stride_b
    scale += batch * n
    mean += batch * d
    mask += batch * n
    s, kept = kept_rows(scale, mask, index, n, CENTER, HAS_MASK)
    f = s
    if SAMPLES and not CENTER:
        f = power_below(s)
    x = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, DEPTH):
        t = start + tl.arange(0, DEPTH)
        x = gram_step(
            x, z, scale, mean, mask, f, kept, f, kept, index, index, t, n, d, stride_n, stride_d,
            SAMPLES, CENTER, HAS_MASK, False, PRECISION,
        )  # fmt: skip
    i, l = index[:, None], index[None, :]
    if SAMPLES and not CENTER:
        q = s / f
        x *= q[:, None] * q[None, :]
        if NORMALIZE:
            x = tl.where((i == l) & (s > 0)[:, None] & (s < float("inf"))[:, None], 1.0, x)
    x = (x + tl.trans(x)) * 0.5  # products of parts come in another order on the other side
    if WEIGHT and SAMPLES and CENTER:
        at = batch * order * order + i * order + l
        tl.store(gram + at, x, mask=(i < order) & (l < order))
    x *= c
    pivots = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    y = tl.sum(tl.where(i == l, x, 0.0), axis=1)
    m = tl.zeros((BLOCK,), tl.float32)
    for j in range(order):
        column = tl.sum(tl.where(l == j, x, 0.0), axis=1)
        row = tl.sum(tl.where(i == j, x, 0.0), axis=0)
        delta = tl.sum(tl.where(index == j, column, 0.0), axis=0)
        pivots = tl.where(index == j, delta, pivots)
        inverse = tl.div_rn(1.0, 1.0 + delta)
        root = tl.sqrt_rn(inverse)  # of both factors, so that x stays symmetric to the last bit
        column *= root
        row *= root
        rest = x - column[:, None] * row[None, :]
        if WEIGHT:
            square = column * column
            squares += square
            y = tl.where(index == j, delta * inverse, y - square)
            m = tl.where(index == j, inverse, tl.where(index < j, m + square, 0.0))
            rest = tl.where((i == j) | (l == j), x * inverse, rest)
        x = rest
    p = 1.0 + pivots.to(tl.float64)
    logs = tl.where(p > 0, tl.log(tl.where(p > 0, p, 1.0)), float("nan"))
    tl.store(value + batch, tl.sum(logs, axis=0).to(tl.float32))
    if WEIGHT:
        diagonal = c * m
        if NORMALIZE and not CENTER:
            if SAMPLES:
                diagonal = tl.where(y < 0.5, squares - c * y, c * m - y)
            else:
                diagonal = tl.where(tl.max(y, axis=0) < 0.5, -c * y, c * m)
        w = tl.where(i == l, diagonal[:, None], -c * x)
        at = batch * order * order + i * order + l
        stored = (i < order) & (l < order)
        if SAMPLES and CENTER:
            tl.store(weight + at, w, mask=stored)
        elif SAMPLES:
            s_l = tl.load(scale + index, mask=index < n, other=0.0)
            tl.store(weight + at, w * (2.0 * s)[:, None] * s_l[None, :], mask=stored)
        else:
            tl.store(weight + at, 2.0 * w, mask=stored)


def coding_rate(
    z: Tensor,
    scale: Tensor,
    mean: Tensor | None,
    mask: Tensor | None,
    c: float,
    samples: bool,
    normalize: bool,
    need_weight: bool,
    *,
    precision: str = "tf32x3",
    config: configs.Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(value (batch,), weight (batch, k, k) or None, Gram matrix or None) of log det(I + cG).

    On the samples side of centred rows the weight is V and the Gram matrix is there; else it is W'.
    """
    batch, n, d = z.shape
    order, depth = (n, d) if samples else (d, n)
    precision = precision if z.dtype == torch.float32 else "tf32x3"
    value = torch.empty(batch, dtype=torch.float32, device=z.device)
    config = config or configs.coding_rate(order)
    new = lambda: torch.empty(batch, order, order, dtype=torch.float32, device=z.device)  # noqa: E731
    weight = new() if need_weight else None
    g = new() if need_weight and samples and mean is not None else None
    pointers = [scale if x is None else x for x in (mean, mask, value, weight, g)]
    _coding_rate_kernel[(batch,)](
        z, scale, *pointers, n, d, order, depth, *z.stride(), c,
        SAMPLES=samples, CENTER=mean is not None, NORMALIZE=normalize, HAS_MASK=mask is not None,
        WEIGHT=need_weight, PRECISION=precision, BLOCK=config.block, DEPTH=config.depth,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return value, weight, g
