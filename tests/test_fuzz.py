"""Random calls of the compiled CPU backend, each held to everything that is promised at once.

A case is a few plain values (:class:`Case`); hypothesis draws them, shrinks those that fail, and
prints one that can be pasted into ``check_case``. ``make test`` runs a fixed 1,200 of them, ``make
fuzz`` MMAE_FAST_FUZZ_CASES random ones.
"""

import contextlib
import math
import os
from collections import Counter
from functools import partial
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmae_fast import reference

from .accuracy import (
    DTYPES,
    Quantity,
    Result,
    coding_rate,
    entropy,
    expected,
    features,
    gram,
    largest,
    poison_scratch,
    run,
)

WANTED = os.environ.get("MMAE_FAST_FUZZ_CASES")
EXAMPLES = int(WANTED or 1200)


class Case(NamedTuple):
    q: Quantity
    dtype: torch.dtype
    shape: tuple[int, ...]
    kind: str  # of spectrum, see accuracy.features
    exponent: int  # entries are multiplied by 2 ** exponent
    layout: str
    normalize: bool
    center: bool
    mask: str | None
    poison: float | None  # NaN or ±Inf in one entry
    poison_dropped: bool  # in a row that the mask drops, if there is one
    need_grad: bool
    seed: int


KINDS = ("gaussian", "collapsed", "rank1", "rank3", "duplicates", "zero rows", "zeros", "decaying")
KINDS += ("orthonormal",)
LAYOUTS = ("contiguous", "transposed", "batch last", "sliced", "offset", "expanded batch")
LAYOUTS += ("expanded rows", "expanded columns")
MASKS = (None, "some", "all", "all of one matrix")
ALPHAS = (0.5, 1.0, 1.01, 1.5, 2.0, 3.0, 4.0, 5.0, 8.0, math.inf)
SCALES = tuple(10.0**e for e in range(-4, 5))
# Around groups of 8 and 16 lanes and register tiles of 48 columns; small ones are the likely ones.
SIZES = st.one_of(
    st.integers(0, 12),
    st.sampled_from([0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 79, 80]),
    st.integers(13, 80),
)
MAX_ENTRIES = 20_000


