"""Values and gradients of rows on several ranks are those of all rows on one."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from mmae_fast import (
    effective_rank,
    fast_coding_rate,
    fast_gram,
    fast_matrix_entropy,
    information,
    losses,
)

from .accuracy import features
from .ranks import WORLDS, Failure, Ranks

GOLDEN = Path(__file__).parent / "golden"

ALPHAS = (0.5, 1.0, 2.0, 3.0, math.inf)
ONE_VIEW = {
    **{f"entropy-{alpha}": partial(fast_matrix_entropy, alpha=alpha) for alpha in ALPHAS},
    "entropy-rational": partial(fast_matrix_entropy, method="rational"),
    "coding_rate": partial(fast_coding_rate, scale=0.7),
    "coding_rate-large": partial(fast_coding_rate, scale=1e6),
    "effective_rank": effective_rank,
    "gram": fast_gram,
    "gram-samples": partial(fast_gram, side="samples"),
    "gram-features": partial(fast_gram, side="features"),
}
# Losses that normalise for themselves, of one view and of two.
LOSSES = {
    "tcr": partial(losses.tcr_loss, mu=3.0),
    "tcr-centred": partial(losses.tcr_loss, center=True),
    "uniformity": losses.uniformity_loss,
    "ivne": losses.ivne_loss,
    "emp_ssl": losses.emp_ssl_tcr,
    "rbf_gram": partial(information.rbf_gram, bandwidth=1.5),
    "rbf_gram-median": information.rbf_gram,
}
TWO_VIEWS = {
    "joint_entropy": partial(information.joint_entropy, alpha=1.0),
    "mutual_information": partial(information.mutual_information, alpha=2.0, center=True),
    "conditional_entropy": partial(information.conditional_entropy, alpha=2.0),
    "barlow_twins": losses.barlow_twins_loss,
    "spectral": losses.spectral_contrastive_loss,
    "info_nce": losses.info_nce_loss,
    "matrix_uniformity": losses.matrix_uniformity_loss,
    "matrix_alignment": partial(losses.matrix_alignment_loss, order=None),
}
KINDS = {
    f"regularizer-{kind}": kind for kind in losses.MatrixEntropyRegularizer.KINDS if kind != "none"
}
ALL = ONE_VIEW | LOSSES | TWO_VIEWS | {"coding_rate_reduction": losses.coding_rate_reduction}

ROWS = [{}, {"center": True}, {"normalize": False}, {"normalize": False, "center": True}]
REDUCED, GATHERED = (2, 46, 5), (2, 12, 9)  # shapes of all rows: N > 4d, and not
SHARES = {1: [1.0], 2: [0.35, 0.65], 3: [0.4, 0.0, 0.6], 4: [0.25, 0.35, 0.0, 0.4]}


@pytest.fixture(scope="module")
def ranks():
    started = Ranks()
    yield started
    started.stop()


def sizes_of(n, world):
    sizes = [round(n * share) for share in SHARES[world]]
    sizes[-1] += n - sum(sizes)
    assert sum(sizes) == n and min(sizes) >= 0
    return sizes


def inputs(name, shape, dtype=torch.float64):
    """Views, and the arguments with an entry per row."""
    views = [features("gaussian", *shape, dtype=dtype, seed=seed) for seed in (0, 1)]
    rows = {}
    if name == "coding_rate_reduction":
        rows["labels"] = torch.arange(shape[-2]).expand(shape[:-1]) % 3
    return views[: 2 if name in TWO_VIEWS else 1], rows


def cotangent(value):
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)


def value_and_grads(function, views, rows):
    views = [view.clone().requires_grad_() for view in views]
    value = function(*views, **rows)
    (value * cotangent(value)).sum().backward()
    return value.detach(), [view.grad for view in views]


def call_of(name, options, group=None, grad_scale="mean"):
    shared = {"process_group": group, "grad_scale": grad_scale}
    if name in KINDS:
        return losses.MatrixEntropyRegularizer(KINDS[name], 0.5, **options, **shared)
    return partial(ALL[name], **options, **shared)


def own_rows(rank, views, rows, sizes):
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    return [view[..., own, :] for view in views], {k: x[..., own] for k, x in rows.items()}


def on_rank(group, rank, name, options, views, rows, sizes, grad_scale, autocast=False):
    views, rows = own_rows(rank, views, rows, sizes)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return value_and_grads(call_of(name, options, group, grad_scale), views, rows)


def assert_close(actual, expected, tolerance, largest, what):
    """Within tolerance of the largest entry of the whole tensor."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    if expected.numel():
        error = (actual - expected).abs().max() / largest
        assert error <= tolerance, (what, float(error))


def check(ranks, name, options, shape, grad_scale="mean", tolerance=1e-9, dtype=torch.float64):
    views, rows = inputs(name, shape, dtype)
    mask = options.get("mask")
    options = {key: value for key, value in options.items() if key != "mask"}
    if mask is not None:
        rows["mask"] = mask
    expected, expected_grads = value_and_grads(call_of(name, options), views, rows)
    for world in WORLDS:
        sizes = sizes_of(shape[-2], world)
        results = ranks(on_rank, world, name, options, views, rows, sizes, grad_scale)
        for rank, result in enumerate(results):
            assert not isinstance(result, Failure), (world, rank, result)
            value, grads = result
            assert_close(value, expected, tolerance, expected.abs().max(), (world, rank))
            factor = world if grad_scale == "mean" else 1
            own, _ = own_rows(rank, expected_grads, {}, sizes)
            for grad, part, whole in zip(grads, own, expected_grads, strict=True):
                largest = factor * whole.abs().max()
                assert_close(grad, factor * part, tolerance, largest, (world, rank))


@pytest.mark.parametrize("shape", [REDUCED, GATHERED], ids=["reduced", "gathered"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("options", ROWS, ids=str)
@pytest.mark.parametrize("name", ONE_VIEW)
def test_one_view(ranks, name, options, masked, shape):
    if shape == GATHERED and name == "entropy-0.5" and (masked or "center" in options):
        pytest.skip("a zero eigenvalue: the gradient of this order is not determined")
    if masked:
        mask = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(1)) > 0.2
        options = options | {"mask": mask}
    check(ranks, name, options, shape)


@pytest.mark.parametrize("shape", [REDUCED, GATHERED], ids=["reduced", "gathered"])
@pytest.mark.parametrize("name", [*LOSSES, *TWO_VIEWS, *KINDS, "coding_rate_reduction"])
def test_losses(ranks, name, shape):
    if name == "emp_ssl":
        shape = (2, *shape)
    check(ranks, name, {}, shape)


@pytest.mark.parametrize("shape", [REDUCED, GATHERED], ids=["reduced", "gathered"])
@pytest.mark.parametrize("name", ["entropy-1.0", "coding_rate", "info_nce"])
def test_plain_gradients(ranks, name, shape):
    check(ranks, name, {}, shape, grad_scale="sum")


@pytest.mark.parametrize("shape", [(1, 130, 16), (1, 40, 16)], ids=["reduced", "gathered"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(
    "name", ["entropy-1.0", "entropy-2.0", "entropy-3.0", "coding_rate", "coding_rate-large"]
)
def test_float32(ranks, name, center, shape):
    check(ranks, name, {"center": center}, shape, tolerance=1e-6, dtype=torch.float32)
