"""Gradient of z from the k x k weight W' (mmae_fast/backends/torch_backend.py has the convention).

    samples    grad z = g W' z                                        (raw rows)
    features   y = g x W',   grad z_i = (y_i - (ẑ_i · y_i) ẑ_i) s_i   (the projection: normalised)

One block per tile of the result. On the samples side that is all: W' holds everything. On the
features side the row that ẑ_i · y_i is over lies in several tiles: each leaves its part in ``dots``
(n x tiles of a row), and a second kernel adds them in order and projects. y is float32: it is kept
in the gradient itself where that is float32, else in a scratch of SCRATCH_BYTES, rows at a time.

2 k² m flops a matrix, multiplied as 3xTF32; 16-bit z is exact in TF32 (and so is p_i z_i, see
tiles.py), which leaves two products, for the two parts of W'. Rounding W' would not do: where rows
are nearly alike the sums cancel, and what remains of them is the rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiles import dot, grouped_tile, kept_rows, narrow, power_below, raw_tile, round_tf32, row_tile

SCRATCH_BYTES = 32 << 20


@triton.jit(do_not_specialize=["rows", "columns"])
def _product_kernel(
    z,  # (batch, n, d)
    scale,  # (batch, n), rows stride_s apart, read on the features side
    mean,  # (batch, d), read if CENTER
    mask,  # (batch, n) bool, rows stride_s apart, read if HAS_MASK
    weight,  # (batch, k, k)
    grad,  # (batch,)
    out,  # (batch, n, d): the gradient, or y if PROJECT
    dots,  # (batch, n, tiles of a row): parts of ẑ_i · y_i, written if PROJECT
    n, d, rows, columns, stride_b, stride_n, stride_d, stride_s, stride_o,
    SAMPLES: tl.constexpr, CENTER: tl.constexpr, HAS_MASK: tl.constexpr, PROJECT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // (rows * columns)).to(tl.int64)
    row, column = grouped_tile(tl.program_id(0) % (rows * columns), rows, columns, GROUP)
    i = row * BLOCK + tl.arange(0, BLOCK)
    c = column * BLOCK + tl.arange(0, BLOCK)
    inside = (i < n)[:, None] & (c < d)[None, :]
    z += batch * stride_b
    scale += batch * stride_s
    mask += batch * stride_s
    mean += batch * d
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    EXACT: tl.constexpr = z.dtype.element_ty != tl.float32 and not CENTER
    if SAMPLES:
        weight += batch * n * n
        for start in range(0, n, DEPTH):
            t = start + tl.arange(0, DEPTH)
            kept = t < n
            if HAS_MASK:
                kept = tl.load(mask + t, mask=kept, other=0) != 0
            read = (i < n)[:, None] & (t < n)[None, :]
            at = i[:, None].to(tl.int64) * n + t[None, :]
            a = tl.load(weight + at, mask=read, other=0.0)
            b = raw_tile(z, kept, t, c, d, stride_n, stride_d).to(tl.float32)
            if EXACT:
                high = round_tf32(a)
                acc = dot(round_tf32(a - high), b, acc, "tf32")
                acc = dot(high, b, acc, "tf32")
            else:
                a, b = narrow(a, tl.float32, PRECISION), narrow(b, tl.float32, PRECISION)
                acc = dot(a, b, acc, PRECISION)
    else:
        weight += batch * d * d
        s, kept = kept_rows(scale, mask, i, n, CENTER, HAS_MASK)
        f = s
        if not CENTER:
            f = power_below(s)
        for start in range(0, d, DEPTH):
            t = start + tl.arange(0, DEPTH)
            a = row_tile(z, mean, f, kept, i, t, d, stride_n, stride_d, CENTER)
            read = (t < d)[:, None] & (c < d)[None, :]
            at = t[:, None].to(tl.int64) * d + c[None, :]
            b = tl.load(weight + at, mask=read, other=0.0)
            if EXACT:
                high = round_tf32(b)
                acc = dot(a, round_tf32(b - high), acc, "tf32")
                acc = dot(a, high, acc, "tf32")
            else:
                a, b = narrow(a, tl.float32, PRECISION), narrow(b, tl.float32, PRECISION)
                acc = dot(a, b, acc, PRECISION)
        if not CENTER:
            acc *= (s / f)[:, None]
    acc *= tl.load(grad + batch)
    if PROJECT:
        x = row_tile(z, mean, s, s != 0, i, c, d, stride_n, stride_d, False)
        part = tl.sum(x * acc, axis=1)
        tl.store(dots + (batch * n + i) * columns + column, part, mask=i < n)
    out += batch * stride_o + (row * BLOCK).to(tl.int64) * d + column * BLOCK
    at = tl.arange(0, BLOCK)[:, None] * d + tl.arange(0, BLOCK)[None, :]
    tl.store(out + at, narrow(acc, out.dtype.element_ty, ""), mask=inside)


@triton.jit(do_not_specialize=["n", "tiles"])
def _project_kernel(
    z,  # (batch, n, d)
    scale,  # (batch, n), rows stride_s apart
    y,  # (batch, n, d), rows stride_y apart
    dots,  # (batch, n, tiles)
    out,  # (batch, n, d), rows stride_o apart; may be y
    n, d, tiles, stride_b, stride_n, stride_d, stride_s, stride_y, stride_o,
    TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, BLOCK_N)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = tl.load(scale + batch * stride_s + i, mask=i < n, other=0.0)
    part = tl.arange(0, TILES)
    read = (i < n)[:, None] & (part < tiles)[None, :]
    at = (batch * n + i)[:, None] * tiles + part[None, :]
    along = tl.sum(tl.load(dots + at, mask=read, other=0.0), axis=1)
    x = row_tile(z + batch * stride_b, z, s, s != 0, i, c, d, stride_n, stride_d, False)
    inside = (i < n)[:, None] & (c < d)[None, :]
    at = i[:, None].to(tl.int64) * d + c[None, :]
    value = tl.load(y + batch * stride_y + at, mask=inside, other=0.0)
    value = (value - along[:, None] * x) * s[:, None]
    tl.store(out + batch * stride_o + at, narrow(value, out.dtype.element_ty, ""), mask=inside)


def _launch(z, scale, mean, mask, weight, grad, out, samples, project, precision, config):
    """One call on z (batch, n, d), a part of the matrices or of the rows of one."""
    batch, n, d = z.shape
    rows, columns = triton.cdiv(n, config.block), triton.cdiv(d, config.block)
    y, dots, unused = out, None, weight
    if project:
        if out.dtype != torch.float32:
            y = torch.empty(batch, n, d, dtype=torch.float32, device=z.device)
        dots = torch.empty(batch, n, columns, dtype=torch.float32, device=z.device)
    pointers = [unused if x is None else x for x in (scale, mean, mask, weight, grad, y, dots)]
    spacing = next((x.stride(0) for x in (scale, mask) if x is not None), n)
    _product_kernel[(batch * rows * columns,)](
        z, *pointers, n, d, rows, columns, *z.stride(), spacing, y.stride(0),
        SAMPLES=samples, CENTER=mean is not None, HAS_MASK=mask is not None, PROJECT=project,
        PRECISION=precision if z.dtype == torch.float32 else "tf32x3",
        BLOCK=config.block, DEPTH=config.depth, GROUP=8,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if project:
        wide = min(128, max(16, triton.next_power_of_2(d)))
        _project_kernel[(batch * triton.cdiv(n, 32), triton.cdiv(d, wide))](
            z, scale, y, dots, out, n, d, columns, *z.stride(), spacing, y.stride(0), out.stride(0),
            TILES=triton.next_power_of_2(columns), BLOCK_N=32, BLOCK_D=wide, num_warps=4,
        )  # fmt: skip


def weight_product(
    grad: Tensor,
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    samples: bool,
    normalize: bool,
    *,
    precision: str = "tf32x3",
    config: configs.Config | None = None,
) -> Tensor:
    """Gradient (batch, n, d) of z, in z's dtype, from grad (batch,) and weight (batch, k, k).

    scale (batch, n) and mean (batch, d, or None) are wanted on the features side only.
    """
    batch, n, d = z.shape
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if not z.numel():
        return out
    project = normalize and not samples
    if config is None:
        options = {"samples": samples, "normalize": normalize, "precision": precision}
        config = configs.choose(
            ("product", z.dtype, z.shape, mean is None, *options.values()),
            configs.product(z.dtype, n, d, configs.architecture(z.device.index)),
            lambda c: weight_product(grad, z, scale, mean, mask, weight, config=c, **options),
        )
    if not project or z.dtype == torch.float32 or z.numel() * 4 <= SCRATCH_BYTES:
        _launch(z, scale, mean, mask, weight, grad, out, samples, project, precision, config)
        return out
    # 16-bit rows, so many at a time that their y fits the scratch.
    matrices = max(1, SCRATCH_BYTES // (4 * n * d))
    height = min(n, max(256, SCRATCH_BYTES // (4 * d)))
    for b in range(0, batch, matrices):
        for r in range(0, n, height):
            part = (slice(b, b + matrices), slice(r, r + height))
            few = [None if x is None else x[part[0]] for x in (mean, weight, grad)]
            some = [None if x is None else x[part] for x in (scale, mask)]
            _launch(
                z[part], some[0], few[0], some[1], few[1], few[2], out[part], samples, project,
                precision, config,
            )  # fmt: skip
    return out
