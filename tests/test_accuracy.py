"""Every backend, dtype and quantity against the float64 reference, value and gradient.

The rule, the floors and the inputs are in accuracy.py.
"""

import math
from functools import partial

import pytest
import torch

from .accuracy import (
    BACKENDS,
    DTYPES,
    Quantity,
    Result,
    check,
    coding_rate,
    entropy,
    features,
    gram,
    largest,
    run,
)

ALPHAS = (0.5, 1.0, 1.01, 2.0, 3.0, 5.0, math.inf)
QUANTITIES = [*map(coding_rate, (1e-3, 1.0, 1e3)), *map(entropy, ALPHAS)]
QUANTITIES += [gram("samples"), gram("features")]
ROWS = [{}, {"center": True}, {"normalize": False}, {"normalize": False, "center": True}]
BATCHES = [(), (3,), (2, 3), (2, 1, 2)]


def name(q):
    return f"{q.kind}-{q.parameter}" if isinstance(q, Quantity) else None


def mask_of(z, seed=0):
    """Drops a third of the rows, and all rows of the last matrix of a batch."""
    mask = torch.rand(z.shape[:-1], generator=torch.Generator().manual_seed(seed)) > 1 / 3
    if z.dim() > 2:
        mask.reshape(-1, z.shape[-2])[-1] = False
    return mask


def differentiable(q, kind, n, d, rows):
    """Whether the quantity has a derivative at such an input.

    H_inf has none at a repeated largest eigenvalue, H_alpha with alpha < 1 none at a zero one.
    """
    if q.kind != "entropy":
        return True
    if q.parameter == math.inf:
        return kind not in ("orthonormal", "zeros")
    full_rank = kind in ("gaussian", "collapsed", "decaying", "orthonormal")
    centred = rows.get("center", False) and n <= d
    return q.parameter >= 1 or (full_rank and not centred and rows.get("mask") is None)


# Around the register tiles (4, 8 rows; 8 to 48 columns), and both sides of each.
SHAPES = [(1, 1), (1, 5), (5, 1), (2, 3), (7, 9), (8, 8), (9, 7), (15, 17), (16, 16), (17, 15)]
SHAPES += [(31, 33), (33, 31), (47, 49), (48, 48), (49, 47), (63, 65), (64, 64), (65, 63)]
SHAPES += [(12, 130), (130, 12)]


def grid():
    """Every shape with every quantity; dtype, batch, row options and mask take turns.

    The turns advance by different steps per shape and per quantity, so that over the grid every
    quantity meets every dtype, every option and every batch shape, on both sides.
    """
    for i, shape in enumerate(SHAPES):
        for j, q in enumerate(QUANTITIES):
            for turn in range(2):
                at = i + 3 * j + 2 * turn
                dtype = DTYPES[(i + j + 2 * turn) % 4]
                rows = ROWS[at // 2 % 4]
                yield pytest.param(
                    (*BATCHES[(i // 2 + j + turn) % 4], *shape),
                    q,
                    dtype,
                    rows,
                    at % 5 == 0,
                    id=f"{i}-{name(q)}-{turn}",
                )


@pytest.mark.parametrize(("shape", "q", "dtype", "rows", "masked"), list(grid()))
def test_grid(shape, q, dtype, rows, masked):
    z = features("gaussian", *shape, dtype=dtype)
    rows = rows | ({"mask": mask_of(z)} if masked else {})
    check(q, z, need_grad=differentiable(q, "gaussian", *shape[-2:], rows), **rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 0, 5), (3, 5, 0), (0, 4, 6), (0, 0)])
def test_empty(shape, dtype):
    z = torch.zeros(shape, dtype=dtype)
    for q in QUANTITIES:
        for rows in ROWS:
            for backend in BACKENDS:
                value, grad = run(partial(q.fast, backend=backend, **rows), z, torch.tensor(1.0))
                assert torch.equal(value, torch.zeros_like(q.truth(z)).to(value.dtype))
                assert grad.shape == shape and torch.equal(grad, z)


# Tokens of a ViT; above the compiled eigensolver (k > 256); several blocks of a factorisation.
LARGE = [
    ((2, 197, 64), QUANTITIES),
    ((2, 50, 768), QUANTITIES),
    ((300, 260), QUANTITIES),
    ((400, 500), [coding_rate(1e-3), coding_rate(1.0), entropy(1.0), entropy(2.0)]),
    ((600, 900), [coding_rate(900 / 600), entropy(1.0)]),
]


@pytest.mark.parametrize(
    ("shape", "q"), [(shape, q) for shape, quantities in LARGE for q in quantities], ids=name
)
def test_large(shape, q):
    check(q, features("gaussian", *shape))


@pytest.mark.parametrize("q", [coding_rate(1.0), entropy(1.0), entropy(2.0)], ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 197, 64), (300, 260), (400, 500)])
def test_large_in_other_dtypes(shape, dtype, q):
    check(q, features("gaussian", *shape, dtype=dtype))


