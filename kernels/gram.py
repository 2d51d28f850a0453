"""Gram matrix of prepared rows x_i, either side, and its moments without the matrix.

    samples   G_ij = x_i · x_j   (n, n)          features   G_ab = sum_i x_ia x_ib   (d, d)
    moments   sum_ij G_ij², tr G

Fused: norms, mask and centring (tiles.py says how); the diagonal of normalised rows, which is 1 by
definition; the moments, with nothing of size k x k stored if only they are wanted.

One block per tile of the lower triangle (program id -> split, matrix, tile; tiles.triangle_tile),
none above it. Fewer tiles than multiprocessors: the depth is split, partial tiles go to a workspace
of (splits, tiles) tiles, and a second kernel adds them in order, so that every run gives the same
bits. The mirror image is written only if the full matrix is asked for.

k (k + 1) m flops of a matrix instead of 2 k² m; operands of a tile are read once per row and once
per column of tiles, from the L2 cache mostly. Precision: tiles.py; sums are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiles import gram_step, kept_rows, power_below, triangle_tile


@triton.jit
def _products(
    z, scale, mean, mask, f_i, kept_i, f_j, kept_j, i, j, begin, end, n, d, stride_n, stride_d,
    SAMPLES: tl.constexpr, CENTER: tl.constexpr, HAS_MASK: tl.constexpr, RAW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(begin, end, DEPTH):
        t = start + tl.arange(0, DEPTH)
        acc = gram_step(
            acc, z, scale, mean, mask, f_i, kept_i, f_j, kept_j, i, j, t, n, d, stride_n, stride_d,
            SAMPLES, CENTER, HAS_MASK, RAW, PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def _finish(
    acc, s_i, gram, moments, row, column, order, tile, BLOCK: tl.constexpr,
    UNIT: tl.constexpr, FULL: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    """What happens to a complete tile. ``tile`` counts over the batch; gram is this matrix's."""
    down, across = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    i, j = row * BLOCK + down, column * BLOCK + across
    diagonal = i == j
    if UNIT:
        acc = tl.where(diagonal & (s_i > 0)[:, None] & (s_i < float("inf"))[:, None], 1.0, acc)
    if MOMENTS:
        weights = tl.where(i > j, 2.0, tl.where(diagonal, 1.0, 0.0))
        square = tl.sum(tl.sum(tl.where(i >= j, acc * acc, 0.0) * weights, axis=1), axis=0)
        trace = tl.sum(tl.sum(tl.where(diagonal, acc, 0.0), axis=1), axis=0)
        tl.store(moments + 2 * tile, square)
        tl.store(moments + 2 * tile + 1, trace)
    else:
        # 64-bit for the corner of the tile, 32 within it: addresses fill the registers here.
        top, left = (row * BLOCK).to(tl.int64), (column * BLOCK).to(tl.int64)
        corner = gram + top * order + left
        tl.store(corner + (down * order + across), acc, mask=(i >= j) & (i < order))
        if FULL:  # the same numbers, so that it is exactly symmetric
            corner = gram + left * order + top
            i, j = row * BLOCK + across, column * BLOCK + down
            mirrored = (i > j) & (i < order)
            tl.store(corner + (down * order + across), tl.trans(acc), mask=mirrored)


