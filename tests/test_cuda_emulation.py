"""The CUDA kernels, run on the host: csrc/cuda/*.cuh compiled by g++ against cuda_emulation.h.

Every kernel, dtype and launch plan against the float64 reference, by the rule of accuracy.py and
through the Python backend and autograd; plus what only an emulator can see: races, reads of shared
memory that nobody wrote, indices out of bounds, barriers that are missing or needless.
"""

import math
from functools import partial

import pytest
import torch

from .accuracy import (
    DTYPES,
    coding_rate,
    entropy,
    features,
    gram,
    run,
)
from .cuda_emulation.harness import (
    check,
    emulated,  # noqa: F401
    emulator,
    fast,
    needs_emulator,
)

pytestmark = needs_emulator


QUANTITIES = [coding_rate(1e-3), coding_rate(1.0), coding_rate(1e3), entropy(2.0)]
QUANTITIES += [gram("samples"), gram("features"), *map(entropy, (1.0, 0.5, 3.0, math.inf))]
ROWS = [{}, {"center": True}, {"normalize": False}, {"normalize": False, "center": True}]
# Both sides of every plan (32, 64, 96, 128), of a staged step (16, 32 deep) and of the tiles.
SHAPES = [(1, 1), (1, 5), (5, 1), (2, 3), (7, 9), (9, 7), (16, 33), (33, 16), (17, 40), (40, 17)]
SHAPES += [(32, 32), (31, 70), (70, 31), (33, 35), (35, 33), (12, 130), (130, 12)]


def mask_of(z):
    """Drops a third of the rows, and all rows of the last matrix of a batch."""
    mask = torch.rand(z.shape[:-1], generator=torch.Generator().manual_seed(0)) > 1 / 3
    mask[-1] = False
    return mask


