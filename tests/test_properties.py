"""Properties that hold for every input, tried on inputs that a generator makes up."""

import math
import os
from itertools import pairwise

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mmae_fast import fast_coding_rate, fast_gram, fast_matrix_entropy

from .accuracy import BACKENDS, DTYPES, check, coding_rate, entropy, features, gram

CI = bool(os.environ.get("CI"))
settings.register_profile(
    "properties",
    deadline=None,
    derandomize=CI,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
PROFILE = settings.get_profile("properties")


def cases(count):
    return settings(PROFILE, max_examples=count)


ALPHAS = st.sampled_from((0.5, 1.0, 1.01, 1.5, 2.0, 3.0, 5.0, math.inf))
SCALES = st.sampled_from((1e-3, 0.1, 1.0, 30.0, 1e3))
SIZES = st.integers(1, 24)
SEEDS = st.integers(0, 2**32 - 1)
BACKEND = st.sampled_from(BACKENDS)
KINDS = ("gaussian", "collapsed", "rank3", "duplicates", "zero rows", "decaying", "orthonormal")
KIND = st.sampled_from(KINDS)


@st.composite
def matrices(draw, kinds=KINDS, dtype=torch.float64, least=1):
    n, d = draw(st.integers(least, 24)), draw(st.integers(least, 24))
    return features(draw(st.sampled_from(kinds)), n, d, dtype=dtype, seed=draw(SEEDS))


def close(actual, expected, tolerance=1e-10):
    scale = 1 + expected.abs().amax().item() if expected.numel() else 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def tolerance(alpha):
    """float64 rounding of zero eigenvalues: noise^alpha for alpha < 1, / (alpha - 1) near 1."""
    return 1e-5 if alpha < 1 else 1e-10


def permutation(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@cases(100)
@given(matrices(), ALPHAS, SCALES, st.booleans(), SEEDS, BACKEND)
def test_rotation_of_the_features_changes_nothing(z, alpha, scale, center, seed, backend):
    d = z.shape[-1]
    turned = z @ features("orthonormal", d, d, dtype=z.dtype, seed=seed)
    options = {"center": center, "backend": backend}
    # Centring equal rows leaves rounding alone, which has a spectrum of its own.
    assume(not center or fast_gram(z, **options).diagonal().sum() > 1e-6)
    for normalize in (True, False):
        h = fast_matrix_entropy(z, alpha, normalize=normalize, **options)
        close(fast_matrix_entropy(turned, alpha, normalize=normalize, **options), h, 1e-5)
        rate = fast_coding_rate(z, scale, normalize=normalize, **options)
        close(fast_coding_rate(turned, scale, normalize=normalize, **options), rate, 1e-8)


@cases(100)
@given(matrices(), ALPHAS, SCALES, SEEDS, BACKEND)
def test_order_of_rows_and_columns_changes_nothing(z, alpha, scale, seed, backend):
    n, d = z.shape
    for moved in (z[permutation(n, seed)], z[:, permutation(d, seed)]):
        h = fast_matrix_entropy(z, alpha, backend=backend)
        close(fast_matrix_entropy(moved, alpha, backend=backend), h, tolerance(alpha))
        rate = fast_coding_rate(z, scale, backend=backend)
        close(fast_coding_rate(moved, scale, backend=backend), rate, 1e-8)
    order = permutation(n, seed)
    g = fast_gram(z, side="samples", backend=backend)
    close(fast_gram(z[order], side="samples", backend=backend), g[order][:, order])


@cases(120)
@given(matrices(), st.booleans(), st.booleans(), BACKEND)
def test_entropies_are_bounded_and_ordered(z, normalize, center, backend):
    """0 <= H_inf <= ... <= H_0.5 <= log k."""
    options = {"normalize": normalize, "center": center, "backend": backend}
    assume(fast_gram(z, **options).diagonal().sum() > 1e-6)
    alphas = (math.inf, 5.0, 3.0, 2.0, 1.5, 1.01, 1.0, 0.5)
    entropies = [fast_matrix_entropy(z, alpha, **options).item() for alpha in alphas]
    assert entropies[0] >= -1e-12
    assert entropies[-1] <= math.log(min(z.shape)) + 1e-12
    for smaller, larger in pairwise(entropies):
        assert smaller <= larger + 1e-10


@cases(80)
@given(matrices(), ALPHAS, st.integers(2, 4), st.booleans(), BACKEND)
def test_duplication_of_rows_leaves_the_entropy(z, alpha, times, center, backend):
    assume(not center or fast_gram(z, center=True).diagonal().sum() > 1e-6)
    h = fast_matrix_entropy(z, alpha, center=center, backend=backend)
    repeated = z.repeat(times, 1)
    close(fast_matrix_entropy(repeated, alpha, center=center, backend=backend), h, 1e-5)


@cases(80)
@given(matrices(least=2), matrices(least=2), ALPHAS, BACKEND)
def test_entropy_adds_up_over_kronecker_products(x, y, alpha, backend):
    x, y = x[:7, :9], y[:6, :5]
    for normalize in (True, False):
        options = {"alpha": alpha, "normalize": normalize, "backend": backend}
        total = fast_matrix_entropy(torch.kron(x, y), **options)
        close(total, fast_matrix_entropy(x, **options) + fast_matrix_entropy(y, **options), 1e-5)


@cases(100)
@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=30), ALPHAS, SCALES, BACKEND)
def test_known_spectra(weights, alpha, scale, backend):
    lam = torch.tensor(weights, dtype=torch.float64)
    z = torch.diag(lam.sqrt())
    p = lam / lam.sum()
    if alpha == 1:
        expected = torch.special.entr(p).sum()
    elif math.isinf(alpha):
        expected = -p.max().log()
    else:
        expected = p.pow(alpha).sum().log() / (1 - alpha)
    tall = torch.cat([z, torch.zeros(3, len(weights), dtype=z.dtype)])
    for y in (z, tall, tall.mT):
        close(fast_matrix_entropy(y, alpha, normalize=False, backend=backend), expected, 1e-11)
        rate = fast_coding_rate(y, scale, normalize=False, backend=backend)
        close(rate, (scale * lam).log1p().sum(), 1e-12)