# Sizes that no address depends on: else one that is 1 or a multiple of 16 is a compilation more.
@triton.jit(do_not_specialize=["depth", "batches", "side"])
def _gram_kernel(
    z,  # (batch, n, d)
    scale,  # (batch, n)
    mean,  # (batch, d), read if CENTER
    mask,  # (batch, n) bool, read if HAS_MASK
    gram,  # (batch, order, order), written if not MOMENTS
    moments,  # (batch, tiles, 2), written if MOMENTS
    partial,  # (splits, batch, tiles, BLOCK, BLOCK), written instead of those if SPLIT
    n, d, order, depth, batches, span, side, stride_b, stride_n, stride_d,
    SAMPLES: tl.constexpr, CENTER: tl.constexpr, HAS_MASK: tl.constexpr, UNIT: tl.constexpr,
    FULL: tl.constexpr, MOMENTS: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles = side * (side + 1) // 2
    tile = tl.program_id(0) % (tiles * batches)
    split = tl.program_id(0) // (tiles * batches)
    batch = (tile // tiles).to(tl.int64)
    row, column = triangle_tile(tile % tiles, side, GROUP)
    i = row * BLOCK + tl.arange(0, BLOCK)
    j = column * BLOCK + tl.arange(0, BLOCK)
    begin = split * span
    end = tl.minimum(begin + span, depth)
    z += batch * stride_b
    scale += batch * n
    mean += batch * d
    mask += batch * n
    s_i, kept_i = kept_rows(scale, mask, i, n, CENTER, HAS_MASK)
    if SAMPLES:
        s_j, kept_j = kept_rows(scale, mask, j, n, CENTER, HAS_MASK)
    else:
        s_j, kept_j = s_i, kept_i
    POST: tl.constexpr = SAMPLES and not CENTER
    f_i, f_j = s_i, s_j
    if POST:
        f_i, f_j = power_below(s_i), power_below(s_j)
    if POST and z.dtype.element_ty != tl.float32:
        # 16-bit tiles go from memory to the tensor cores untouched, unless a bfloat16 row is so
        # long or short that squares leave the range of float32.
        far_i = (s_i != 0) & ((f_i > 2.0**40) | (f_i < 2.0**-40))
        far_j = (s_j != 0) & ((f_j > 2.0**40) | (f_j < 2.0**-40))
        if tl.max((far_i | far_j).to(tl.int32), axis=0) > 0:
            acc = _products(
                z, scale, mean, mask, f_i, kept_i, f_j, kept_j, i, j, begin, end, n, d,
                stride_n, stride_d, SAMPLES, CENTER, HAS_MASK, False, PRECISION, BLOCK, DEPTH,
            )  # fmt: skip
        else:
            f_i = tl.full((BLOCK,), 1.0, tl.float32)
            f_j = tl.full((BLOCK,), 1.0, tl.float32)
            acc = _products(
                z, scale, mean, mask, f_i, kept_i, f_j, kept_j, i, j, begin, end, n, d,
                stride_n, stride_d, SAMPLES, CENTER, HAS_MASK, True, PRECISION, BLOCK, DEPTH,
            )  # fmt: skip
    else:
        acc = _products(
            z, scale, mean, mask, f_i, kept_i, f_j, kept_j, i, j, begin, end, n, d,
            stride_n, stride_d, SAMPLES, CENTER, HAS_MASK, False, PRECISION, BLOCK, DEPTH,
        )  # fmt: skip
    if POST:
        acc *= (s_i / f_i)[:, None]
        acc *= (s_j / f_j)[None, :]
    if SPLIT:
        within = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(partial + tl.program_id(0).to(tl.int64) * BLOCK * BLOCK + within, acc)
    else:
        gram += batch * order * order
        _finish(
            acc, s_i, gram, moments, row, column, order, tile, BLOCK, UNIT, FULL, MOMENTS
        )  # fmt: skip


@triton.jit(do_not_specialize=["n", "side", "splits"])
def _reduce_kernel(
    partial,  # (splits, batch, tiles, BLOCK, BLOCK)
    scale,  # (batch, n), read if UNIT
    gram,  # (batch, order, order)
    moments,  # (batch, tiles, 2)
    n, order, side, splits,
    UNIT: tl.constexpr, FULL: tl.constexpr, MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles = side * (side + 1) // 2
    tile = tl.program_id(0)
    batch = (tile // tiles).to(tl.int64)
    row, column = triangle_tile(tile % tiles, side, GROUP)
    i = row * BLOCK + tl.arange(0, BLOCK)
    within = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for split in range(splits):
        at = (split * tl.num_programs(0) + tile).to(tl.int64) * BLOCK * BLOCK
        acc += tl.load(partial + at + within)
    s_i = tl.load(scale + batch * n + i, mask=i < n, other=0.0)
    gram += batch * order * order
    _finish(
        acc, s_i, gram, moments, row, column, order, tile, BLOCK, UNIT, FULL, MOMENTS
    )  # fmt: skip


def splits_for(tiles: int, steps: int, multiprocessors: int) -> int:
    """Into how many parts the depth of a product is split: the cheapest by a small model.

    Time is waves of blocks times (steps of a block + 4 for its start and end), and 2 per split for
    the second kernel. (A model; no GPU has been asked yet.)
    """

    def cost(splits):
        waves = -(-tiles * splits // multiprocessors)
        return waves * (-(-steps // splits) + 4) + (2 * splits if splits > 1 else 0)

    return min(range(1, max(1, min(32, steps)) + 1), key=cost)


def _launch(z, scale, mean, mask, samples, unit, full, moments, precision, config):
    batch, n, d = z.shape
    order, depth = (n, d) if samples else (d, n)
    raw = samples and mean is None
    precision = precision if z.dtype == torch.float32 else "tf32x3"
    if config is None:
        options = (samples, unit, full, moments, precision)
        config = configs.choose(
            ("gram", z.dtype, z.shape, raw, *options),
            configs.gram(
                z.dtype, order, samples, mean is not None, configs.architecture(z.device.index)
            ),
            lambda c: _launch(z, scale, mean, mask, *options, c),
        )
    side = triton.cdiv(order, config.block)
    tiles = batch * (side * (side + 1) // 2)
    steps = triton.cdiv(depth, config.depth)
    splits = splits_for(tiles, steps, configs.multiprocessors(z.device.index))
    span = triton.cdiv(steps, splits) * config.depth
    splits = triton.cdiv(depth, span)
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=z.device)  # noqa: E731
    out = new(batch, tiles // batch, 2) if moments else new(batch, order, order)
    partial = new(splits, tiles, config.block, config.block) if splits > 1 else out
    flags = {"UNIT": unit and raw, "FULL": full, "MOMENTS": moments}
    flags |= {"BLOCK": config.block, "GROUP": 8}
    pointers = [scale if x is None else x for x in (mean, mask)]
    _gram_kernel[(tiles * splits,)](
        z, scale, *pointers, out, out, partial, n, d, order, depth, batch, span, side, *z.stride(),
        SAMPLES=samples, CENTER=mean is not None, HAS_MASK=mask is not None, SPLIT=splits > 1,
        PRECISION=precision, DEPTH=config.depth, **flags,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits > 1:
        _reduce_kernel[(tiles,)](
            partial, scale, out, out, n, order, side, splits, **flags, num_warps=8
        )
    return out


def gram(
    z: Tensor,
    scale: Tensor,
    mean: Tensor | None,
    mask: Tensor | None,
    samples: bool,
    *,
    unit: bool = False,
    full: bool = True,
    precision: str = "tf32x3",
    config: configs.Config | None = None,
) -> Tensor:
    """Gram matrix (batch, k, k).

    scale (batch, n) from rows.row_scale, 0 for dropped rows; mean (batch, d) to subtract, or None.
    unit: the rows are normalised and not centred, so that the diagonal of the samples side is 1.
    full=False leaves what is above the diagonal undefined.
    """
    return _launch(z, scale, mean, mask, samples, unit, full, False, precision, config)


def moments(
    z: Tensor,
    scale: Tensor,
    mean: Tensor | None,
    mask: Tensor | None,
    samples: bool,
    *,
    unit: bool = False,
    precision: str = "tf32x3",
    config: configs.Config | None = None,
) -> Tensor:
    """(sum of squares, trace) (batch, 2), float64, of the matrix of :func:`gram`, unstored."""
    sums = _launch(z, scale, mean, mask, samples, unit, False, True, precision, config)
    return sums.sum(1, dtype=torch.float64)
