"""The PyTorch operators behind the public functions: schemas, fake kernels, vmap, autograd.

| operator           | computes                                    | second derivative             |
|--------------------|---------------------------------------------|-------------------------------|
| gram_fwd           | Gram matrix, row scale, mean row            | yes (gram_bwd)                |
| coding_rate_fwd    | log det(I + scale G) and its weight         | yes (coding_rate_bwd)         |
| matrix_entropy_fwd | H_alpha(G / tr G) and its weight            | alpha = 2 (matrix_entropy_bwd)|
| rational_entropy_fwd | the same for alpha = 1, by rational.py    | no                            |

An operator is implemented by the backend that its last argument names; the weight is the k x k
matrix that the backward operator needs besides z (torch_backend.py). Those of two views and of
ready matrices are in information_operators.py. To add one: a definition in reference.py, a function
in each backend, a block at the end of this file or of that, a row in the tests and the benchmarks.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from . import dispatch

_library = torch.library.Library("mmae_fast", "FRAGMENT")


def _empty(z: Tensor, *shape: int) -> Tensor:
    """An accumulation-dtype tensor of z's batch shape and more."""
    return z.new_empty(z.shape[:-2] + shape, dtype=reference.accumulation_dtype(z.dtype))


def _no_weight(z: Tensor) -> Tensor:
    """What stands for a weight that nobody wants."""
    return z.new_empty(0, dtype=reference.accumulation_dtype(z.dtype))


def _vmap(op: Callable) -> Callable:
    """vmap adds a leading dimension, and operators take any number of those already."""

    def rule(info, in_dims, *args):
        moved = []
        for arg, dim in zip(args, in_dims, strict=True):
            if isinstance(arg, Tensor):
                arg = (
                    arg.movedim(dim, 0)
                    if dim is not None
                    else arg.expand(info.batch_size, *arg.shape)
                )
            moved.append(arg)
        out = op(*moved)
        if isinstance(out, Tensor):
            return out, 0
        return out, tuple(None if o.dim() == 1 and not o.numel() else 0 for o in out)

    return rule


class _Operator:
    """A registered operator.

    Called in eager mode, it goes around PyTorch's dispatcher, which costs as much as a small
    matrix, unless somebody listens there: a dispatch mode, or a tensor of another kind.
    """

    def __init__(self, registered: Callable, implementation: Callable):
        self.registered, self.implementation = registered, implementation

    def __call__(self, *args):
        plain = type(args[0]) in (Tensor, torch.nn.Parameter) and not args[0].is_meta
        if plain and not torch._C._len_torch_dispatch_stack():
            return self.implementation(*args)
        return self.registered(*args)


def _define(name: str, schema: str, implementation: Callable, fake: Callable) -> _Operator:
    _library.define(f"{name}{schema}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mmae_fast::{name}", fake, lib=_library)
    op = getattr(torch.ops.mmae_fast, name).default
    torch.library.register_vmap(f"mmae_fast::{name}", _vmap(op), lib=_library)
    return _Operator(op, implementation)


def _differentiable(operator: _Operator, setup: Callable, backward: Callable) -> Callable:
    """An operator with a derivative: in eager mode, under torch.func, under torch.compile.

    Three ways to say the same to PyTorch. torch.compile needs the operator's own registration,
    which does not compose with torch.func.grad; an autograd.Function does, but its setup_context
    costs three times a small call; without one, and called around the dispatcher, it is the
    cheapest of the three.
    """
    op = operator.registered
    torch.library.register_autograd(op.name(), backward, setup_context=setup, lib=_library)
    name = op.name().replace("::", "_")

    def forward(ctx, *args):
        output = operator(*args)
        setup(ctx, args, output)
        return output

    parts = {"backward": staticmethod(backward)}
    eager = type(name, (torch.autograd.Function,), parts | {"forward": staticmethod(forward)})
    parts |= {"forward": staticmethod(op), "setup_context": staticmethod(setup)}
    parts["vmap"] = staticmethod(_vmap(lambda *args: transformed.apply(*args)))
    transformed = type(name, (torch.autograd.Function,), parts)

    def call(*args):
        if torch.compiler.is_compiling():
            return op(*args)
        if torch._C._are_functorch_transforms_active():
            return transformed.apply(*args)
        recorded = torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in args
        )
        # A Function is also who refuses forward-mode derivatives, which are not offered.
        if recorded or forward_ad._current_level >= 0:
            return eager.apply(*args)
        return operator(*args)

    return call


def _twice_differentiable(operator: _Operator, value_of: Callable, views: int = 1) -> Callable:
    """A backward operator whose own derivative is that of the gradient of a plain expression.

    ``value_of(*z, mask, arguments)`` is the expression, of as many z as there are views. Slower
    than the first derivative; exact.
    """

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs[: views + 2])
        ctx.arguments = inputs[views + 2 :]

    def backward(ctx, *cotangents):
        grad, *z, mask = ctx.saved_tensors

        def gradients(g, *x):
            _, pull = torch.func.vjp(lambda *y: value_of(*y, mask, ctx.arguments), *x)
            return pull(g)

        _, pull = torch.func.vjp(gradients, grad, *z)
        return pull(cotangents) + (None,) * (len(ctx.arguments) + 1)

    return _differentiable(operator, setup, backward)


