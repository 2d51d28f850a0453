"""The Triton kernels on CPU tensors, in Triton's interpreter: run by test_triton.py, or by hand:

    TRITON_INTERPRET=1 python -m pytest tests/triton_interpreter.py

Every kernel, dtype and kind of shape against the float64 reference by the rule of accuracy.py,
through the backend's functions and autograd. Tiles are small here, so that small matrices have
many; the interpreter's products are made to round as the tensor cores do (kernels/tiles.py). It
finds no races, and knows nothing of registers and shared memory: test_triton.py compiles.
"""

import math
import os
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from mmae_fast.kernels import configs, product, tiles
from mmae_fast.kernels import gram as grams
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from mmae_fast import reference
from mmae_fast.backends import dispatch, information_operators, triton_backend

from .accuracy import (
    by_operator,
    check_operator,
    coding_rate,
    entropy,
    features,
    gram,
    run,
)

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1: these are CPU tensors"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTITIES = [coding_rate(1e-3), coding_rate(1.0), coding_rate(1e3), entropy(2.0)]
QUANTITIES += [gram("samples"), gram("features")]
ROWS = [{}, {"center": True}, {"normalize": False}, {"normalize": False, "center": True}]
# Both sides of a tile (32), and nothing that is a multiple of one.
SHAPES = [(1, 1), (1, 5), (5, 1), (7, 9), (9, 7), (33, 40), (40, 33)]
LARGE = (70, 150)  # beyond the small coding rates in float32
SPLITS_FOR = grams.splits_for