def grid():
    """Every shape with every quantity; dtype, row options and mask take turns."""
    for i, shape in enumerate(SHAPES):
        for j, q in enumerate(QUANTITIES):
            at = i + j
            name = f"{shape[0]}x{shape[1]}-{q.kind}-{q.parameter}"
            yield pytest.param(
                shape, q, DTYPES[(at + i // 4) % 4], ROWS[at // 2 % 4], at % 3, id=name
            )


@pytest.mark.parametrize(("shape", "q", "dtype", "rows", "turn"), list(grid()))
def test_grid(shape, q, dtype, rows, turn):
    z = features("gaussian", 2, *shape, dtype=dtype)
    rows = rows | ({"mask": mask_of(z)} if turn == 0 else {})
    # Centring and masks make zero eigenvalues, where the derivative of alpha < 1 is infinite.
    check(q, z, need_grad=q != entropy(0.5) or not {"center", "mask"} & rows.keys(), **rows)


@pytest.mark.parametrize("samples", [True, False], ids=["samples", "features"])
@pytest.mark.parametrize(
    ("dtype", "k"),
    [(torch.float32, k) for k in (64, 65, 128)] + [(torch.float64, k) for k in (64, 65, 96)],
    ids=str,
)
def test_plans(ops, dtype, k, samples):
    shape = (k, k + 3) if samples else (k + 3, k)
    z = features("gaussian", *shape, dtype=dtype)
    check(coding_rate(1.0), z, center=k % 2 == 0)
    check(entropy(2.0), z)
    is_double = dtype == torch.float64
    plan = emulator().plan(emulator().Kernel.spectral, k, is_double)
    assert ops.launches[0] == [1, plan["threads"], plan["shared_bytes"]]
    assert plan["width"] >= k and plan["ld"] % 2 == 1 and plan["ld"] > k


def test_plans_fit():
    m = emulator()
    for is_double in (False, True):
        orders = range(m.largest_order(m.Kernel.spectral, is_double, m.shared_budget) + 1)
        plans = [m.plan(m.Kernel.spectral, k, is_double) for k in orders]
        assert max(p["shared_bytes"] for p in plans) <= m.shared_budget
        assert all(p["width"] >= k and p["threads"] in (64, 256) for k, p in enumerate(plans))
        assert all(p["threads"] >= k for k, p in enumerate(plans))  # a thread per column in places


@pytest.mark.parametrize("kind", ["collapsed", "rank1", "duplicates", "zero rows", "zeros"])
@pytest.mark.parametrize("shape", [(9, 20), (20, 9)], ids=str)
def test_inputs(shape, kind):
    for i, q in enumerate(QUANTITIES):
        z = features(kind, 2, *shape, dtype=DTYPES[i % 4])
        # Normalisation has no derivative at a zero row. The spectrum does not show it, unless
        # centring moves the row; the Gram matrix does.
        # Nor has alpha < 1 one at a zero eigenvalue.
        smooth = kind not in ("zero rows", "zeros") and q != entropy(0.5)
        check(q, z, need_grad=smooth or q.kind == "coding_rate" or q == entropy(2.0))
        check(q, z, center=True, need_grad=smooth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_equal_rows_in_16_bits(dtype):
    """Eager is nearly exact there; tensor cores, which truncate, must not add up long sums."""
    for n, d in [(66, 70), (68, 200), (100, 300), (128, 130)]:
        for q in (coding_rate(1e3), coding_rate(1.0), entropy(2.0)):
            for kind in ("duplicates", "rank1"):
                check(q, features(kind, 2, n, d, dtype=dtype))


@pytest.mark.parametrize("shape", [(3, 1100), (1100, 3)], ids=str)
def test_long_sums(shape):
    for q in QUANTITIES:
        z = features("gaussian", *shape)
        check(q, z, center=q.kind == "gram")


def test_strides():
    base = features("gaussian", 3, 2, 20, 24)
    views = [
        base.mT,
        base.transpose(0, 1),
        base[..., ::2, 1::3],
        base[:1].expand(2, 2, 20, 24),
        base[0, 0, :1].expand(5, 24),
    ]
    for z in views:
        for q in QUANTITIES[2:-2]:
            check(q, z)
        mask = mask_of(z).transpose(-1, -1)
        check(coding_rate(1.0), z, mask=mask, center=True)
        check(entropy(2.0), z, mask=mask[..., :1].expand(z.shape[:-1]))


@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e18, 1e30])
def test_scales(factor):
    for shape in [(6, 9), (9, 6)]:
        z = features("gaussian", *shape) * factor
        for normalize in (True, False):
            for alpha in (1.0, 2.0):
                small = abs(math.log10(factor)) < 20
                check(entropy(alpha), z, normalize=normalize, need_grad=small)
        check(coding_rate(1.0), z, need_grad=abs(math.log10(factor)) < 20)


@pytest.mark.parametrize("kind", ["collapsed", "rank1", "decaying"])
@pytest.mark.parametrize("shape", [(9, 20), (20, 9)], ids=str)
def test_large_coding_rates(shape, kind):
    """Up to where float32 ends; beyond it the truth or NaN, in value and gradient alike."""
    check(coding_rate(1e4), features(kind, *shape))
    check(coding_rate(1e12), features(kind, *shape, dtype=torch.float64))
    value, grad = run(partial(fast, coding_rate(1e12)), features(kind, *shape), torch.tensor(1.0))
    assert value.isfinite() == grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=str)
def test_not_finite(shape, bad):
    z = features("gaussian", 2, *shape)
    z[1, 2, 3] = bad
    mask = torch.ones(z.shape[:-1], dtype=torch.bool)
    mask[1, 2] = False
    for q in (coding_rate(1.0), entropy(2.0), entropy(1.0)):
        for rows in ROWS:
            value, grad = run(partial(fast, q, **rows), z, torch.ones(2))
            assert value[0].isfinite() and value[1].isnan()
            assert grad[0].isfinite().all() and not grad[1].isfinite().all()
            dropped = run(partial(fast, q, mask=mask, **rows), z, torch.ones(2))
            assert all(x.isfinite().all() for x in dropped)


