"""Statistics of rows, none larger than (batch, n) or (batch, d): what normalises and centres.

    scale_i = 1 / ||z_i||,   mean = sum_kept scale_i z_i / count,   dots_i = x_i · mean

with scale 0 for zero and dropped rows and NaN for rows with NaN or Inf. Squares are of rows times a
power of two near 1 / max|z_i|, so that none vanishes or overflows. z is read twice for the norms
(the second time from cache) and once each for the mean and the dots: bound by memory.
Sums over rows go chunk by chunk, and the chunks are added in order: the same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import inverse_power, kept_rows, raw_tile, round_tf32, row_tile

CHUNK_ROWS = 256  # rows that one block of the mean kernel sums


@triton.jit(do_not_specialize=["n"])
def _row_scale_kernel(
    z,  # (batch, n, d)
    mask,  # (batch, n) bool, read if HAS_MASK
    scale,  # (batch, n)
    largest,  # (batch, n): max |z_i| of kept rows, written instead of scale if not NORMALIZE
    n, d, stride_b, stride_n, stride_d,
    NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, TF32: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, BLOCK_N)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    kept = inside
    if HAS_MASK:
        kept = tl.load(mask + batch * n + rows, mask=inside, other=0) != 0
    z += batch * stride_b
    top = tl.zeros((BLOCK_N,), tl.float32)
    poison = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        x = raw_tile(z, kept, rows, columns, d, stride_n, stride_d)
        x = x.to(tl.float32)
        top = tl.maximum(top, tl.max(tl.abs(x), axis=1))
        poison += tl.sum(x - x, axis=1)  # 0, or NaN: a maximum may lose it
    if not NORMALIZE:
        tl.store(largest + batch * n + rows, top + poison, mask=inside)
        return
    power = inverse_power(top)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        x = raw_tile(z, kept, rows, columns, d, stride_n, stride_d)
        x = x.to(tl.float32) * power[:, None]
        if TF32:
            x = round_tf32(x)
        square += tl.sum(x * x, axis=1)
    empty = square == 0
    s = tl.div_rn(power, tl.sqrt_rn(tl.where(empty, 1.0, square)))
    tl.store(scale + batch * n + rows, tl.where(empty, 0.0, s) + poison, mask=inside)


@triton.jit(do_not_specialize=["n", "chunks"])
def _mean_kernel(
    z,  # (batch, n, d)
    scale,  # (batch, n)
    sums,  # (batch, chunks, d): sums of scale_i z_i over the rows of a chunk
    n, d, chunks, stride_b, stride_n, stride_d,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    z += batch * stride_b
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, CHUNK, BLOCK_N):
        rows = chunk * CHUNK + start + tl.arange(0, BLOCK_N)
        s, kept = kept_rows(scale + batch * n, scale, rows, n, False, False)
        x = row_tile(z, z, s, kept, rows, columns, d, stride_n, stride_d, False)
        total += tl.sum(x, axis=0)
    at = (batch * chunks + chunk) * d + columns
    tl.store(sums + at, total, mask=columns < d)


@triton.jit(do_not_specialize=["n"])
def _dots_kernel(
    z,  # (batch, n, d)
    scale,  # (batch, n)
    mean,  # (batch, d)
    mask,  # (batch, n) bool, read if HAS_MASK
    dots,  # (batch, n): x_i · mean with x_i = scale_i z_i - mean; 0 for dropped rows
    n, d, stride_b, stride_n, stride_d,
    HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, BLOCK_N)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    z += batch * stride_b
    mean += batch * d
    s, kept = kept_rows(scale + batch * n, mask + batch * n, rows, n, True, HAS_MASK)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        x = row_tile(z, mean, s, kept, rows, columns, d, stride_n, stride_d, True)
        m = tl.load(mean + columns, mask=columns < d, other=0.0)
        total += tl.sum(x * m[None, :], axis=1)
    tl.store(dots + batch * n + rows, tl.where(kept, total, 0.0), mask=rows < n)


def _blocks(d: int) -> tuple[int, int]:
    """Rows and columns of a tile: 4096 numbers, as wide as useful."""
    width = min(max(triton.next_power_of_2(d), 16), 1024)
    return 4096 // width, width


def row_scale(
    z: Tensor, mask: Tensor | None, normalize: bool, in_range: bool = False, tf32: bool = False
) -> Tensor:
    """1 / row norm ``(batch, n)``; without normalisation 1, or with in_range 1 / max|z|.

    tf32: norms of the rows as TF32 rounds them. 0 for zero and dropped rows (without normalisation:
    for dropped rows); NaN where there is NaN or Inf (with in_range: in all of that matrix).
    """
    batch, n, d = z.shape
    out = torch.empty(batch, n, dtype=torch.float32, device=z.device)
    if not normalize and not in_range:
        return out.fill_(1) if mask is None else out.copy_(mask)
    rows, columns = _blocks(d)
    _row_scale_kernel[(batch * triton.cdiv(n, rows),)](
        z, z if mask is None else mask, out, out, n, d, *z.stride(),
        NORMALIZE=normalize, HAS_MASK=mask is not None, TF32=tf32,
        BLOCK_N=rows, BLOCK_D=columns, num_warps=8,  # 4: short rows that are not aligned spill
    )  # fmt: skip
    if normalize:
        return out
    largest = out.amax(-1, keepdim=True)  # NaN where there is one
    factor = torch.where(largest == 0, 1, 1 / largest) + (largest - largest)
    return factor.expand(batch, n).contiguous() if mask is None else factor * mask


def mean_row(z: Tensor, scale: Tensor, mask: Tensor | None) -> Tensor:
    """Mean ``(batch, d)`` of the rows scale_i z_i that mask keeps."""
    batch, n, d = z.shape
    chunks = triton.cdiv(n, CHUNK_ROWS)
    sums = torch.empty(batch, chunks, d, dtype=torch.float32, device=z.device)
    rows, columns = 32, 128
    _mean_kernel[(batch * chunks, triton.cdiv(d, columns))](
        z, scale, sums, n, d, chunks, *z.stride(),
        CHUNK=CHUNK_ROWS, BLOCK_N=rows, BLOCK_D=columns, num_warps=4,
    )  # fmt: skip
    if mask is None:
        return sums.sum(1) / n
    return sums.sum(1) / mask.sum(-1, keepdim=True).clamp(min=1)


def mean_dots(z: Tensor, scale: Tensor, mean: Tensor, mask: Tensor | None) -> Tensor:
    """``x_i · mean`` (batch, n) of the centred rows; 0 for dropped rows."""
    batch, n, d = z.shape
    out = torch.empty(batch, n, dtype=torch.float32, device=z.device)
    rows, columns = _blocks(d)
    _dots_kernel[(batch * triton.cdiv(n, rows),)](
        z, scale, mean, z if mask is None else mask, out, n, d, *z.stride(),
        HAS_MASK=mask is not None, BLOCK_N=rows, BLOCK_D=columns, num_warps=4,
    )  # fmt: skip
    return out