@pytest.mark.parametrize(
    ("shape", "q"),
    [((300, 260), q) for q in QUANTITIES] + [((400, 500), coding_rate(1.0))],
    ids=name,
)
def test_large_centred_and_masked(shape, q):
    z = features("gaussian", *shape)
    mask = torch.arange(shape[0]) % 7 != 3
    check(q, z, need_grad=q != entropy(0.5), center=True, mask=mask)


@pytest.mark.parametrize("q", [coding_rate(1.0), entropy(1.0), entropy(2.0)], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_centring_of_many_nearly_equal_rows(q, dtype):
    """Their sum grows to 1e5 times a row: rounded to float32 at every step it loses the spread."""
    check(q, features("collapsed", 100_000, 5, dtype=dtype), center=True)


KINDS = ["collapsed", "rank1", "rank3", "duplicates", "zero rows", "zeros"]
KINDS += ["decaying", "orthonormal"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("q", QUANTITIES, ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_difficult_inputs(kind, q, dtype):
    sizes = [(20, 33, {}), (33, 20, ROWS[1]), (17, 40, ROWS[2]), (40, 17, ROWS[3])]
    for n, d, rows in sizes:
        z = features(kind, 2, n, d, dtype=dtype)
        check(q, z, need_grad=differentiable(q, kind, n, d, rows), **rows)


@pytest.mark.parametrize("q", [entropy(1.0), entropy(1.5), coding_rate(1.0)], ids=name)
@pytest.mark.parametrize("kind", ["gaussian", *KINDS])
def test_difficult_batches(kind, q):
    """As many as a vector has lanes and a few; to k = 256, the largest order that lanes serve."""
    for n, d in [(4, 9), (33, 70), (70, 130), (130, 97)]:
        check(q, features(kind, 19, n, d), need_grad=differentiable(q, kind, n, d, {}))
    if q == entropy(1.0) and kind in ("gaussian", "rank3", "decaying"):
        for k in (96, 128, 197, 256):
            check(q, features(kind, 17, k, k))


@pytest.mark.parametrize("q", [entropy(1.0), entropy(math.inf)], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_difficult_large_matrices(kind, dtype, q):
    """By blocks (csrc/cpu/blocks.h): orders around whole blocks, few matrices, both sides."""
    sizes = [(130, 150, {}), (150, 129, ROWS[1]), (2, 144, 200, ROWS[2]), (272, 300, ROWS[3])]
    for *shape, rows in [*sizes, (400, 273, {})]:
        z = features(kind, *shape, dtype=dtype)
        check(q, z, need_grad=differentiable(q, kind, *shape[-2:], rows), **rows)


def test_large_batches_of_orders_below_1():
    for kind in ("decaying", "collapsed"):
        for k in (64, 130, 197):
            check(entropy(0.5), features(kind, 17, k, k))


def test_batches_of_mixed_spectra():
    """Lanes do not see each other: one of each kind, in one batch, as if alone."""
    kinds = ["gaussian", *KINDS]
    z = torch.cat([features(kind, 2, 40, 50) for kind in kinds])
    for q in (entropy(1.0), entropy(3.5), coding_rate(1.0)):
        check(q, z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_difficult_inputs_in_16_bits(kind, dtype):
    for q in QUANTITIES:
        for n, d, rows in [(20, 33, {}), (33, 20, ROWS[1])]:
            z = features(kind, 2, n, d, dtype=dtype)
            check(q, z, need_grad=differentiable(q, kind, n, d, rows), **rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 9, 40), (3, 40, 9)])
def test_16_bit_input_is_the_float32_computation_of_the_same_numbers(shape, dtype, backend):
    """Much tighter than the rule, whose eager side rounds the Gram matrix to 16 bits."""
    z = features("gaussian", *shape, dtype=dtype)
    for q in QUANTITIES:
        for rows in ROWS:
            cotangent = torch.ones(q.truth(z).shape)
            half = run(partial(q.fast, backend=backend, **rows), z, cotangent)
            full = run(partial(q.fast, backend=backend, **rows), z.float(), cotangent)
            assert torch.equal(half[0], full[0])
            assert torch.equal(half[1], full[1].to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["rank1", "rank3", "duplicates", "zero rows"])
def test_gradient_is_finite_at_zero_eigenvalues(kind, alpha, backend):
    for shape in [(3, 20, 33), (3, 33, 20)]:
        q = entropy(alpha)
        result = Result(
            *run(partial(q.fast, backend=backend), features(kind, *shape), torch.ones(3))
        )
        assert result.value.isfinite().all() and result.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
@pytest.mark.parametrize("q", QUANTITIES, ids=name)
def test_huge_and_tiny_scales(q, scale, dtype):
    """2^±60 is about 1e±18: squares of entries reach the ends of the float32 range."""
    for shape in [(2, 20, 33), (2, 33, 20)]:
        unit = features("gaussian", *shape, dtype=dtype)
        for rows in ROWS:
            if not rows.get("normalize", True) and q.kind != "entropy":
                continue  # the result itself leaves the float32 range
            grad = differentiable(q, "gaussian", *shape[-2:], rows)
            # The weight kept for the gradient is of the order c² / |z|²: below 1e-38 for this one.
            grad &= not (q == coding_rate(1e-3) and scale > 1 and dtype != torch.float64)
            check(q, unit * scale, need_grad=grad, **rows)


def test_rows_of_very_different_scales():
    # The weight has entries of the order c² / (|z_i| |z_j|), which must stay in the float32 range.
    exponents = torch.linspace(-45, 45, 20).round().unsqueeze(-1)
    z = features("gaussian", 20, 33) * 2.0**exponents
    for q in QUANTITIES:
        unit, scaled = z / 2.0**exponents, z
        for backend in BACKENDS:
            value, grad = run(partial(q.fast, backend=backend), scaled, torch.tensor(1.0))
            expected = run(partial(q.fast, backend=backend), unit, torch.tensor(1.0))
            torch.testing.assert_close(value, expected[0], rtol=1e-6, atol=1e-6)
            actual = grad * 2.0**exponents
            bound = 1e-5 * expected[1].abs().max()
            assert (actual - expected[1]).abs().max() <= bound, (q, backend)


@pytest.mark.parametrize("kind", ["collapsed", "rank3", "gaussian"])
@pytest.mark.parametrize("shape", [(3, 50, 768), (3, 300, 40), (2, 400, 500)])
def test_coding_rate_of_a_large_scale(kind, shape):
    """c lam_max beyond 1 / eps: rounding pushes I + cG out of the positive cone in float32."""
    z = features(kind, *shape)
    check(coding_rate(1e3), z, normalize=False)
    assert coding_rate(1e3).fast(z, "cpu", normalize=False).isfinite().all()


def strided(kind, dtype):
    """z (2, 12, 21) with unusual strides."""

    def gaussian(*shape):
        return features("gaussian", *shape, dtype=dtype)

    z = gaussian(2, 12, 21)
    if kind == "transposed":
        z = gaussian(2, 21, 12).mT
    elif kind == "batch last":
        z = gaussian(12, 21, 2).permute(2, 0, 1)
    elif kind == "sliced":
        z = gaussian(5, 30, 70)[1::3, 2:26:2, 3:66:3]
    elif kind == "expanded batch":
        z = gaussian(12, 21).expand(2, 12, 21)
    elif kind == "expanded rows":
        z = gaussian(2, 1, 21).expand(2, 12, 21)
    elif kind == "expanded columns":
        z = gaussian(2, 12, 1).expand(2, 12, 21)
    elif kind == "overlapping":
        z = gaussian(1, 100).reshape(-1).as_strided((2, 12, 21), (7, 2, 1))
    assert z.shape == (2, 12, 21)
    return z


STRIDES = ["transposed", "batch last", "sliced", "expanded batch", "expanded rows"]
STRIDES += ["expanded columns", "overlapping"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", STRIDES)
def test_strides(kind, dtype, backend):
    """Where the numbers lie must not matter, but for the order of sums in PyTorch's products."""
    z = strided(kind, dtype)
    assert z.stride() != z.contiguous().stride()
    for q in QUANTITIES:
        if kind.startswith("expanded") and not differentiable(q, "rank1", 12, 21, {}):
            continue
        for y in (z, z.mT):
            flat = y.contiguous()
            cotangent = torch.ones(q.truth(flat).shape)
            actual = run(partial(q.fast, backend=backend), y, cotangent)
            expected = run(partial(q.fast, backend=backend), flat, cotangent)
            # The gradient of the larger Gram matrix is a product of PyTorch's in both backends.
            larger = "samples" if y.shape[-2] > y.shape[-1] else "features"
            if backend == "cpu":
                assert torch.equal(actual[0], expected[0])
            if backend == "cpu" and q.parameter != larger:
                assert torch.equal(actual[1], expected[1])
            for one, other in zip(actual, expected, strict=True):
                bound = 2e3 * torch.finfo(other.dtype).eps
                torch.testing.assert_close(one, other, rtol=bound, atol=bound)


def test_masks_of_any_strides():
    z = features("gaussian", 3, 12, 21)
    mask = torch.rand(12, 3, generator=torch.Generator().manual_seed(3)) > 0.3
    for q in QUANTITIES:
        for m in (mask.T, mask[:, :1].T.expand(3, 12), mask.repeat(1, 4)[:, ::4].T):
            for backend in BACKENDS:
                actual = q.fast(z, backend, mask=m)
                assert torch.equal(actual, q.fast(z, backend, mask=m.contiguous()))


POISONS = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("q", QUANTITIES, ids=name)
def test_nan_and_inf_propagate_and_spare_the_neighbours(q, rows, backend):
    for shape, at in [((3, 9, 14), (0, 0)), ((3, 9, 14), (8, 13)), ((3, 14, 9), (6, 4))]:
        for poison in POISONS:
            for dtype in (torch.float32, torch.bfloat16):
                z = features("gaussian", *shape, dtype=dtype)
                cotangent = torch.ones(q.truth(z).shape)
                clean = run(partial(q.fast, backend=backend, **rows), z, cotangent)
                z[1, at[0], at[1]] = poison
                value, grad = run(partial(q.fast, backend=backend, **rows), z, cotangent)
                if q.kind == "gram":  # entries that this row or column has no part in are numbers
                    i = at[0] if q.parameter == "samples" else at[1]
                    assert not value[1, i, i].isfinite()
                else:
                    assert value[1].isnan()
                assert not grad[1].isfinite().all()
                for i in (0, 2):
                    assert torch.equal(value[i], clean[0][i]) and torch.equal(grad[i], clean[1][i])


@pytest.mark.parametrize("alpha_or_scale", [coding_rate(1.0), entropy(1.0), entropy(2.0)], ids=name)
@pytest.mark.parametrize("shape", [(2, 300, 260), (1, 400, 500), (400, 500)])
def test_nan_propagates_in_large_matrices(shape, alpha_or_scale):
    q = alpha_or_scale
    z = features("gaussian", *shape)
    z.reshape(-1, *shape[-2:])[0, 7, 5] = math.nan
    for backend in BACKENDS:
        value, grad = run(partial(q.fast, backend=backend), z, torch.tensor(1.0))
        assert value.reshape(-1)[0].isnan()
        grad = grad.reshape(-1, *shape[-2:])
        assert not grad[0].isfinite().all()
        assert value.reshape(-1)[1:].isfinite().all() and grad[1:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("q", QUANTITIES, ids=name)
def test_nan_in_a_dropped_row_does_not_matter(q, rows, backend):
    for shape in [(2, 9, 14), (2, 14, 9)]:
        for poison in POISONS:
            z = features("gaussian", *shape)
            mask = torch.arange(shape[1]) % 4 != 1
            mask = mask.expand(shape[:2])
            cotangent = torch.ones(q.truth(z).shape)
            clean = z * mask.unsqueeze(-1)
            expected = run(partial(q.fast, backend=backend, mask=mask, **rows), clean, cotangent)
            dirty = clean.masked_fill(~mask.unsqueeze(-1), poison)
            actual = run(partial(q.fast, backend=backend, mask=mask, **rows), dirty, cotangent)
            assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
            assert (actual[1][~mask] == 0).all()


@pytest.mark.parametrize("q", QUANTITIES, ids=name)
def test_value_is_that_of_the_call_with_gradient(q):
    """Without a gradient the weight is not computed: another code path, the same number."""
    for shape in [(3, 20, 33), (3, 33, 20), (300, 260), (390, 400)]:
        if shape == (390, 400) and q.kind != "coding_rate":
            continue  # the same path as 300 x 260
        z = features("gaussian", *shape)
        for backend in BACKENDS:
            with_grad = q.fast(z.clone().requires_grad_(), backend)
            with torch.no_grad():
                assert not q.fast(z.clone().requires_grad_(), backend).requires_grad
            bound = 1e-5 if q != entropy(0.5) and q != entropy(1.01) else 1e-4
            deviation = largest(q.fast(z, backend) - with_grad.detach(), 0)
            assert (deviation <= bound * (1 + with_grad.detach().abs())).all()
