"""Derivatives of the functions of two views and of matrices; torch.compile and torch.func."""

import math
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from mmae_fast import fast_gram
from mmae_fast.information import (
    joint_entropy,
    matrix_cross_entropy,
    matrix_kl,
    mutual_information,
    rbf_gram,
)

from .accuracy import BACKENDS
from .pairs import ALPHAS, ROWS, run_pair, views


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradcheck(alpha, rows, backend):
    for d1, d2 in ((3, 9), (7, 7)):
        z1, z2 = (z.requires_grad_() for z in views(2, 5, d1, d2=d2))
        masks = [None]
        if alpha in (2.0, 3.0, math.inf):  # smooth at the zero eigenvalues that a mask makes
            masks.append(torch.tensor([1, 1, 0, 1, 1]).bool().expand(2, 5))
        for mask in masks:
            function = partial(joint_entropy, alpha=alpha, mask=mask, backend=backend, **rows)
            assert gradcheck(function, (z1, z2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_gradgradcheck(rows, backend):
    for d1, d2, mask in ((2, 5, None), (4, 3, torch.tensor([True, False, True, True]))):
        z = (z.requires_grad_() for z in views(4, d1, d2=d2))
        assert gradgradcheck(
            partial(joint_entropy, alpha=2.0, mask=mask, backend=backend, **rows), tuple(z)
        )


def symmetric(x):
    return (x + x.mT) / 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradcheck_of_a_ready_gram_matrix(alpha, backend):
    k1, k2 = (fast_gram(z, side="samples").requires_grad_() for z in views(2, 4, 6))

    def function(x, y):
        options = {"from_gram": True, "backend": backend}
        return mutual_information(symmetric(x), symmetric(y), alpha, **options)

    assert gradcheck(function, (k1, k2))
    if alpha == 2:
        assert gradgradcheck(function, (k1, k2))


@pytest.mark.parametrize("from_gram", [False, True])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0, math.inf])
def test_no_second_derivative_of_other_orders(alpha, from_gram):
    z1, z2 = (fast_gram(z).requires_grad_() for z in views(4, 7))
    h = joint_entropy(z1, z2, alpha, from_gram=from_gram)
    (grad,) = torch.autograd.grad(h, z1, create_graph=True)
    with pytest.raises(NotImplementedError, match=rf"alpha = 2 only, got alpha = {alpha}"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_divergences(backend):
    p, q = (fast_gram(z).requires_grad_() for z in views(2, 4, 6))
    for function in (matrix_cross_entropy, matrix_kl):
        assert gradcheck(lambda x, y: function(symmetric(x), symmetric(y), backend=backend), (p, q))  # noqa: B023
    value = matrix_cross_entropy(p, q, backend=backend).sum()
    (grad,) = torch.autograd.grad(value, q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative of a matrix logarithm"):
        grad.sum().backward()


def test_operators_without_weight_have_no_gradient():
    z1, z2 = (z.requires_grad_() for z in views(4, 4))
    ops = torch.ops.mmae_fast
    for value in (
        ops.joint_entropy_fwd(z1, z2, None, 2.0, True, False, False, "torch")[0],
        ops.gram_entropy_fwd(z1, 2.0, False, "torch")[0],
        ops.gram_coding_rate_fwd(z1, 2.0, False, "torch")[0],
    ):
        with pytest.raises(RuntimeError, match="_fwd: a gradient needs need_weight=True"):
            value.backward()


@pytest.mark.parametrize(
    ("backend", "requires_grad"), [("cpu", False), ("cpu", True), ("torch", False)]
)
def test_opcheck(backend, requires_grad):
    ops = torch.ops.mmae_fast
    mask = torch.arange(5).expand(2, 5) % 4 != 1
    for d1, d2, m, *rows in [(7, 3, None, True, False), (3, 4, mask, True, True)]:
        z1, z2 = views(2, 5, d1, d2=d2, dtype=torch.float32)
        weights = ops.joint_entropy_fwd(z1, z2, m, 2.0, *rows, True, backend)[1:]
        assert all(weight.shape == (2, 5, 5) for weight in weights)
        z1, z2 = (z.requires_grad_(requires_grad) for z in (z1, z2))
        one = torch.ones(2)
        arguments = (z1, z2, m, 2.0 if m is None else 1.0, *rows)
        torch.library.opcheck(ops.joint_entropy_fwd.default, (*arguments, True, backend))
        if not requires_grad:
            torch.library.opcheck(ops.joint_entropy_fwd.default, (*arguments, False, backend))
        arguments = (one, z1, z2, m, *weights, 2.0, *rows, backend)
        torch.library.opcheck(ops.joint_entropy_bwd.default, arguments)
    k = fast_gram(z1.detach(), side="samples")
    weight = ops.gram_entropy_fwd(k, 2.0, True, backend)[1]
    inverse = ops.gram_coding_rate_fwd(k, 2.0, True, backend)[1]
    log = ops.matrix_log_fwd(k, backend)
    k = k.requires_grad_(requires_grad)
    for need in (True,) if requires_grad else (True, False):
        torch.library.opcheck(ops.gram_entropy_fwd.default, (k, 1.0, need, backend))
        torch.library.opcheck(ops.gram_coding_rate_fwd.default, (k, 2.0, need, backend))
    torch.library.opcheck(ops.gram_entropy_bwd.default, (one, k, None, weight, 2.0))
    torch.library.opcheck(ops.gram_coding_rate_bwd.default, (one, k, None, inverse, 2.0))
    torch.library.opcheck(ops.matrix_log_fwd.default, (k, backend))
    torch.library.opcheck(ops.matrix_log_bwd.default, (k.detach(), *log, backend))


def total(x, y):  # of everything
    value = mutual_information(x, y, 1.0, center=True).sum()
    value = value + joint_entropy(rbf_gram(x), rbf_gram(y), 2.0, from_gram=True).sum()
    p, q = (fast_gram(z, side="features") + torch.eye(4) for z in (x, y))
    return value + matrix_kl(p, q).sum()


# The default compiler would write minutes of C++ for `total`; the graph is the same.
@pytest.mark.parametrize(
    ("function", "compiler"), [(joint_entropy, "inductor"), (total, "aot_eager")]
)
def test_compile(function, compiler):
    """One graph, forward and backward, with the eager result; and again for another batch size."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: function(x, y).sum(), fullgraph=True, backend=compiler)
    for batch in (2, 3):
        z = views(batch, 6, 4, dtype=torch.float32)
        one = run_pair(compiled, *z, torch.ones(()))
        two = run_pair(lambda x, y: function(x, y).sum(), *z, torch.ones(()))
        torch.testing.assert_close(one[0], two[0])
        for a, b in zip(one[1], two[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_func_transforms():
    z1, z2 = views(3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(
        torch.vmap(mutual_information)(z1, z2), mutual_information(z1, z2), rtol=1e-12, atol=1e-12
    )
    shared = torch.vmap(joint_entropy, in_dims=(0, None))(z1, z2[0])
    torch.testing.assert_close(shared, joint_entropy(z1, z2[:1].expand(3, 5, 4)))
    _, expected = run_pair(total_of_rows, z1, z2, torch.ones(3))
    actual = torch.vmap(torch.func.grad(total_of_rows, argnums=(0, 1)))(z1, z2)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def total_of_rows(x, y):
    p, q = (fast_gram(z, side="features") + torch.eye(4).double() for z in (x, y))
    return mutual_information(x, y, 2.0) + matrix_kl(p, q)