@pytest.mark.parametrize(
    "shape", [(0, 5), (5, 0), (0, 0), (3, 0, 5), (3, 5, 0), (0, 4, 6)], ids=str
)
def test_empty(shape):
    z = torch.zeros(shape)
    for q in QUANTITIES:
        value, grad = run(partial(fast, q, center=True), z, torch.tensor(1.0))
        assert torch.equal(value, torch.zeros_like(value)) and grad.shape == shape


def test_above_the_limit(ops):
    check(coding_rate(1.0), features("gaussian", 257, 259), need_grad=False)
    check(entropy(2.0), features("gaussian", 300, 257, dtype=torch.float64))
    assert not ops.launches  # PyTorch's libraries did all of it
    ops.shared = 48 * 1024
    check(entropy(1.0), features("gaussian", 111, 113))
    assert ops.launches  # the Gram matrix, the gradient
    assert all(threads == 256 for _, threads, _ in ops.launches)


def test_order_of_threads_does_not_matter(ops):
    z = features("gaussian", 2, 11, 40, dtype=torch.bfloat16)
    results = []
    for seed in range(3):
        ops.seed = seed
        for q in QUANTITIES:
            for x in (z, z.mT):
                results.append(run(partial(fast, q, center=True), x, torch.tensor(1.0)))
    third = len(results) // 3
    for a, b, c in zip(*(results[i * third :][:third] for i in range(3)), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(b[0], c[0])
        assert torch.equal(a[1], b[1]) and torch.equal(b[1], c[1])


# --------------------------------------------------------------------------------------------------
# The harness itself


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no_barrier", "race|nobody wrote"),
        ("out_of_bounds", "index 64 of a shared array of 64"),
        ("uninitialised", "nobody wrote"),
        ("divergent", "wait at different places"),
    ],
)
def test_planted_faults_are_found(fault, message):
    faults = emulator().Fault
    assert emulator().reverse(faults.none, 0) == [63.0 - t for t in range(64)]
    for seed in range(3):
        with pytest.raises(RuntimeError, match=message):
            emulator().reverse(getattr(faults, fault), seed)


def exercise(ops):
    """Calls that together need every barrier of every kernel."""

    def call(x, q, fused, **rows):
        ops.fused = fused
        run(partial(fast, q, **rows), x, torch.tensor(1.0))

    for rows in ({"center": True}, {"normalize": False}):
        for shape in ((9, 70), (70, 9), (33, 34), (34, 33)):
            x = features("gaussian", *shape)
            for q in (*QUANTITIES[2:6], entropy(1.0), entropy(math.inf)):
                yield partial(call, x, q, True, **rows)
            for q in (coding_rate(1.0), entropy(2.0)):
                yield partial(call, x, q, False, **rows)


def test_every_barrier_is_needed(ops):
    calls = list(exercise(ops))
    barriers = {}
    for call in calls:
        with pytest.MonkeyPatch.context() as patch:
            seen = set()
            for name in ("measure", "gram", "weight_bwd"):
                method = getattr(emulator(), name)
                patch.setattr(emulator(), name, partial(record, method, seen))
            call()
        for where in seen:
            barriers.setdefault(where, []).append(call)
    assert {where.split(":")[0] for where in barriers} == {
        "device.cuh",
        "spectral.cuh",
        "sweep.cuh",
        "jacobi.cuh",
        "products.cuh",
    }
    needless = [where for where, users in barriers.items() if not any(map(fails(where), users))]
    assert not needless, f"barriers that no call needs: {needless}"


def record(method, seen, *args):
    launches = method(*args)
    seen |= emulator().barriers()
    return launches


def fails(where):
    def without(call):
        emulator().skip_barrier(where)
        try:
            call()
        except RuntimeError as error:
            assert "race" in str(error) or "nobody wrote" in str(error)
            return True
        finally:
            emulator().skip_barrier("")
        return False

    return without
