"""Derivatives of every order, and the transforms of PyTorch that build on them."""

import math
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from mmae_fast import fast_coding_rate, fast_gram, fast_matrix_entropy

from .accuracy import BACKENDS, coding_rate, entropy, features, gram, run

ALPHAS = (0.5, 1.0, 1.01, 2.0, 3.0, 5.0, math.inf)
QUANTITIES = [*map(coding_rate, (0.1, 10.0)), *map(entropy, ALPHAS)]
QUANTITIES += [gram("samples"), gram("features")]
TWICE = [coding_rate(0.1), coding_rate(10.0), entropy(2.0), gram("samples"), gram("features")]
ROWS = [{}, {"center": True}, {"normalize": False}, {"normalize": False, "center": True}]
SIDES = [(2, 4, 7), (2, 7, 4)]


def name(q):
    return f"{q.kind}-{q.parameter}"


def smooth(q, shape, rows, masked):
    """Zero eigenvalues (samples side, centred or masked) leave only integer orders smooth."""
    singular = shape[-2] < shape[-1] and (rows.get("center") or masked)
    return q.kind != "entropy" or not singular or q.parameter in (2.0, 3.0, 5.0, math.inf)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("q", QUANTITIES, ids=name)
def test_gradcheck(q, rows, masked, backend):
    for shape in SIDES:
        if not smooth(q, shape, rows, masked):
            continue
        z = features("gaussian", *shape, dtype=torch.float64).requires_grad_()
        mask = torch.arange(shape[1]).expand(shape[:2]) % 4 != 1 if masked else None
        assert gradcheck(partial(q.fast, backend=backend, mask=mask, **rows), z)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("q", TWICE, ids=name)
def test_gradgradcheck(q, rows, masked, backend):
    for shape in [(2, 3, 4), (2, 4, 3)]:
        z = features("gaussian", *shape, dtype=torch.float64).requires_grad_()
        mask = torch.arange(shape[1]).expand(shape[:2]) % 4 != 1 if masked else None
        assert gradgradcheck(partial(q.fast, backend=backend, mask=mask, **rows), z)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.01, 3.0, math.inf])
def test_no_second_derivative_of_other_orders(alpha, backend):
    z = features("gaussian", 4, 7, dtype=torch.float64).requires_grad_()
    h = fast_matrix_entropy(z, alpha, backend=backend)
    (grad,) = torch.autograd.grad(h, z, create_graph=True)
    with pytest.raises(NotImplementedError, match=rf"alpha = 2 only, got alpha = {alpha}"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_nobody_is_none(backend):
    """mask and arguments take no gradient; a value that nobody uses costs no backward pass."""
    z = features("gaussian", 4, 7).requires_grad_()
    w = features("gaussian", 4, 7, seed=1).requires_grad_()
    unused = fast_coding_rate(z, 1.0, backend=backend)
    used = fast_coding_rate(w, 1.0, backend=backend)
    assert unused.requires_grad
    used.backward()
    assert z.grad is None and w.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q", [coding_rate(1.0), entropy(1.0), entropy(2.0), gram("samples")])
def test_gradients_accumulate_and_scale(q, backend):
    z = features("gaussian", 3, 4, 7, dtype=torch.float64)
    value = q.fast(z, backend)
    cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).double()
    function = partial(q.fast, backend=backend)
    _, single = run(function, z, cotangent)
    _, triple = run(lambda y: 2 * function(y) + function(y), z, cotangent)
    torch.testing.assert_close(triple, 3 * single)


@pytest.mark.parametrize("op", ["coding_rate_fwd", "matrix_entropy_fwd"])
def test_operator_without_weight_has_no_gradient(op):
    z = features("gaussian", 4, 7).requires_grad_()
    value, weight = getattr(torch.ops.mmae_fast, op)(z, None, 2.0, True, False, False, "cpu")
    assert weight.numel() == 0
    with pytest.raises(RuntimeError, match=f"{op}: a gradient needs need_weight=True"):
        value.backward()


# --------------------------------------------------------------------------------------------------
# torch.library


def operator_calls(backend, requires_grad):
    """(operator, arguments) for every operator of the library, on both sides, with mask and not."""
    ops = torch.ops.mmae_fast
    mask = torch.arange(7).expand(2, 7) % 4 != 1
    for shape, m, *rows in [((2, 4, 7), None, True, False), ((2, 7, 4), mask, True, True)]:
        z = features("gaussian", *shape)
        value, k = torch.ones(2), min(shape[1:])
        samples = not requires_grad
        parts = ops.gram_fwd(z, m, samples, *rows, backend)
        cotangent = torch.ones_like(parts[0])
        x = z.clone().requires_grad_(requires_grad)
        yield ops.gram_fwd, (x, m, samples, *rows, backend)
        yield ops.gram_bwd, (cotangent, x, m, *parts, samples, *rows, backend)
        for forward, backward, parameter in [
            (ops.coding_rate_fwd, ops.coding_rate_bwd, 0.5),
            (ops.matrix_entropy_fwd, ops.matrix_entropy_bwd, 2.0),
        ]:
            weight = forward(z, m, parameter, *rows, True, backend)[1]
            assert weight.shape == (2, k, k)
            yield forward, (x, m, parameter, *rows, True, backend)
            if not requires_grad:
                yield forward, (x, m, parameter, *rows, False, backend)
            yield backward, (value, x, m, weight, parameter, *rows, backend)
        yield ops.matrix_entropy_fwd, (x, m, 1.0, *rows, True, backend)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, requires_grad):
    seen = set()
    for op, arguments in operator_calls(backend, requires_grad):
        torch.library.opcheck(op.default, arguments)
        seen.add(op.default.name().split("::")[1])
    public = {"gram", "coding_rate", "matrix_entropy"}
    assert seen == {f"{noun}_{way}" for noun in public for way in ("fwd", "bwd")}