@cases(80)
@given(matrices(), st.booleans(), st.booleans(), BACKEND)
def test_coding_rate_grows_with_the_scale_and_less_than_it(z, normalize, center, backend):
    options = {"normalize": normalize, "center": center, "backend": backend}
    scales = (1e-3, 0.1, 0.5, 1.0, 2.0, 30.0, 1e3)
    rates = [fast_coding_rate(z, scale, **options).item() for scale in scales]
    for (c, low), (e, high) in pairwise(zip(scales, rates, strict=True)):
        slack = 1e-11 * (1 + high)
        assert -slack <= low <= high + slack <= e / c * low + 2 * slack * e / c
    assert rates[3] <= fast_gram(z, **options).diagonal().sum().item() + 1e-10  # log det <= trace


@cases(80)
@given(matrices(), ALPHAS, SCALES, BACKEND)
def test_both_sides_have_one_spectrum(z, alpha, scale, backend):
    """Sylvester: without row operations, z and its transpose are the same matrix to the methods."""
    options = {"normalize": False, "backend": backend}
    h = fast_matrix_entropy(z, alpha, **options)
    close(fast_matrix_entropy(z.mT, alpha, **options), h, tolerance(alpha))
    close(fast_coding_rate(z.mT, scale, **options), fast_coding_rate(z, scale, **options), 1e-8)
    samples, features_side = (
        fast_gram(z, side=side, **options) for side in ("samples", "features")
    )
    close(fast_gram(z.mT, side="samples", **options), features_side)
    close(samples.diagonal().sum(), features_side.diagonal().sum())


@cases(100)
@given(matrices(), ALPHAS, SCALES, st.booleans(), st.booleans(), SEEDS, BACKEND)
def test_mask_equals_dropping_rows(z, alpha, scale, normalize, center, seed, backend):
    mask = torch.rand(z.shape[0], generator=torch.Generator().manual_seed(seed)) > 0.4
    options = {"normalize": normalize, "center": center, "backend": backend}
    kept = z[mask]
    assume(not center or fast_gram(kept, **options).diagonal().sum() > 1e-6)
    close(
        fast_matrix_entropy(z, alpha, mask=mask, **options),
        fast_matrix_entropy(kept, alpha, **options),
        1e-5,
    )
    rate = fast_coding_rate(kept, scale, **options)
    close(fast_coding_rate(z, scale, mask=mask, **options), rate, 1e-8)
    side = fast_gram(kept, side="features", **options)
    close(fast_gram(z, side="features", mask=mask, **options), side, 1e-9)