@st.composite
def cases(draw):
    q = draw(
        st.one_of(
            st.one_of(st.sampled_from(ALPHAS), st.floats(0.25, 8.0)).map(entropy),
            st.sampled_from(SCALES).map(coding_rate),
            st.sampled_from(("auto", "samples", "features")).map(gram),
        )
    )
    dtype = draw(st.sampled_from(DTYPES))
    n, d = draw(SIZES), draw(SIZES)
    room = max(1, MAX_ENTRIES // max(n * d, 1))
    if draw(st.booleans()):
        batch = (min(draw(st.integers(0, 40)), room),)
    else:
        batch = draw(st.sampled_from([(), (2, 3), (1, 4), (3, 0), (17, 2), (2, 1, 3)]))
        batch = batch if math.prod(batch) <= room else ()
    normalize = draw(st.booleans())
    # Entries up to 1e±18; within the range of float16; and where rows are not normalised, Gram
    # matrix, coding rate and the weight kept for the gradient are of the order of squares.
    limit = 60 if normalize or q.kind == "entropy" or dtype == torch.float64 else 30
    limit = 8 if dtype == torch.float16 else limit
    exponent = draw(st.one_of(st.just(0), st.integers(-limit, limit)))
    return Case(
        q=q,
        dtype=dtype,
        shape=(*batch, n, d),
        kind=draw(st.sampled_from(KINDS)),
        exponent=exponent,
        layout=draw(st.sampled_from(LAYOUTS)),
        normalize=normalize,
        center=draw(st.booleans()),
        mask=draw(st.sampled_from(MASKS)),
        poison=draw(st.sampled_from((None, math.nan, math.inf, -math.inf))),
        poison_dropped=draw(st.booleans()),
        need_grad=draw(st.sampled_from((True, True, True, False))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


# --------------------------------------------------------------------------------------------------
# From a case to tensors


def build(case):
    """z with the layout of the case, and the mask."""
    z = features(case.kind, *case.shape, dtype=torch.float64, seed=case.seed)
    z = (z * 2.0**case.exponent).to(case.dtype)
    *batch, n, d = case.shape
    if case.layout == "transposed":
        z = z.mT.contiguous().mT
    elif case.layout == "batch last":
        z = z.movedim((-2, -1), (0, 1)).contiguous().movedim((0, 1), (-2, -1))
    elif case.layout == "sliced":
        wide = torch.full((*batch, 2 * n + 1, 3 * d + 2), math.nan, dtype=case.dtype)
        view = wide[..., 1 : 2 * n + 1 : 2, 2 : 3 * d + 2 : 3]
        z = view.copy_(z)
    elif case.layout == "offset":  # not aligned to a vector, and the last entry of its storage
        z = torch.cat([z.new_full((3,), math.nan), z.flatten()])[3:].view(case.shape)
    elif case.layout.startswith("expanded"):
        dim = {"batch": -3, "rows": -2, "columns": -1}[case.layout.split()[1]]
        if z.dim() >= -dim and z.shape[dim]:
            z = z.narrow(dim, 0, 1).clone().expand(case.shape)
    assert z.shape == case.shape
    mask = None
    if case.mask is not None:
        generator = torch.Generator().manual_seed(case.seed)
        mask = torch.rand(case.shape[:-1], generator=generator) > 1 / 3
        if case.mask == "all":
            mask[:] = False
        elif case.mask == "all of one matrix" and mask.numel():
            mask.view(-1, n)[case.seed % math.prod(batch)] = False
    return z, mask


def plant(case, z, mask):
    """A copy of z with the poison in it; index of the matrix; whether its row is kept."""
    planted = z.clone(memory_format=torch.contiguous_format)
    *batch, n, d = case.shape
    m = case.seed % math.prod(batch)
    row, column = case.seed // 41 % n, case.seed // 83 % d
    kept = torch.ones(n, dtype=torch.bool) if mask is None else mask.reshape(-1, n)[m]
    if case.poison_dropped and not kept.all():
        row = int((~kept).nonzero()[0])
    planted.view(-1, n, d)[m, row, column] = case.poison
    return planted, m, bool(kept[row])


@contextlib.contextmanager
def poisoned_memory():
    """torch.empty returns NaN in here, and the scratch of the kernels is full of NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        poison_scratch(80)
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


# --------------------------------------------------------------------------------------------------
# What the rule cannot speak of


def has_meaning(case, z, rows):
    """Per matrix: not an entropy of what centring left of equal rows, no drowned identity.

    The spread of equal rows is rounding alone (whether or not the truth's happens to be exactly 0),
    and rounding has an entropy of its own. Near c lam_max = 1 / eps of float64, which is what the
    coding rate falls back to, rounding of cG swamps the I of log det(I + cG): it may give NaN.
    """
    if case.q.kind == "gram" or (case.q.kind == "entropy" and not case.center):
        return torch.ones(case.shape[:-2], dtype=torch.bool)
    spread = reference.prepare(z.double(), **rows).square().sum((-2, -1))
    if case.q.kind == "coding_rate":
        return case.q.parameter * spread < 1e-2 / torch.finfo(torch.float64).eps
    size = reference.prepare(z.double(), **rows | {"center": False}).square().sum((-2, -1))
    return (size == 0) | (spread > 1e-8 * size)


def gradient_is_defined(case, z, rows):
    """Per matrix: whether there is a gradient that the digits at hand can tell.

    alpha < 1 has none at a zero eigenvalue, alpha = inf none at a tie. Where c lam_max, or c times
    what rounding before centring does to G, passes 1 / eps, eager and the compiled backend are off
    by eps c |z|, far more than the gradient itself: (I + cG)⁻¹ is 1 on the null space of z, and
    only an exact product with z makes that vanish.
    """
    smooth = torch.ones(case.shape[:-2], dtype=torch.bool)
    alpha = case.q.parameter
    if case.q.kind == "gram" or (case.q.kind == "entropy" and 1 <= alpha < math.inf):
        return smooth
    if min(case.shape[-2:]) == 0:
        return smooth
    lam = torch.linalg.svdvals(reference.prepare(z.double(), **rows)).square()
    if case.q.kind == "coding_rate":
        size = lam[..., 0]
        if case.center:
            uncentred = reference.prepare(z.double(), **rows | {"center": False})
            longest = largest(torch.linalg.vector_norm(uncentred, dim=-1), 1)
            size = size + longest * (case.shape[-2] * size).sqrt()
        eps = torch.finfo(reference.accumulation_dtype(case.dtype)).eps
        return case.q.parameter * size < 1 / eps
    if alpha < 1:
        return lam[..., -1] > 1e-5 * lam.sum(-1)
    second = lam[..., 1] if lam.shape[-1] > 1 else 0
    return lam[..., 0] - second > 1e-4 * lam.sum(-1)


def gradient_in_range(case, z, rows, truth):
    """Per matrix: gradient and, with float32 accumulation, the weight kept for it, are numbers.

    The weight has entries up to f / (tau |z_i|²): f the steepest derivative, tau the trace of G (of
    entropies), z_i a row (if normalised). It is told from zero where min(1, c)² / |z_i|² is.
    """
    fine = largest(truth.grad, 2) < torch.finfo(case.dtype).max / 4
    kind, parameter = case.q.kind, case.q.parameter
    if case.dtype == torch.float64 or kind == "gram":
        return fine
    c, steepest = 1.0, 20.0  # -log of a tenth of eps, where a zero eigenvalue is taken to be
    if kind == "coding_rate":
        c = steepest = parameter
    elif parameter < 1:
        steepest = 1e8 ** (1 - parameter) / (1 - parameter)
    low = high = torch.ones(case.shape[:-2], dtype=torch.float64)
    if kind == "entropy":
        low = high = reference.prepare(z.double(), **rows).square().sum((-2, -1))
    if case.normalize:
        norm = reference.prepare(z.double(), normalize=False, mask=rows["mask"]).norm(dim=-1)
        low = low / largest(torch.where(norm > 0, 1 / norm, 0), 1) ** 2
        high = high * largest(norm, 1) ** 2
    return fine & (max(1, steepest) < 1e37 * low) & (min(1, c) ** 2 > 1e-37 * high) | (low == 0)


def expected_of(case, z, rows):
    """accuracy.expected, with room where eager has luck or is itself the truth.

    Gram matrix: equal products (equal columns) of which eager rounds none may here all round the
    same way, by half an eps of a sum of m that grows to |v|²: eps m / 4 |v|² instead of 4 eps |v|².
    Likewise the gradient of a coding rate of centred rows, a sum over n rows that may be equal.
    alpha < 1: where eager's zero eigenvalues are exact, noise^alpha of k others adds up instead of
    walking: sqrt k more. float64: truth and result are two computations of one kind, each within
    the floor of what is exact: the sum of both. And the reference's gradient of a coding rate, an
    inverse, loses far more than that at zero eigenvalues with c lam_max >> 1 (errors of 1e-11
    instead of 1e-14 against 40 digits); the singular values of the rows do not.
    """
    q = case.q
    n, d = case.shape[-2:]
    if q.parameter == "auto":
        q = gram("samples" if n <= d else "features")
    truth, cotangent, value_allowed, grad_allowed = expected(q, z, rows, case.need_grad)
    if q.kind == "gram":
        dim = -1 if q.parameter == "samples" else -2
        vectors = reference.prepare(z.double(), **rows | {"center": False}).norm(dim=dim)
        eps = torch.finfo(reference.accumulation_dtype(z.dtype)).eps
        value_allowed = (
            value_allowed + eps * max(z.shape[dim] / 4 - 4, 0) * largest(vectors, 1) ** 2
        )
    elif q.kind == "entropy" and q.parameter < 1:
        value_allowed = value_allowed * min(n, d) ** 0.5
    elif q.kind == "coding_rate" and case.center and case.need_grad and z.numel():
        norm = reference.prepare(z.double(), normalize=False, mask=rows["mask"]).norm(dim=-1)
        size = largest(torch.where(norm > 0, 1 / norm, 0) if case.normalize else norm, 1)
        eps = torch.finfo(reference.accumulation_dtype(z.dtype)).eps
        grad_allowed = grad_allowed + 2 * q.parameter * eps * max(n / 4 - 4, 0) * size
    if case.dtype != torch.float64:
        return truth, cotangent, value_allowed, grad_allowed
    if case.need_grad and q.kind == "coding_rate" and z.numel():

        def rate(y):
            sigma = torch.linalg.svdvals(reference.prepare(y, **rows))
            return (q.parameter * sigma.square()).log1p().sum(-1)

        top = torch.linalg.svdvals(reference.prepare(z, **rows))[..., :1, None].square()
        by_svd = run(rate, z, cotangent)[1]
        truth = truth._replace(grad=torch.where(q.parameter * top > 100, by_svd, truth.grad))
    return truth, cotangent, 2 * value_allowed, 2 * grad_allowed if case.need_grad else None


# --------------------------------------------------------------------------------------------------
# The checks


def same(a, b):
    return torch.equal(a.nan_to_num(nan=1.25), b.nan_to_num(nan=1.25)) and torch.equal(
        a.isnan(), b.isnan()
    )


def check_case(case):
    z, mask = build(case)
    q, rows = case.q, {"normalize": case.normalize, "center": case.center, "mask": mask}
    fast = partial(q.fast, backend="cpu", **rows)
    truth, cotangent, value_allowed, grad_allowed = expected_of(case, z, rows)
    with poisoned_memory():
        result = Result(*run(fast, z, cotangent))
    check_rule(case, z, rows, result, truth, value_allowed, grad_allowed)

    def agrees(other, what, gradient=True):
        assert same(other.value, result.value), f"value depends on {what}"
        if case.need_grad and gradient:
            assert same(other.grad, result.grad), f"gradient depends on {what}"

    agrees(Result(*run(fast, z, cotangent)), "what the memory held")
    if not z.is_contiguous():
        # The gradient of a Gram matrix has products of PyTorch's in it, which strides may reorder.
        agrees(Result(*run(fast, z.contiguous(), cotangent)), "the strides", q.kind != "gram")
    if case.dtype in (torch.bfloat16, torch.float16):
        value, grad = run(fast, z.float(), cotangent)
        agrees(Result(value, grad if grad is None else grad.to(case.dtype)), "the dtype")
    if mask is not None and case.need_grad:
        number = largest(result.value, 2 if q.kind == "gram" else 0).isfinite()
        assert (result.grad[~mask & number.unsqueeze(-1)] == 0).all(), "dropped row with gradient"
    if case.poison is not None and z.numel():
        check_poison(case, z, mask, rows, cotangent, Result(*run(fast, z.contiguous(), cotangent)))


def check_rule(case, z, rows, result, truth, value_allowed, grad_allowed):
    """Value, with and without a gradient, and gradient, by the rule of accuracy.py."""
    dims = 2 if case.q.kind == "gram" else 0
    alone = case.q.fast(z, "cpu", **rows)
    assert alone.dtype == result.value.dtype == reference.accumulation_dtype(case.dtype)
    assert alone.shape == result.value.shape == truth.value.shape
    meaning = has_meaning(case, z, rows)
    pairs = [("value", result.value, truth.value, value_allowed, dims, meaning, meaning)]
    if case.need_grad:
        assert result.grad.dtype == case.dtype and result.grad.shape == z.shape
        present = meaning & gradient_in_range(case, z, rows, truth)
        defined = present & gradient_is_defined(case, z, rows)
        pairs += [
            ("value without gradient", alone, *pairs[0][2:]),
            ("gradient", result.grad, truth.grad, grad_allowed, 2, present, defined),
        ]
    for name, got, wanted, allowed, reduced, present, defined in pairs:
        # Eager may fail, and then allows anything: what is finite must still come out finite.
        finite = largest(got, reduced).isfinite() | ~largest(wanted, reduced).isfinite()
        assert (finite | ~present).all(), f"{name} is not finite"
        error = largest(got.double() - wanted, reduced)
        bad = defined & ~(error <= allowed)
        if bad.any():
            at = tuple(bad.nonzero()[0].tolist())
            raise AssertionError(
                f"{name}{list(at)}: error {error[at]:.3g}, allowed {allowed[at]:.3g}"
                f" ({error[at] / allowed[at]:.3g}x), {int(bad.sum())} of {bad.numel()} matrices"
            )


def check_poison(case, z, mask, rows, cotangent, clean):
    """NaN and Inf reach the result of their own matrix, and of no other; in a dropped row, none."""
    planted, m, kept = plant(case, z, mask)
    poisoned = Result(*run(partial(case.q.fast, backend="cpu", **rows), planted, cotangent))
    dims = 2 if case.q.kind == "gram" else 0

    def matrices(x, dims):
        return x.reshape(-1, *x.shape[x.dim() - dims :])

    pairs = [(poisoned.value, clean.value, dims)]
    pairs += [(poisoned.grad, clean.grad, 2)] if case.need_grad else []
    for dirty, pure, dims in pairs:
        others = torch.arange(math.prod(case.shape[:-2])) != (m if kept else -1)
        assert same(matrices(dirty, dims)[others], matrices(pure, dims)[others]), (
            "poison reaches another matrix" if kept else "poison in a dropped row matters"
        )
    if not kept:
        return
    value = poisoned.value.reshape(-1, *poisoned.value.shape[z.dim() - 2 :])[m]
    if case.q.kind == "gram":
        wanted = case.q.truth(planted, **rows).reshape(-1, *value.shape)[m]
        assert torch.equal(value.isfinite(), wanted.isfinite()), "poison in other entries than due"
    else:
        assert value.isnan(), f"poison gives {value}"
    if case.need_grad and value.numel():
        assert not matrices(poisoned.grad, 2)[m].isfinite().all(), "poison spares the gradient"


counts = Counter()


@settings(
    max_examples=EXAMPLES,
    derandomize=WANTED is None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(cases())
def run_cases(case):
    counts[f"fast_{case.q.kind.replace('entropy', 'matrix_entropy')}"] += 1
    check_case(case)


def test_fuzz(capsys):
    counts.clear()
    run_cases()
    total = sum(counts.values())
    assert total >= EXAMPLES
    with capsys.disabled():
        parts = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        print(f"\nfuzz: {total} random calls hold ({parts})")
