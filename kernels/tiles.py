"""What the kernels share: the triangle of tiles, exact row scales, the step of a Gram product.

How rows x_i = s_i z_i - mean (s_i = 1 / ||z_i||, or a factor) reach the tensor cores at about the
accuracy of float32, with z float32 / 16-bit; p_i, the power of two below s_i, rounds nothing and
keeps every square in range:

| side, centred | operands                         | tensor-core products for a tile               |
|---------------|----------------------------------|-----------------------------------------------|
| samples, no   | p_i z_i and p_j z_j, raw values; | 3xTF32 / 1: the norms belong to the values    |
|               | s_i s_j / p_i p_j after it       | that were multiplied, whatever their rounding |
| features, no  | 16-bit: p_i z_i and z_i s_i²/p_i | 3xTF32 / bfloat16 3, float16 2: the second    |
|               |                                  | goes in parts of 24 or 22 bits together       |
| any, yes      | x and x, float32                 | 3xTF32                                        |

PRECISION "tf32", for float32, is one product of rounded rows.
"""

import triton
import triton.language as tl

# In the interpreter the product of 16-bit tiles is wrong: there they are made float32 first.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _row_of(p):
    """Row of entry p of a lower triangle in row-major order: the largest r, r (r + 1) / 2 <= p."""
    r = ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    r = tl.where(r * (r + 1) // 2 > p, r - 1, r)  # a float32 root is off by one at most
    return tl.where((r + 1) * (r + 2) // 2 <= p, r + 1, r)


@triton.jit
def triangle_tile(p, side, GROUP: tl.constexpr):
    """(row, column) of tile p of the lower triangle with ``side`` tiles a side.

    GROUP rows of tiles at a time, down the columns, so that the tiles that run together share
    their operands in the L2 cache.
    """
    first = _row_of(p) // GROUP * GROUP
    rest = p - first * (first + 1) // 2
    height = tl.minimum(GROUP, side - first)
    corner = tl.maximum(rest - first * height, 0)  # index in the triangle that ends the group
    r = _row_of(corner)
    full = rest < first * height
    row = tl.where(full, first + rest % height, first + r)
    column = tl.where(full, rest // height, first + corner - r * (r + 1) // 2)
    return row, column


@triton.jit
def grouped_tile(p, rows, columns, GROUP: tl.constexpr):
    """(row, column) of tile p of a rectangle of tiles, in the same order."""
    first = p // (GROUP * columns) * GROUP
    rest = p - first * columns
    height = tl.minimum(GROUP, rows - first)
    return first + rest % height, rest // height


@triton.jit
def power_below(s):
    """The power of two below s > 0; 2^-126 at 0; NaN or infinity where s is."""
    bits = s.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.maximum(bits, 0x00800000).to(tl.float32, bitcast=True)


@triton.jit
def inverse_power(m):
    """About 1 / m as a power of two, finite for every m >= 0 that is."""
    bits = tl.minimum(m.to(tl.int32, bitcast=True) & 0x7F800000, 0x7E800000)
    return (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def round_tf32(x):
    """float32 rounded to TF32, to nearest: left to the tensor cores, it would be cut off."""
    y = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, y, x)  # the bits of a NaN may overflow to a number


@triton.jit
def narrow(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """float32 to what the tensor cores take, to nearest."""
    if DTYPE == tl.float32:
        if PRECISION == "tf32":
            x = round_tf32(x)
    elif INTERPRET and DTYPE == tl.bfloat16:  # the interpreter would cut it off
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b of operands that are of the tensor cores' types, or 3xTF32 of float32 ones."""
    if INTERPRET:  # its product knows neither 16-bit types nor 3xTF32
        if PRECISION == "tf32x3" and a.dtype == tl.float32:
            a_high, b_high = round_tf32(a), round_tf32(b)
            acc = tl.dot(round_tf32(a - a_high), b_high, acc)
            acc = tl.dot(a_high, round_tf32(b - b_high), acc)
            a, b = a_high, b_high
        a, b = a.to(tl.float32), b.to(tl.float32)
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32x3" if PRECISION == "tf32x3" else "tf32")
    return tl.dot(a, b, acc)


@triton.jit
def exact_dot(a, b, acc, DTYPE: tl.constexpr):
    """acc + a b of float32 tiles, a of the 16-bit DTYPE already, b in parts of it."""
    a = a.to(DTYPE)
    high = narrow(b, DTYPE, "")
    rest = b - high.to(tl.float32)
    middle = narrow(rest, DTYPE, "")
    if DTYPE == tl.bfloat16:
        acc = dot(a, narrow(rest - middle.to(tl.float32), DTYPE, ""), acc, "")
    acc = dot(a, middle, acc, "")
    return dot(a, high, acc, "")


@triton.jit
def kept_rows(scale, mask, rows, count, CENTER: tl.constexpr, HAS_MASK: tl.constexpr):
    """s of these rows, and which of them are loaded.

    Dropped rows have s = 0 and may hold NaN, so that they must not be read. Neither need zero rows,
    except when centred: there they are minus the mean.
    """
    inside = rows < count
    s = tl.load(scale + rows, mask=inside, other=0.0)
    kept = s != 0
    if CENTER:
        kept = inside
        if HAS_MASK:
            kept = tl.load(mask + rows, mask=inside, other=0) != 0
    return s, kept


@triton.jit
def raw_tile(z, kept, rows, columns, d, stride_n, stride_d):
    read = kept[:, None] & (columns < d)[None, :]
    at = rows[:, None].to(tl.int64) * stride_n + columns[None, :].to(tl.int64) * stride_d
    return tl.load(z + at, mask=read, other=0.0)


@triton.jit
def row_tile(z, mean, s, kept, rows, columns, d, stride_n, stride_d, CENTER: tl.constexpr):
    """s z, or x = s z - mean if CENTER, float32."""
    x = raw_tile(z, kept, rows, columns, d, stride_n, stride_d).to(tl.float32) * s[:, None]
    if CENTER:
        x -= tl.load(mean + columns, mask=columns < d, other=0.0)[None, :]
        x = tl.where(kept[:, None] & (columns < d)[None, :], x, 0.0)
    return x


@triton.jit
def gram_step(
    acc, z, scale, mean, mask, f_i, kept_i, f_j, kept_j, i, j, t, n, d, stride_n, stride_d,
    SAMPLES: tl.constexpr, CENTER: tl.constexpr, HAS_MASK: tl.constexpr, RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + sum_t x_it x_jt, t columns (samples) or rows (features) of z; f: s, p, or not RAW."""
    TYPE: tl.constexpr = z.dtype.element_ty
    if SAMPLES and RAW:
        a = raw_tile(z, kept_i, i, t, d, stride_n, stride_d)
        b = raw_tile(z, kept_j, j, t, d, stride_n, stride_d)
        acc = dot(a, tl.trans(b), acc, PRECISION)
    elif SAMPLES:
        a = row_tile(z, mean, f_i, kept_i, i, t, d, stride_n, stride_d, CENTER)
        b = row_tile(z, mean, f_j, kept_j, j, t, d, stride_n, stride_d, CENTER)
        if CENTER:
            a, b = narrow(a, tl.float32, PRECISION), narrow(b, tl.float32, PRECISION)
        else:
            a, b = narrow(a, TYPE, PRECISION), narrow(b, TYPE, PRECISION)
        acc = dot(a, tl.trans(b), acc, PRECISION)
    else:
        s, kept = kept_rows(scale, mask, t, n, CENTER, HAS_MASK)
        f_a, f_b = s, s
        EXACT: tl.constexpr = TYPE != tl.float32 and not CENTER
        if EXACT:
            f_a = power_below(s)
            f_b = s * (s / f_a)
        a = row_tile(z, mean, f_a, kept, t, i, d, stride_n, stride_d, CENTER)
        b = row_tile(z, mean, f_b, kept, t, j, d, stride_n, stride_d, CENTER)
        if EXACT:
            acc = exact_dot(tl.trans(a), b, acc, TYPE)
        else:
            a, b = narrow(a, tl.float32, PRECISION), narrow(b, tl.float32, PRECISION)
            acc = dot(tl.trans(a), b, acc, PRECISION)
    return acc