@cases(60)
@given(matrices(), SCALES, BACKEND)
def test_centring_equals_centring_by_hand(z, scale, backend):
    x = torch.nn.functional.normalize(z, dim=-1)
    by_hand = x - x.mean(0)
    for side in ("samples", "features"):
        g = fast_gram(z, side=side, center=True, backend=backend)
        close(g, fast_gram(by_hand, side=side, normalize=False, backend=backend), 1e-12)
    rate = fast_coding_rate(by_hand, scale, normalize=False, backend=backend)
    close(fast_coding_rate(z, scale, center=True, backend=backend), rate, 1e-8)


@cases(60)
@given(matrices(), ALPHAS, st.integers(-60, 60), BACKEND)
def test_entropy_does_not_see_a_common_factor(z, alpha, exponent, backend):
    for normalize in (True, False):
        h = fast_matrix_entropy(z, alpha, normalize=normalize, backend=backend)
        scaled = fast_matrix_entropy(z * 2.0**exponent, alpha, normalize=normalize, backend=backend)
        close(scaled, h, tolerance(alpha))


@cases(60)
@given(matrices(kinds=("gaussian", "collapsed", "rank3", "duplicates")), ALPHAS, BACKEND)
def test_gradient_is_orthogonal_to_what_changes_nothing(z, alpha, backend):
    """Scaling a row (normalised) or the matrix (not): the derivative along it is zero."""
    assume(alpha >= 1)
    for normalize in (True, False):
        z = z.detach().requires_grad_()
        fast_matrix_entropy(z, alpha, normalize=normalize, backend=backend).backward()
        along = (z.grad * z).detach()
        size = along.abs().sum() + 1
        along = along.sum(-1) if normalize else along.sum()
        close(along, torch.zeros_like(along), 1e-9 * size.item())
        z.grad = None


QUANTITY = st.one_of(
    ALPHAS.map(entropy), SCALES.map(coding_rate), st.sampled_from(("samples", "features")).map(gram)
)


@st.composite
def strided_features(draw):
    """(..., n, d) of any dtype and strides: a window of a larger tensor, its axes permuted."""
    batch = draw(st.lists(st.integers(0, 3), max_size=2))
    shape = [*batch, draw(st.integers(0, 20)), draw(st.integers(0, 20))]
    steps = [draw(st.integers(1, 3)) for _ in shape]
    order = draw(st.permutations(range(len(shape))))
    whole = [size * step + 1 for size, step in zip(shape, steps, strict=True)]
    kind = draw(st.sampled_from(("gaussian", "collapsed", "zero rows", "rank3")))
    dtype = draw(st.sampled_from(DTYPES))
    z = features(kind, *(whole[i] for i in order), dtype=dtype, seed=draw(SEEDS))
    z = z.permute([order.index(i) for i in range(len(shape))])
    z = z[tuple(slice(0, size * step, step) for size, step in zip(shape, steps, strict=True))]
    assert list(z.shape) == shape
    return z


@cases(250)
@given(strided_features(), QUANTITY, st.booleans(), st.booleans(), st.booleans(), SEEDS)
def test_fuzz_against_the_reference(z, q, normalize, center, masked, seed):
    """The accuracy rule on whatever the generator finds, values and, where smooth, gradients."""
    rows = {"normalize": normalize, "center": center}
    if masked:
        generator = torch.Generator().manual_seed(seed)
        rows["mask"] = torch.rand(z.shape[:-1], generator=generator) > 0.3
    # Orders below 1 have no derivative at zero eigenvalues, infinite order none at a tie; centring
    # rows that are equal leaves rounding alone, which has an entropy of its own. (Nothing is left
    # of rows that are the same numbers; parallel ones may differ once divided by their norms.)
    if q.kind == "entropy" and center:

        def energy(**options):
            g = gram("features").truth(z, **rows | options)
            return g.diagonal(dim1=-2, dim2=-1).sum(-1)

        same = energy(normalize=False) == 0
        assume((same | (energy() > 1e-8 * energy(center=False))).all())
    need_grad = q.kind != "entropy" or 1 <= q.parameter < math.inf
    check(q, z, need_grad=need_grad, **rows)
