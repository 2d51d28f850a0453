"""Values and gradients of rows on several ranks are those of all rows on one."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from mmae_fast import (
    distributed,
    effective_rank,
    fast_coding_rate,
    fast_gram,
    fast_matrix_entropy,
    information,
    losses,
    reference,
)
from mmae_fast.backends import dispatch

from .accuracy import coding_rate, entropy, expected, features, run
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


def inputs(name, shape):
    """Views, and the arguments with an entry per row."""
    views = [features("gaussian", *shape, dtype=torch.float64, seed=seed) for seed in (0, 1)]
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


def on_rank(group, rank, name, options, views, rows, sizes, grad_scale):
    views, rows = own_rows(rank, views, rows, sizes)
    return value_and_grads(call_of(name, options, group, grad_scale), views, rows)


def assert_close(actual, expected, tolerance, largest, what):
    """Within tolerance of the largest entry of the whole tensor."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    if expected.numel():
        error = (actual - expected).abs().max() / largest
        assert error <= tolerance, (what, float(error))


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
# What is communicated


def count_on_rank(group, rank, z, sizes):
    """Bytes that this rank puts into collectives: forward pass of a value, then backward."""
    (own,), _ = own_rows(rank, [z], {}, sizes)
    own.requires_grad_()
    positions = {"all_reduce": 0, "all_gather": 1, "gather": 0, "broadcast": 0}
    sent = dict.fromkeys(positions, 0)

    def counted(name, position):
        original = getattr(dist, name)

        def collective(*args, **kwargs):
            tensor = args[position]
            sent[name] += tensor.numel() * tensor.element_size()
            return original(*args, **kwargs)

        return collective

    originals = {name: getattr(dist, name) for name in sent}
    for name, position in positions.items():
        setattr(dist, name, counted(name, position))
    try:
        value = fast_coding_rate(own, 1.0, process_group=group)
        forward = dict(sent)
        value.sum().backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return forward, {name: sent[name] - forward[name] for name in sent}


AGREEMENT = {"gather": 16, "broadcast": 32}  # bytes, of two ranks
SILENCE = dict.fromkeys(("all_reduce", "all_gather", *AGREEMENT), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route(ranks, dtype):
    """N = 4d gathers rows in their own dtype, one row more reduces the float32 Gram matrix."""
    d = 6
    for n, forward in [
        (4 * d, {"all_gather": 2 * d * d * dtype.itemsize}),
        (4 * d + 1, {"all_reduce": 4 * d * d}),
    ]:
        z = features("gaussian", n, d, dtype=dtype)
        for sent in ranks(count_on_rank, 2, z, [2 * d, n - 2 * d]):
            assert sent == (SILENCE | AGREEMENT | forward, SILENCE)


def routes_on_rank(group, rank, center, z, sizes):
    (own,), _ = own_rows(rank, [z], {}, sizes)
    results = []
    default = distributed.ROWS_PER_FEATURE
    for limit in (0, 10**9):
        distributed.ROWS_PER_FEATURE = limit
        function = partial(fast_matrix_entropy, center=center, process_group=group)
        results.append(value_and_grads(function, [own], {}))
    distributed.ROWS_PER_FEATURE = default
    return results


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("kind", ["collapsed", "decaying", "zero rows"])
def test_routes_agree_on_hard_features(ranks, kind, center):
    """Nearly collapsed ones above all: centred by the ranks' means, nothing cancels."""
    z = features(kind, 30, 6, dtype=torch.float64)
    for (value, (grad,)), (expected_value, (expected_grad,)) in ranks(
        routes_on_rank, 3, center, z, [10, 0, 20]
    ):
        torch.testing.assert_close(value, expected_value, rtol=1e-9, atol=0)
        largest = expected_grad.abs().max() if expected_grad.numel() else 1
        assert_close(grad, expected_grad, 1e-6, largest, kind)


def strided_on_rank(group, rank, z, sizes):
    (own,), _ = own_rows(rank, [z], {}, sizes)
    wide = torch.stack([own, own], -1).flatten(-2)
    results = []
    for x in (own, own.mT.contiguous().mT, wide[..., ::2]):
        results.append(value_and_grads(partial(fast_gram, process_group=group), [x], {}))
    return results


@pytest.mark.parametrize("shape", [(3, 1), (2, 5, 1), (2, 5, 4), (2, 20, 4)], ids=str)
def test_any_strides(ranks, shape):
    """A single number may have any stride and be contiguous."""
    z = features("gaussian", *shape, dtype=torch.float64)
    for first, *others in ranks(strided_on_rank, 2, z, [1, shape[-2] - 1]):
        for other in others:
            torch.testing.assert_close(other, first)


def empty_on_rank(group, rank, shape):
    z = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    value = fast_matrix_entropy(z, process_group=group)
    value.sum().backward()
    rate = fast_coding_rate(z, 1.0, center=True, process_group=group)
    return value.detach(), rate.detach(), z.grad


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 4, 3), (4, 0), (40, 3)])
def test_nothing_and_zeros(ranks, shape):
    zero = torch.zeros(shape[:-2], dtype=torch.float64)
    for value, rate, grad in ranks(empty_on_rank, 2, shape):
        assert torch.equal(value, zero) and torch.equal(rate, zero)
        assert grad.shape == shape and not grad.any()


