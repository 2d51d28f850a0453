"""Operators of two views and of ready symmetric matrices, in the pattern of operators.py.

| operator                  | computes                                    | second derivative |
|---------------------------|---------------------------------------------|-------------------|
| joint_entropy_fwd         | H_alpha of K1 ⊙ K2, a weight for each view  | alpha = 2         |
| gram_entropy_fwd          | H_alpha of a ready Gram matrix, and dH/dG   | alpha = 2         |
| gram_rational_entropy_fwd | the same for alpha = 1, by rational.py      | no                |
| gram_coding_rate_fwd      | log det(I + scale G) of a ready G, and d/dG | yes               |
| matrix_log_fwd            | log Q, its eigenvalues and eigenvectors     | no                |

The weights of a joint entropy are n x n.
"""

from collections.abc import Callable

from .. import reference
from . import dispatch
from .operators import (
    _define,
    _differentiable,
    _empty,
    _grad_fake,
    _no_weight,
    _only_order_2,
    _twice_differentiable,
)

# --------------------------------------------------------------------------------------------------
# Two views: the entropy of a Hadamard product of Gram matrices


def _joint_entropy_fwd(z1, z2, mask, alpha, normalize, center, need_weight, backend):
    run = dispatch.module(backend).joint_entropy_fwd
    value, *weights = run(z1, z2, mask, alpha, normalize, center, need_weight)
    if not need_weight:
        return value, _no_weight(z1), _no_weight(z1)
    return value, *(weight.contiguous() for weight in weights)


def _joint_entropy_fwd_fake(z1, z2, mask, alpha, normalize, center, need_weight, backend):
    n = z1.shape[-2]
    return _empty(z1), *(_empty(z1, n, n) if need_weight else _no_weight(z1) for _ in range(2))


def _joint_entropy_bwd(grad, z1, z2, mask, weight1, weight2, alpha, normalize, center, backend):
    run = dispatch.module(backend).samples_bwd
    pairs = ((z1, weight1), (z2, weight2))
    return tuple(run(grad, z, mask, weight).contiguous() for z, weight in pairs)


def _joint_entropy_bwd_fake(grad, z1, z2, *rest):
    return _grad_fake(grad, z1), _grad_fake(grad, z2)


def _joint_entropy_value(z1, z2, mask, arguments):
    _weight1, _weight2, alpha, normalize, center, _backend = arguments
    _only_order_2(alpha)
    rows = {"normalize": normalize, "center": center, "mask": mask}
    return reference.joint_entropy(z1, z2, alpha, **rows)


def _joint_entropy_setup(ctx, inputs, output):
    z1, z2, mask, alpha, normalize, center, ctx.has_weight, backend = inputs
    ctx.save_for_backward(z1, z2, mask, *output[1:])
    ctx.arguments = (alpha, normalize, center, backend)
    ctx.set_materialize_grads(False)


def _joint_entropy_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    if not ctx.has_weight:
        raise RuntimeError("mmae_fast::joint_entropy_fwd: a gradient needs need_weight=True")
    z1, z2, mask, *weights = ctx.saved_tensors
    weights = (weight.detach() for weight in weights)
    return joint_entropy_bwd(grad, z1, z2, mask, *weights, *ctx.arguments) + (None,) * 6


joint_entropy_bwd = _twice_differentiable(
    _define(
        "joint_entropy_bwd",
        "(Tensor grad, Tensor z1, Tensor z2, Tensor? mask, Tensor weight1, Tensor weight2,"
        " float alpha, bool normalize, bool center, str backend) -> (Tensor grad_z1, Tensor"
        " grad_z2)",
        _joint_entropy_bwd,
        _joint_entropy_bwd_fake,
    ),
    _joint_entropy_value,
    views=2,
)
joint_entropy = _differentiable(
    _define(
        "joint_entropy_fwd",
        "(Tensor z1, Tensor z2, Tensor? mask, float alpha, bool normalize, bool center,"
        " bool need_weight, str backend) -> (Tensor value, Tensor weight1, Tensor weight2)",
        _joint_entropy_fwd,
        _joint_entropy_fwd_fake,
    ),
    _joint_entropy_setup,
    _joint_entropy_backward,
)