def _only_order_2(alpha: float) -> None:
    if alpha != 2:
        raise NotImplementedError(
            "the second derivative of a matrix entropy is offered for alpha = 2 only, got alpha ="
            f" {alpha}: the others need the derivative of an eigendecomposition, which does not"
            " exist at repeated eigenvalues"
        )


def _grad_fake(grad, z, *rest):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


# --------------------------------------------------------------------------------------------------
# Gram matrix


def _gram_fwd(z, mask, samples, normalize, center, backend):
    parts = dispatch.module(backend).gram(z, mask, samples, normalize, center)
    return tuple(part.contiguous() for part in parts)


def _gram_fwd_fake(z, mask, samples, normalize, center, backend):
    n, d = z.shape[-2:]
    k = n if samples else d
    return _empty(z, k, k), _empty(z, n), _empty(z, d)


def _gram_bwd(grad, z, mask, gram, scale, mean, samples, normalize, center, backend):
    module = dispatch.module(backend)
    parts = module.GramParts(gram, scale, mean)
    return module.gram_bwd(grad, z, mask, parts, samples, normalize, center).contiguous()


def _gram_value(z, mask, arguments):
    _gram, _scale, _mean, samples, normalize, center, _backend = arguments
    side = "samples" if samples else "features"
    return reference.gram(z, side=side, normalize=normalize, center=center, mask=mask)


def _gram_setup(ctx, inputs, output):
    z, mask, *ctx.arguments = inputs
    ctx.save_for_backward(z, mask, *output)
    ctx.set_materialize_grads(False)


def _gram_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    z, mask, *parts = ctx.saved_tensors
    grad_z = gram_bwd(grad, z, mask, *(part.detach() for part in parts), *ctx.arguments)
    return (grad_z,) + (None,) * 5


gram_bwd = _twice_differentiable(
    _define(
        "gram_bwd",
        "(Tensor grad, Tensor z, Tensor? mask, Tensor gram, Tensor scale, Tensor mean,"
        " bool samples, bool normalize, bool center, str backend) -> Tensor",
        _gram_bwd,
        _grad_fake,
    ),
    _gram_value,
)
gram = _differentiable(
    _define(
        "gram_fwd",
        "(Tensor z, Tensor? mask, bool samples, bool normalize, bool center, str backend)"
        " -> (Tensor gram, Tensor scale, Tensor mean)",
        _gram_fwd,
        _gram_fwd_fake,
    ),
    _gram_setup,
    _gram_backward,
)


# --------------------------------------------------------------------------------------------------
# Functions of the spectrum


def _coding_rate_value(z, mask, arguments):
    _weight, scale, normalize, center, _backend = arguments
    return reference.coding_rate(z, scale, normalize=normalize, center=center, mask=mask)


def _matrix_entropy_value(z, mask, arguments):
    _weight, alpha, normalize, center, _backend = arguments
    _only_order_2(alpha)
    return reference.matrix_entropy(z, alpha, normalize=normalize, center=center, mask=mask)


def _define_spectral(name: str, parameter: str, value_of: Callable) -> Callable:
    def forward(z, mask, parameter, normalize, center, need_weight, backend):
        run = getattr(dispatch.module(backend), f"{name}_fwd")
        value, weight = run(z, mask, parameter, normalize, center, need_weight)
        return value, _no_weight(z) if weight is None else weight.contiguous()

    def forward_fake(z, mask, parameter, normalize, center, need_weight, backend):
        k = min(z.shape[-2:])
        return _empty(z), _empty(z, k, k) if need_weight else _no_weight(z)

    def backward(grad, z, mask, weight, parameter, normalize, center, backend):
        run = dispatch.module(backend).weight_bwd
        return run(grad, z, mask, weight, normalize, center).contiguous()

    forward_op = _define(
        f"{name}_fwd",
        f"(Tensor z, Tensor? mask, float {parameter}, bool normalize, bool center,"
        " bool need_weight, str backend) -> (Tensor value, Tensor weight)",
        forward,
        forward_fake,
    )
    backward_op = _twice_differentiable(
        _define(
            f"{name}_bwd",
            f"(Tensor grad, Tensor z, Tensor? mask, Tensor weight, float {parameter},"
            " bool normalize, bool center, str backend) -> Tensor",
            backward,
            _grad_fake,
        ),
        value_of,
    )

    def setup(ctx, inputs, output):
        z, mask, parameter, normalize, center, ctx.has_weight, backend = inputs
        ctx.save_for_backward(z, mask, output[1])
        ctx.arguments = (parameter, normalize, center, backend)
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad, _):
        if grad is None:
            return (None,) * 7
        z, mask, weight = ctx.saved_tensors
        if not ctx.has_weight:
            raise RuntimeError(f"mmae_fast::{name}_fwd: a gradient needs need_weight=True")
        return (backward_op(grad, z, mask, weight.detach(), *ctx.arguments),) + (None,) * 6

    return _differentiable(forward_op, setup, differentiate)


coding_rate = _define_spectral("coding_rate", "scale", _coding_rate_value)
matrix_entropy = _define_spectral("matrix_entropy", "alpha", _matrix_entropy_value)
rational_entropy = _define_spectral("rational_entropy", "alpha", _matrix_entropy_value)