def use_tiles(monkeypatch, size):
    for name in ("gram", "product"):
        monkeypatch.setattr(configs, name, lambda *_: configs.Config(size, size, 4, 1))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """32 x 32 tiles, split depths; memory full of NaN, so that what nobody wrote is seen."""
    use_tiles(monkeypatch, 32)
    monkeypatch.setattr(grams, "splits_for", lambda tiles, steps, _: min(steps, 2))
    empty = torch.empty

    def poisoned(*arguments, **options):
        made = empty(*arguments, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


fast = partial(by_operator, backend="triton")
check = partial(check_operator, backend="triton")


def mask_of(z):
    """Drops a third of the rows, and all rows of the last matrix of a batch."""
    mask = torch.rand(z.shape[:-1], generator=torch.Generator().manual_seed(0)) > 1 / 3
    mask[-1] = False
    return mask


def grid(shapes, quantities):
    """Every shape with every other quantity; dtype, row options and mask take turns."""
    for i, shape in enumerate(shapes):
        for j, q in enumerate(quantities):
            at = i + j
            if at % 2:
                continue
            name = f"{shape[0]}x{shape[1]}-{q.kind}-{q.parameter}"
            yield pytest.param(shape, q, DTYPES[at // 2 % 3], ROWS[j % 4], i % 3 == 0, id=name)


@pytest.mark.parametrize(("shape", "q", "dtype", "rows", "masked"), list(grid(SHAPES, QUANTITIES)))
def test_grid(shape, q, dtype, rows, masked):
    z = features("gaussian", 2, *shape, dtype=dtype)
    check(q, z, **rows | ({"mask": mask_of(z)} if masked else {}))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (50, 37), (37, 50), LARGE, LARGE[::-1]], ids=str)
def test_full_grid(shape, dtype):
    z = features("gaussian", 2, *shape, dtype=dtype)
    for q in [*QUANTITIES, entropy(1.0), entropy(3.0)]:
        for rows in ROWS:
            check(q, z, **rows)
            check(q, z, mask=mask_of(z), **rows)


@pytest.mark.parametrize("samples", [True, False], ids=["samples", "features"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large(monkeypatch, dtype, samples):
    """Above the small coding rates: Gram kernel, then a Cholesky factor of its lower triangle."""
    use_tiles(monkeypatch, 64)
    shape = (140, 150) if dtype == torch.float16 else LARGE
    z = features("gaussian", *(shape if samples else shape[::-1]), dtype=dtype)
    check(coding_rate(1.0), z, center=dtype == torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [True, False], ids=["samples", "features"])
def test_many_tiles(monkeypatch, samples):
    """More than a group of rows of them, and an incomplete group."""
    use_tiles(monkeypatch, 16)
    check(entropy(2.0), features("gaussian", *((150, 160) if samples else (160, 150))))


@pytest.mark.parametrize(("k", "dtype"), [(16, 0), (31, 1), (64, 0), (65, 1), (128, 2)])
def test_small_coding_rates(k, dtype):
    """The largest matrix of a block, and the next one."""
    for shape in ((k, k + 3), (k + 3, k)):
        check(coding_rate(1.0), features("gaussian", *shape, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_checked_in_tiles(monkeypatch, dtype):
    monkeypatch.undo()
    check(entropy(2.0), features("gaussian", 150, 140, dtype=dtype), center=True)


@pytest.mark.parametrize("kind", ["collapsed", "rank1", "duplicates", "zero rows", "zeros"])
@pytest.mark.parametrize("shape", [(9, 20), (20, 9)], ids=str)
def test_inputs(shape, kind):
    for i, q in enumerate((coding_rate(1.0), gram("samples"), gram("features"), entropy(2.0))):
        z = features(kind, 2, *shape, dtype=DTYPES[i % 3])
        # Normalisation has no derivative at a zero row. The spectrum does not show it, unless
        # centring moves the row; the Gram matrix does.
        smooth = kind not in ("zero rows", "zeros")
        check(q, z, center=i % 2 == 1, need_grad=smooth or (q.kind != "gram" and i % 2 == 0))


def test_strides():
    base = features("gaussian", 3, 2, 20, 24)
    views = [
        base.mT,
        base.transpose(0, 1),  # of batches, which do not merge
        base[..., ::2, 1::3],
        base[:1].expand(2, 2, 20, 24),
        base[0, 0, :1].expand(5, 24),
    ]
    for z in views:
        for q in (coding_rate(1.0), gram("features")):
            check(q, z)
    z = views[0]
    check(coding_rate(1.0), z, mask=mask_of(z)[..., :1].expand(z.shape[:-1]), center=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e18, 1e30])
def test_scales(factor, dtype):
    for shape in [(6, 9), (9, 6)]:
        z = (features("gaussian", *shape) * factor).to(dtype)
        # Weights have entries near 1 / factor²: beyond 1e15 (README, Limits) TF32 parts vanish.
        need = 1e-20 < factor < 1e15
        check(entropy(2.0), z, need_grad=need)
        check(entropy(2.0), z, normalize=False, need_grad=need)
        check(coding_rate(1.0), z, need_grad=need)
        check(gram("samples"), z, need_grad=False)


@pytest.mark.parametrize("kind", ["collapsed", "rank1", "decaying"])
def test_large_coding_rates(kind):
    """Up to where float32 ends; beyond it the truth or NaN, in value and gradient alike."""
    for shape in [(9, 20), (20, 9)]:
        check(coding_rate(1e4), features(kind, *shape))
        value, grad = run(partial(fast, coding_rate(1e12)), features(kind, *shape), torch.ones(()))
        assert value.isfinite() == grad.isfinite().all()


@pytest.mark.parametrize(("bad", "dtypes"), [(math.nan, DTYPES[:2]), (math.inf, DTYPES[1:])])
@pytest.mark.parametrize(("shape", "options"), [((6, 9), ROWS[:2]), ((9, 6), ROWS[1:3])], ids=str)
def test_not_finite(shape, options, bad, dtypes):
    for dtype, rows in zip(dtypes, options, strict=True):
        z = features("gaussian", 2, *shape, dtype=dtype)
        z[1, 2, 3] = bad
        mask = torch.ones(z.shape[:-1], dtype=torch.bool)
        mask[1, 2] = False
        for q in (coding_rate(1.0), entropy(2.0)):
            value, grad = run(partial(fast, q, **rows), z, torch.ones(2))
            assert value[0].isfinite() and value[1].isnan()
            assert grad[0].isfinite().all() and not grad[1].isfinite().all()
            dropped = run(partial(fast, q, mask=mask, **rows), z, torch.ones(2))
            assert all(x.isfinite().all() for x in dropped)


def test_empty():
    for shape in [(0, 5), (5, 0), (0, 0), (3, 0, 5), (3, 5, 0), (0, 4, 6)]:
        z = torch.zeros(shape)
        for q in QUANTITIES:
            value, grad = run(partial(fast, q, center=True), z, torch.tensor(1.0))
            assert torch.equal(value, torch.zeros_like(value)) and grad.shape == shape


def test_joint_entropy():
    z1, z2 = features("gaussian", 2, 10, 7), features("gaussian", 2, 10, 12, seed=1)
    for alpha in (1.0, 2.0):
        values, grads = [], []
        for backend in ("triton", "torch"):
            x, y = (z.detach().requires_grad_() for z in (z1, z2))
            op = information_operators.joint_entropy
            value = op(x, y, None, alpha, True, True, True, backend)[0]
            values.append(value.detach())
            grads += torch.autograd.grad(value.sum(), (x, y))
        torch.testing.assert_close(*values)
        for a, b in zip(grads[:2], grads[2:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_double_precision_is_pytorchs():
    z = features("gaussian", 2, 20, 9, dtype=torch.float64)
    for q in QUANTITIES:
        own, other = (
            run(partial(fast, q, backend=b), z, torch.tensor(1.0)) for b in ("triton", "torch")
        )
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


def test_runs_agree_bitwise():
    for dtype in DTYPES[:2]:
        z = features("gaussian", 40, 23, dtype=dtype)
        for q in QUANTITIES[3:]:
            a, b = (run(partial(fast, q, center=True), z, torch.tensor(1.0)) for _ in range(2))
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# --------------------------------------------------------------------------------------------------
# The Gram kernel


@triton.jit
def _schedule_kernel(rows, columns, side, count, GROUP: tl.constexpr, SIZE: tl.constexpr):
    p = tl.arange(0, SIZE)
    row, column = tiles.triangle_tile(p, side, GROUP)
    tl.store(rows + p, row, mask=p < count)
    tl.store(columns + p, column, mask=p < count)


@pytest.mark.parametrize("side", [1, 2, 7, 8, 9, 23, 513])
def test_every_tile_of_the_triangle_once(side):
    count = side * (side + 1) // 2
    rows, columns = (torch.zeros(count, dtype=torch.int32) for _ in range(2))
    size = triton.next_power_of_2(count)
    _schedule_kernel[(1,)](rows, columns, side, count, GROUP=8, SIZE=size)
    found = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert found == {(r, c) for r in range(side) for c in range(r + 1)}
    near = (rows[1:] - rows[:-1]).abs().max() if count > 1 else 0  # within a group, or to the next
    assert near <= 15


@pytest.mark.parametrize("samples", [True, False])
def test_splits_change_nothing_but_rounding(monkeypatch, samples):
    z = features("gaussian", 2, 60, 50)
    scale = 1 / z.norm(dim=-1)
    found = []
    for splits in (1, 3):
        monkeypatch.setattr(grams, "splits_for", lambda *_, s=splits: s)
        g = grams.gram(z, scale, None, None, samples, unit=True)
        moments = grams.moments(z, scale, None, None, samples, unit=True)
        found.append((g, moments))
        assert torch.equal(g, g.mT)
        square = g.double().square().sum((-2, -1))
        trace = g.double().diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(moments, torch.stack([square, trace], -1), rtol=1e-6, atol=0)
        if samples:
            assert (g.diagonal(dim1=-2, dim2=-1) == 1).all()
        lower = grams.gram(z, scale, None, None, samples, unit=True, full=False)
        assert torch.equal(lower.tril(), g.tril()) and lower.triu(1).isnan().any()
    torch.testing.assert_close(*found)


def test_splits_fill_the_multiprocessors():
    for tiles_, steps in ((21, 24), (36, 16), (36, 1024), (528, 16), (1, 4), (1, 1), (10000, 3)):
        splits = SPLITS_FOR(tiles_, steps, 132)
        assert 1 <= splits <= max(steps, 1)
        if tiles_ >= 4 * 132:
            assert splits == 1
    assert SPLITS_FOR(36, 1024, 132) * 36 > 0.8 * 132


def test_tf32_on_request():
    """One product of rows rounded to TF32, whose own norms it is divided by; weights as well."""
    z = features("gaussian", 20, 40)
    z[1] = z[0]  # a pair with cosine 1, which rows rounded after their norms would miss
    backend = dispatch.select_backend("triton", "cuda", "high")
    for q in (coding_rate(1.0), entropy(2.0), gram("samples"), gram("features")):
        truth = run(q.truth, z.double(), torch.tensor(1.0))
        full, less = (
            run(partial(fast, q, backend=b), z, torch.tensor(1.0)) for b in ("triton", backend)
        )
        for exact, a, b in zip(truth, full, less, strict=True):
            error = [(x.double() - exact).abs().max() / exact.abs().max() for x in (a, b)]
            assert error[0] < 3e-6 and 1e-6 < error[1] < 3e-3, (q, error)
    g = fast(gram("samples"), z, backend=backend)
    assert g[0, 1] == 1 or abs(g[0, 1] - 1) < 3e-7


def test_search(monkeypatch):
    """Every candidate is launched with the call's own arguments, and the best gives the result."""
    z = features("gaussian", 40, 33)
    plain = run(partial(fast, entropy(2.0)), z, torch.tensor(1.0))
    seen = []

    def seconds(launch):
        seen.append(launch())
        return len(seen)

    monkeypatch.setattr(configs, "AUTOTUNE", True)
    monkeypatch.setattr(configs, "_found", {})
    monkeypatch.setattr(configs, "seconds", seconds)
    monkeypatch.setattr(configs, "CANDIDATES", (configs.Config(16, 16, 4, 1),))
    found = run(partial(fast, entropy(2.0)), z, torch.tensor(1.0))
    assert len(seen) == 4 and len(configs._found) == 2  # Gram matrix and gradient
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    torch.testing.assert_close(seen[0], seen[1])


# --------------------------------------------------------------------------------------------------
# Memory


@pytest.fixture
def unseen_interpreter(monkeypatch):
    """Its own copies of arguments are not the library's."""
    launch = GridExecutor.__call__

    def unseen(*args, **kwargs):
        with _disable_current_modes():
            return launch(*args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", unseen)


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operator makes."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        own = {s.data_ptr() for s in storages((args, kwargs))}
        self.sizes += [s.nbytes() for s in storages(result) if s.data_ptr() not in own]
        return result


def storages(tree):
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"center": True}),
        (torch.float16, {"normalize": False}),
    ],
    ids=str,
)
def test_nothing_of_the_size_of_z(monkeypatch, unseen_interpreter, dtype, rows):
    """Value and gradient of a tall matrix: besides the gradient, numbers per row and per column."""
    monkeypatch.setattr(product, "SCRATCH_BYTES", 4 * 256 * 16)
    monkeypatch.setattr(grams, "splits_for", lambda *_: 1)  # others need their workspace
    z = features("gaussian", 1200, 16, dtype=dtype)
    for q in (coding_rate(1.0), entropy(2.0)):
        arguments = (None, q.parameter, rows.get("normalize", True), rows.get("center", False))
        forward = getattr(triton_backend, f"{op_name(q)}_fwd")
        with Allocations() as seen:
            _, weight = forward(z, *arguments, True)
            grad = triton_backend.weight_bwd(torch.ones(()), z, None, weight, *arguments[2:])
        wanted = run(partial(q.truth, **rows), z.double(), torch.ones(()))[1]
        torch.testing.assert_close(grad.double(), wanted, rtol=0.1, atol=1e-2 * wanted.abs().max())
        sizes = sorted(seen.sizes)
        assert sizes.pop() == z.numel() * z.element_size()  # the gradient
        assert sizes[-1] <= z.numel() * z.element_size() / 1.9, sizes


def op_name(q):
    return "coding_rate" if q.kind == "coding_rate" else "matrix_entropy"


def test_renyi_without_a_gradient_stores_no_matrix(monkeypatch, unseen_interpreter):
    monkeypatch.setattr(grams, "splits_for", lambda *_: 1)
    z = features("gaussian", 80, 90)
    with Allocations() as seen:
        value, weight = triton_backend.matrix_entropy_fwd(z, None, 2.0, True, False, False)
    assert weight is None and max(seen.sizes) < 80 * 80
    torch.testing.assert_close(value, reference.matrix_entropy(z, 2.0))