@pytest.mark.parametrize("q", [coding_rate(1.0), entropy(1.0), entropy(2.0), gram("features")])
@pytest.mark.parametrize("masked", [False, True])
def test_compile(q, masked):
    """One graph, forward and backward, with the eager result; and again for another batch size."""
    torch._dynamo.reset()
    function = partial(q.fast, backend="cpu", center=True)
    compiled = torch.compile(lambda z, mask: (2 * function(z, mask=mask)).sum(), fullgraph=True)
    for batch in (2, 3):  # the second call recompiles for any batch size
        mask = torch.arange(5).expand(batch, 5) % 4 != 1 if masked else None
        z = features("gaussian", batch, 5, 9).requires_grad_()
        expected = features("gaussian", batch, 5, 9).requires_grad_()
        value = compiled(z, mask)
        value.backward()
        (2 * function(expected, mask=mask)).sum().backward()
        torch.testing.assert_close(value, (2 * function(expected.detach(), mask=mask)).sum())
        torch.testing.assert_close(z.grad, expected.grad)


# --------------------------------------------------------------------------------------------------
# torch.func


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q", QUANTITIES, ids=name)
def test_vmap(q, backend):
    z = features("gaussian", 3, 2, 4, 7)
    function = partial(q.fast, backend=backend)
    expected = function(z)
    assert torch.equal(torch.vmap(function)(z), expected)
    assert torch.equal(torch.vmap(torch.vmap(function))(z), expected)
    moved = torch.vmap(function, in_dims=2)(z.movedim(0, 2).contiguous())
    torch.testing.assert_close(moved, expected)
    mask = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0)) > 0.3
    masked = torch.vmap(lambda y, m: function(y, mask=m))(z, mask)
    assert torch.equal(masked, function(z, mask=mask))
    shared = torch.vmap(lambda y: function(y, mask=mask[0]))(z)  # a mask without the dimension
    assert torch.equal(shared, function(z, mask=mask[:1].expand(3, 2, 4)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_of_size_zero_and_one(backend):
    z = features("gaussian", 1, 4, 7)
    function = partial(fast_coding_rate, scale=1.0, backend=backend)
    assert torch.equal(torch.vmap(function)(z), function(z))
    assert torch.vmap(function)(z.expand(1, 4, 7)).shape == (1,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q", [coding_rate(1.0), entropy(1.0), entropy(2.0)], ids=name)
def test_func_grad(q, backend):
    z = features("gaussian", 3, 4, 7, dtype=torch.float64)
    function = partial(q.fast, backend=backend)
    expected = run(function, z, torch.ones(3))[1]
    torch.testing.assert_close(torch.func.grad(lambda y: function(y).sum())(z), expected)
    torch.testing.assert_close(torch.vmap(torch.func.grad(function))(z), expected)
    value, pull = torch.func.vjp(function, z)
    torch.testing.assert_close(value, function(z))
    torch.testing.assert_close(pull(torch.ones(3, dtype=z.dtype))[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad_of_gram(backend):
    z = features("gaussian", 4, 7, dtype=torch.float64)
    for side in ("samples", "features"):
        function = lambda y: fast_gram(y, side=side, backend=backend).square().sum()  # noqa: B023, E731
        y = z.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(y), y)
        torch.testing.assert_close(torch.func.grad(function)(z), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q", [coding_rate(1.0), entropy(2.0)], ids=name)
def test_func_hessian_vector_product(q, backend):
    z = features("gaussian", 3, 5, dtype=torch.float64)
    direction = features("gaussian", 3, 5, dtype=torch.float64, seed=1)
    function = partial(q.fast, backend=backend)
    gradient = torch.func.grad(function)
    actual = torch.func.grad(lambda y: (gradient(y) * direction).sum())(z)
    step = 1e-5
    expected = (gradient(z + step * direction) - gradient(z - step * direction)) / (2 * step)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_forward_mode_derivatives_are_refused(grad_enabled):
    z = features("gaussian", 4, 7)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad_enabled):
        dual = forward_ad.make_dual(z, torch.ones_like(z))
        with pytest.raises(NotImplementedError, match="jvp"):
            fast_matrix_entropy(dual, 2)
        with pytest.raises(NotImplementedError, match="jvp"):
            fast_gram(dual)


def test_a_dispatch_mode_sees_the_operators():
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    z = features("gaussian", 2, 4, 7).requires_grad_()
    with Recorder():
        fast_coding_rate(z, 0.5).sum().backward()
    assert "mmae_fast.coding_rate_fwd.default" in seen
    assert "mmae_fast.coding_rate_bwd.default" in seen


def test_fake_tensors_have_shapes_and_gradients():
    with FakeTensorMode() as mode:
        z = mode.from_tensor(torch.zeros(2, 4, 7)).requires_grad_()
        h = fast_matrix_entropy(z)
        assert isinstance(h, FakeTensor) and h.shape == (2,)
        (grad,) = torch.autograd.grad(h.sum(), z)
    assert isinstance(grad, FakeTensor) and grad.shape == z.shape
    assert isinstance(fast_gram(z.detach()), FakeTensor)  # outside the mode too