# --------------------------------------------------------------------------------------------------
# Functions of a ready symmetric matrix


def _coding_rate_value(gram, mask, arguments):
    _weight, scale = arguments
    return reference.coding_rate_of_gram(gram, scale)


def _entropy_value(gram, mask, arguments):
    _weight, alpha = arguments
    _only_order_2(alpha)
    return reference.entropy_of_gram(gram, alpha)


def _define_of_gram(name: str, parameter: str, value_of: Callable) -> Callable:
    def forward(gram, parameter, need_weight, backend):
        run = getattr(dispatch.module(backend), f"{name}_fwd")
        value, weight = run(gram, parameter, need_weight)
        return value, _no_weight(gram) if weight is None else weight.contiguous()

    def forward_fake(gram, parameter, need_weight, backend):
        k = gram.shape[-1]
        return _empty(gram), _empty(gram, k, k) if need_weight else _no_weight(gram)

    def backward(grad, gram, mask, weight, parameter):
        return weight * grad[..., None, None]

    forward_op = _define(
        f"{name}_fwd",
        f"(Tensor gram, float {parameter}, bool need_weight, str backend)"
        " -> (Tensor value, Tensor weight)",
        forward,
        forward_fake,
    )
    backward_op = _twice_differentiable(
        _define(
            f"{name}_bwd",
            f"(Tensor grad, Tensor gram, Tensor? mask, Tensor weight, float {parameter}) -> Tensor",
            backward,
            _grad_fake,
        ),
        value_of,
    )

    def setup(ctx, inputs, output):
        gram, ctx.parameter, ctx.has_weight, _backend = inputs
        ctx.save_for_backward(gram, output[1])
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad, _):
        if grad is None:
            return (None,) * 4
        if not ctx.has_weight:
            raise RuntimeError(f"mmae_fast::{name}_fwd: a gradient needs need_weight=True")
        gram, weight = ctx.saved_tensors
        return (backward_op(grad, gram, None, weight.detach(), ctx.parameter),) + (None,) * 3

    return _differentiable(forward_op, setup, differentiate)


gram_coding_rate = _define_of_gram("gram_coding_rate", "scale", _coding_rate_value)
gram_entropy = _define_of_gram("gram_entropy", "alpha", _entropy_value)
gram_rational_entropy = _define_of_gram("gram_rational_entropy", "alpha", _entropy_value)


def _matrix_log_fwd(q, backend):
    return tuple(part.contiguous() for part in dispatch.module(backend).matrix_log_fwd(q))


def _matrix_log_fwd_fake(q, backend):
    return _grad_fake(None, q), q.new_empty(q.shape[:-1]), _grad_fake(None, q)


def _matrix_log_bwd(grad, log, lam, vectors, backend):
    return dispatch.module(backend).matrix_log_bwd(grad, log, lam, vectors).contiguous()


def _matrix_log_bwd_fake(grad, log, lam, vectors, backend):
    return _grad_fake(None, log)


def _matrix_log_setup(ctx, inputs, output):
    ctx.backend = inputs[1]
    ctx.save_for_backward(*output)
    ctx.set_materialize_grads(False)


def _matrix_log_backward(ctx, grad, *_):
    if grad is None:
        return None, None
    parts = (part.detach() for part in ctx.saved_tensors)
    return matrix_log_bwd(grad, *parts, ctx.backend), None


def _no_second_derivative(ctx, *_):
    raise NotImplementedError("the second derivative of a matrix logarithm is not offered")


matrix_log_bwd = _differentiable(
    _define(
        "matrix_log_bwd",
        "(Tensor grad, Tensor log, Tensor eigenvalues, Tensor eigenvectors, str backend) -> Tensor",
        _matrix_log_bwd,
        _matrix_log_bwd_fake,
    ),
    lambda ctx, inputs, output: None,
    _no_second_derivative,
)
matrix_log = _differentiable(
    _define(
        "matrix_log_fwd",
        "(Tensor q, str backend) -> (Tensor log, Tensor eigenvalues, Tensor eigenvectors)",
        _matrix_log_fwd,
        _matrix_log_fwd_fake,
    ),
    _matrix_log_setup,
    _matrix_log_backward,
)