def poisoned_on_rank(group, rank, shape, bad):
    z = features("gaussian", *shape, seed=rank)
    if rank == 1:
        z[0, 0, 0] = bad
    z.requires_grad_()
    value = fast_matrix_entropy(z, normalize=False, process_group=group)
    value.sum().backward()
    return value.detach(), z.grad


@pytest.mark.parametrize("shape", [(2, 20, 4), (2, 3, 4)], ids=["reduced", "gathered"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_of_one_rank_is_the_nan_of_all(ranks, bad, shape):
    for value, grad in ranks(poisoned_on_rank, 2, shape, bad):
        assert value.isnan().tolist() == [True, False]
        assert grad[0].isnan().all() and grad[1].isfinite().all()


def scaled_on_rank(group, rank, scale):
    z = features("gaussian", 20, 4, seed=rank) * scale
    return fast_matrix_entropy(z, 2.0, normalize=False, process_group=group)


def test_entropy_does_not_depend_on_the_scale(ranks):
    expected_value = ranks(scaled_on_rank, 2, 1.0)[0]
    for scale in (1e-25, 1e25):
        for value in ranks(scaled_on_rank, 2, scale):
            torch.testing.assert_close(value, expected_value, rtol=1e-6, atol=0)


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


# --------------------------------------------------------------------------------------------------
# One rank's mistake is every rank's error

Z = features("gaussian", 7, 4)
MISTAKES = {
    "width": lambda call: call(features("gaussian", 7, 5)),
    "dtype": lambda call: call(Z.double()),
    "batch": lambda call: call(Z[None]),
    "one dimension": lambda call: call(Z[0]),
    "no tensor": lambda call: call([[1.0]]),
    "alpha": lambda call: call(Z, alpha=2.0),
    "wrong alpha": lambda call: call(Z, alpha=-1.0),
    "option": lambda call: call(Z, center=True),
    "mask": lambda call: call(Z, mask=torch.ones(7, dtype=torch.bool)),
    "unknown option": lambda call: call(Z, colour="red"),
    "no argument": lambda call: call(),
    "grad_scale": lambda call: call(Z, grad_scale="sum"),
    "transform": lambda call: torch.vmap(call)(Z[None]),
    "another function": lambda call: effective_rank(
        Z, center=True, process_group=call.keywords["process_group"]
    ),
    "another loss": lambda call: losses.tcr_loss(Z, process_group=call.keywords["process_group"]),
}


def mistaken_on_rank(group, rank, mistake):
    call = partial(fast_matrix_entropy, process_group=group)
    if rank == 1:
        return MISTAKES[mistake](call)
    return call(features("gaussian", 3 + rank, 4))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_one_rank_ends_all(ranks, mistake):
    failures = ranks(mistaken_on_rank, 3, mistake)
    assert {failure.kind for failure in failures} == {"ValueError"}
    assert len(set(failures)) == 1
    message = failures[0].message
    assert "the ranks of process_group must differ in the number of rows n only" in message
    right = (
        "rank 0 (n = 3), 2 (n = 5): fast_matrix_entropy(z=torch.float32 torch.strided cpu [n, 4]"
    )
    assert right in message
    assert message.count("\n  rank") == 2 and "\n  rank 1 (n = " in message


def without_extension_on_rank(group, rank):
    """As where one node's installation has no compiled backend."""
    before = dispatch.EXTENSION_ERROR
    dispatch.EXTENSION_ERROR = "no such file" if rank == 1 else None
    try:
        return fast_coding_rate(Z, 1.0, backend="cpu", process_group=group)
    finally:
        dispatch.EXTENSION_ERROR = before


def test_a_backend_missing_on_one_rank_ends_all(ranks):
    for failure in ranks(without_extension_on_rank, 2):
        assert failure.kind == "ValueError"
        assert "rank 1 (n = 7): " in failure.message
        assert failure.message.endswith("grad_scale='mean', no such file)")


def wrong_on_rank(group, rank, which):
    if which == "sparse":
        fast_coding_rate(torch.eye(3).to_sparse(), 1.0, process_group=group)
    elif which == "int":
        fast_coding_rate(torch.ones(3, 4, dtype=torch.int64), 1.0, process_group=group)
    elif which == "alpha":
        fast_matrix_entropy(torch.ones(30, 4), -1.0, process_group=group)
    elif which == "mask":
        mask = torch.ones(2, dtype=torch.bool)
        fast_matrix_entropy(torch.ones(30, 4), mask=mask, process_group=group)
    elif which == "side":
        fast_gram(torch.ones(30, 4), side="left", process_group=group)
    elif which == "grad_scale":
        losses.tcr_loss(torch.ones(30, 4), process_group=group, grad_scale="average")
    elif which == "from_gram":
        eye = torch.eye(4)
        information.joint_entropy(eye, eye, from_gram=True, process_group=group)
    elif which == "patches":
        losses.emp_ssl_tcr(torch.ones(30, 4), process_group=group)
    elif which == "group":
        fast_gram(torch.ones(3, 4), process_group="world")
    elif which == "not a member":
        other = dist.new_group([1 - rank], use_local_synchronization=True)
        return str(other), fast_gram(
            torch.ones(3, 4), process_group=dist.GroupMember.NON_GROUP_MEMBER
        )


@pytest.mark.parametrize(
    ("which", "kind", "message"),
    [
        ("sparse", "TypeError", "z must be a dense (strided) tensor, got layout torch.sparse_coo"),
        ("int", "TypeError", "z must be float32, float64, bfloat16 or float16, got torch.int64"),
        ("alpha", "ValueError", "alpha must be > 0, got -1.0"),
        ("mask", "ValueError", "mask must have z's shape without its last dimension, (30,), got"),
        ("side", "ValueError", "side must be one of ('auto', 'samples', 'features'), got 'left'"),
        ("grad_scale", "ValueError", "grad_scale must be one of ('mean', 'sum'), got 'average'"),
        ("from_gram", "ValueError", "process_group is not defined for from_gram=True"),
        ("patches", "ValueError", "z must have shape (..., patches, n, d), got (30, 4)"),
        ("group", "TypeError", "torch.distributed.ProcessGroup (or None), got str 'world'"),
        ("not a member", "ValueError", "this rank is not a member of process_group"),
    ],
)
def test_a_mistake_of_all_ranks(ranks, which, kind, message):
    for failure in ranks(wrong_on_rank, 2, which):
        assert failure.kind == kind and message in failure.message


def test_without_init_process_group():
    with pytest.raises(RuntimeError, match=r"needs torch.distributed.init_process_group\(\) first"):
        fast_matrix_entropy(Z, process_group="world")


def test_grad_scale_is_checked_without_a_group():
    with pytest.raises(ValueError, match=r"grad_scale must be one of .*, got 'avg'"):
        fast_matrix_entropy(Z, grad_scale="avg")


NCCL = pytest.param(
    "nccl",
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


@pytest.mark.parametrize(("backend", "device"), [("gloo", "cpu"), NCCL])
@pytest.mark.parametrize("shape", [REDUCED, GATHERED], ids=["reduced", "gathered"])
def test_backend_of_the_group(backend, device, shape):
    """All that NCCL can be asked on one GPU: a group of one rank, through every collective."""
    store = dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        z = features("gaussian", *shape, dtype=torch.float64).to(device)
        for center in (False, True):
            function = partial(fast_matrix_entropy, center=center, normalize=False)
            one = value_and_grads(function, [z], {})
            shared = value_and_grads(partial(function, process_group=dist.group.WORLD), [z], {})
            torch.testing.assert_close(shared, one, rtol=1e-9, atol=1e-12)
    finally:
        dist.destroy_process_group()


def control_on_rank(group, rank):
    """As with a backend that carries no CPU tensors."""
    original = dist.get_backend_config
    dist.get_backend_config = lambda group: "cuda:nccl"
    try:
        first, second = (distributed._control_group(group) for _ in range(2))
    finally:
        dist.get_backend_config = original
    same = dist.get_process_group_ranks(first) == dist.get_process_group_ranks(group)
    return first is second, first is not group, same, distributed._control_group(group) is group


def test_a_group_without_cpu_gets_one_that_has(ranks):
    assert ranks(control_on_rank, 3) == [(True, True, True, True)] * 3
