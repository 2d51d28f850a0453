"""Values and gradients of rows on several ranks are those of all rows on one."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from mmae_fast import (
    effective_rank,
    fast_coding_rate,
    fast_gram,
    fast_matrix_entropy,
    information,
    losses,
    reference,
)

from .accuracy import coding_rate, entropy, expected, features, run
from .ranks import (
    GATHERED,
    REDUCED,
    WORLDS,
    Failure,
    assert_close,
    cotangent,
    own_rows,
    sizes_of,
    value_and_grads,
)

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


def inputs(name, shape):
    """Views, and the arguments with an entry per row."""
    views = [features("gaussian", *shape, dtype=torch.float64, seed=seed) for seed in (0, 1)]
    rows = {}
    if name == "coding_rate_reduction":
        rows["labels"] = torch.arange(shape[-2]).expand(shape[:-1]) % 3
    return views[: 2 if name in TWO_VIEWS else 1], rows


def call_of(name, options, group=None, grad_scale="mean"):
    shared = {"process_group": group, "grad_scale": grad_scale}
    if name in KINDS:
        return losses.MatrixEntropyRegularizer(KINDS[name], 0.5, **options, **shared)
    return partial(ALL[name], **options, **shared)


def on_rank(group, rank, name, options, views, rows, sizes, grad_scale):
    views, rows = own_rows(rank, views, rows, sizes)
    return value_and_grads(call_of(name, options, group, grad_scale), views, rows)


def check(ranks, name, options, shape, grad_scale="mean", tolerance=1e-9, singular=False):
    views, rows = inputs(name, shape)
    mask = options.get("mask")
    options = {key: value for key, value in options.items() if key != "mask"}
    if mask is not None:
        rows["mask"] = mask
    one, one_grads = value_and_grads(call_of(name, options), views, rows)
    for world in WORLDS:
        sizes = sizes_of(shape[-2], world)
        results = ranks(on_rank, world, name, options, views, rows, sizes, grad_scale)
        for rank, result in enumerate(results):
            assert not isinstance(result, Failure), (world, rank, result)
            value, grads = result
            assert_close(value, one, tolerance, one.abs().max(), (world, rank))
            if singular:
                continue
            factor = world if grad_scale == "mean" else 1
            own, _ = own_rows(rank, one_grads, {}, sizes)
            for grad, part, whole in zip(grads, own, one_grads, strict=True):
                largest = factor * whole.abs().max()
                assert_close(grad, factor * part, tolerance, largest, (world, rank))


@pytest.mark.parametrize("shape", [REDUCED, GATHERED], ids=["reduced", "gathered"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("options", ROWS, ids=str)
@pytest.mark.parametrize("name", ONE_VIEW)
def test_one_view(ranks, name, options, masked, shape):
    # A zero eigenvalue, where the gradient of this order is not determined.
    zero = masked or "center" in options
    singular = shape == GATHERED and name == "entropy-0.5" and zero
    if masked:
        mask = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(1)) > 0.2
        options = options | {"mask": mask}
    check(ranks, name, options, shape, singular=singular)


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


@pytest.mark.parametrize("shape", [(2, 130, 16), (2, 40, 16)], ids=["reduced", "gathered"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "q", [coding_rate(0.7), coding_rate(1e6), entropy(1.0), entropy(2.0), entropy(3.0)], ids=str
)
def test_low_precision_under_autocast(ranks, q, dtype, center, shape):
    """The rule of accuracy.py, as for one process; and values to 1e-6 of those of one process."""
    z = features("gaussian", *shape, dtype=dtype)
    truth, grad_out, value_allowed, grad_allowed = expected(q, z, {"center": center})
    one = q.fast(z, "auto", center=center)
    for world in (2, 3):
        sizes = sizes_of(shape[-2], world)
        results = ranks(accuracy_on_rank, world, q, center, z, grad_out, sizes)
        assert all(torch.equal(value, results[0][0]) for value, _ in results)
        value, grad = results[0][0], torch.cat([grad for _, grad in results], -2)
        assert value.dtype == torch.float32 and grad.dtype == dtype
        torch.testing.assert_close(value, one, rtol=1e-6, atol=0)
        assert ((value.double() - truth.value).abs() <= value_allowed).all()
        error = (grad.double() / world - truth.grad).abs().amax((-2, -1))
        assert (error <= grad_allowed).all(), (world, error / grad_allowed)


def test_large_coding_rate_of_singular_features(ranks):
    """Rounding of a float32 Gram matrix would be counted as directions: float64 takes over."""
    z = features("rank3", 130, 16)
    one = fast_coding_rate(z, 1e6)
    truth = reference.coding_rate(z.double(), 1e6)
    torch.testing.assert_close(one.double(), truth, rtol=1e-6, atol=0)
    for value, _ in ranks(accuracy_on_rank, 3, coding_rate(1e6), False, z, None, [50, 0, 80]):
        torch.testing.assert_close(value, one, rtol=1e-6, atol=0)


def accuracy_on_rank(group, rank, q, center, z, grad_out, sizes):
    (own,), _ = own_rows(rank, [z], {}, sizes)
    with torch.autocast("cpu", torch.bfloat16):
        return run(lambda z: q.fast(z, "auto", center=center, process_group=group), own, grad_out)


# --------------------------------------------------------------------------------------------------
# Published gradients


def test_published_gradients_of_two_ranks(ranks):
    with np.load(GOLDEN / "tcr_ranks.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file.files}
    z = torch.cat([golden["rank0_z"], golden["rank1_z"]])
    sizes = [len(golden["rank0_z"]), len(golden["rank1_z"])]
    results = ranks(on_rank, int(golden["world_size"]), "tcr", {"mu": 1.0}, [z], {}, sizes, "sum")
    for rank, (value, (grad,)) in enumerate(results):
        torch.testing.assert_close(value, golden["value"], rtol=1e-5, atol=1e-5)
        published = golden[f"rank{rank}_grad"] * cotangent(value)
        torch.testing.assert_close(grad, published, rtol=1e-5, atol=1e-8)


# --------------------------------------------------------------------------------------------------
# Models whose gradients are averaged


def model_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5)).double()
    return model, features("gaussian", 46, 6, dtype=torch.float64)


def objective(z, rows, group=None):
    """A sum over samples, which averaging turns into a mean, and two terms of the global batch."""
    regularizer = losses.MatrixEntropyRegularizer("tcr", 0.3, process_group=group)
    pair = losses.info_nce_loss(z, z.flip(-1), process_group=group)
    return z.square().sum() / rows + regularizer(z) + 0.1 * pair


def trained_on_rank(group, rank, wrap, compiled, sizes):
    model, x = model_and_data()
    (own,), _ = own_rows(rank, [x], {}, sizes)
    if wrap == "ddp":
        model = nn.parallel.DistributedDataParallel(model, process_group=group)
    else:
        mesh = DeviceMesh.from_group(group, "cpu")
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
    step = lambda x: objective(model(x), sum(sizes) / len(sizes), group)  # noqa: E731
    if compiled:
        step = torch.compile(step, backend="aot_eager")
    loss = step(own)
    loss.backward()
    grads = [p.grad.full_tensor() if wrap == "fsdp" else p.grad for p in model.parameters()]
    names = [name.removeprefix("module.") for name, _ in model.named_parameters()]
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_averaged_gradients_are_those_of_one_process(ranks, wrap, compiled):
    model, x = model_and_data()
    objective(model(x), len(x)).backward()
    for world in (2, 3):
        results = ranks(trained_on_rank, world, wrap, compiled, sizes_of(len(x), world))
        for grads in results:
            assert not isinstance(grads, Failure), grads
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# torch.compile, derivatives


def compiled_on_rank(group, rank, z, sizes):
    (own,), _ = own_rows(rank, [z], {}, sizes)

    def function(z):
        return 2 * fast_matrix_entropy(3 * z, center=True, process_group=group)

    torch._dynamo.reset()
    compiled = value_and_grads(torch.compile(function, backend="aot_eager"), [own], {})
    eager = value_and_grads(function, [own], {})
    try:
        torch.compile(function, backend="aot_eager", fullgraph=True)(own)
    except Exception as error:
        return compiled, eager, str(error)


@pytest.mark.parametrize("shape", [REDUCED, GATHERED], ids=["reduced", "gathered"])
def test_compile(ranks, shape):
    """A graph break, with the eager result; no single graph, and the reason is named."""
    z = features("gaussian", *shape, dtype=torch.float64)
    for compiled, eager, error in ranks(compiled_on_rank, 3, z, sizes_of(shape[-2], 3)):
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-15)
        assert "the ranks compare their arguments on the host" in error


def second_derivative_on_rank(group, rank, shape):
    z = features("gaussian", *shape, dtype=torch.float64).requires_grad_()
    value = fast_coding_rate(z, 1.0, process_group=group)
    (grad,) = torch.autograd.grad(value, z, create_graph=True)
    grad.square().sum().backward()


@pytest.mark.parametrize("shape", [(20, 4), (3, 4)], ids=["reduced", "gathered"])
def test_no_second_derivative(ranks, shape):
    for failure in ranks(second_derivative_on_rank, 2, shape):
        assert failure.kind == "NotImplementedError"
        assert "second derivative is not offered with process_group" in failure.message


def transformed_on_rank(group, rank):
    z = features("gaussian", 2, 4, 3)
    torch.vmap(partial(fast_coding_rate, scale=1.0, process_group=group))(z)


def test_no_transforms(ranks):
    for failure in ranks(transformed_on_rank, 2):
        assert failure.kind == "NotImplementedError" and "torch.func" in failure.message
