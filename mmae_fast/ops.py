"""The public operations, and their registration with PyTorch.

The life of a call: validate → ``dispatch.select_backend`` → one ``torch.library`` operator, whose
implementation is the backend's → for the backward pass z and one k x k matrix are kept → one
backward operator → gradient in z's dtype. Operators carry fake kernels (torch.compile), vmap rules
and autograd; the differentiable second derivative comes from reference.py, where it exists.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import dispatch, reference

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PRECISIONS = ("highest", "high", "medium")
_SIDES = ("auto", "samples", "features")

_library = torch.library.Library("mmae_fast", "FRAGMENT")


# --------------------------------------------------------------------------------------------------
# Public functions


def fast_matrix_entropy(
    z: Tensor,
    alpha: float = 1.0,
    *,
    normalize: bool = True,
    center: bool = False,
    mask: Tensor | None = None,
    precision: str = "highest",
    process_group=None,
    backend: str = "auto",
) -> Tensor:
    """Matrix Renyi entropy of features, differentiable, in nats.

    Equivalent to (alpha = 1, the von Neumann entropy) ::

        x = torch.nn.functional.normalize(z, dim=-1)
        lam = torch.linalg.eigvalsh(x @ x.mT)
        lam = lam / lam.sum(-1, keepdim=True)
        -torch.special.xlogy(lam, lam).sum(-1)

    without the larger Gram matrix, without autograd's copies of z, and finite at zero eigenvalues.

        H_alpha(rho) = log tr(rho^alpha) / (1 - alpha),   rho = G / tr G,   G = Z Zᵀ or Zᵀ Z    [1, 2]

    Args:
        z: features, shape ``(..., n, d)``, any strides; float32, bfloat16, float16 or float64.
        alpha: order, > 0; 1 is von Neumann, 2 is ``-log ||rho||_F^2`` (no factorisation), ``inf``
            is ``-log lambda_max``.
        normalize: divide rows by their norm (zero rows stay zero).
        center: subtract the mean row, after normalisation, over the rows kept.
        mask: bool, shape ``(..., n)``; rows where it is False (padding) are dropped.
        precision: "highest", "high" or "medium", PyTorch's words for float32 matrix products; a
            permission that a GPU backend may use. The CPU always computes at full precision.
        process_group: not supported yet; must be None.
        backend: "auto", or one of ``dispatch.BACKENDS``.
    Returns:
        shape ``(...)``, float32 (float64 for float64 z). A matrix without rows, or with zero rows
        only, has entropy 0. NaN or Inf in a kept row gives NaN.
    Raises:
        TypeError, ValueError: an argument is wrong; the message has the value received.
        RuntimeError: the named backend cannot serve z, with the reason.
        NotImplementedError: ``process_group``; or a second derivative unless alpha is 2.
    Note:
        Gram matrix and factors in float32 (float64 for float64), whatever autocast says; traces and
        sums of logs in float64. Deterministic. Extra memory O(k²) per matrix, k = min(n, d).

    [1] Giraldo et al., IEEE Trans. Inf. Theory 2015. [2] arXiv:2309.17281, section 2.
    """
    alpha = _positive("alpha", alpha, allow_inf=True)
    z, mask, backend = _validate(z, mask, precision, process_group, backend)
    need = z.requires_grad and torch.is_grad_enabled()
    return torch.ops.mmae_fast.matrix_entropy_fwd(
        z, mask, alpha, bool(normalize), bool(center), need, backend
    )[0]


def fast_coding_rate(
    z: Tensor,
    scale: float,
    *,
    normalize: bool = True,
    center: bool = False,
    mask: Tensor | None = None,
    precision: str = "highest",
    process_group=None,
    backend: str = "auto",
) -> Tensor:
    """Total coding rate ``log det(I + scale · ZᵀZ)``, differentiable, in nats.

    Equivalent to ::

        x = torch.nn.functional.normalize(z, dim=-1)
        torch.logdet(torch.eye(d) + scale * x.mT @ x)

    on the smaller of the two Gram matrices (Sylvester's identity), by Cholesky factorisation with
    the closed-form gradient ``2 scale Z (I + scale ZᵀZ)⁻¹``; twice differentiable.

    Args:
        z, normalize, center, mask, precision, process_group, backend: see
            :func:`fast_matrix_entropy`.
        scale: c in ``log det(I + c ZᵀZ)``, > 0. M-MAE's regulariser has c = mu / d ([1]), MCR² and
            EMP-SSL have c = d / (n eps²).
    Returns:
        shape ``(...)``, float32 (float64 for float64 z). NaN or Inf in a kept row gives NaN.
    Raises:
        As :func:`fast_matrix_entropy`.

    [1] Information Flow in Self-Supervised Learning, ICML 2024, arXiv:2309.17281.
    """
    scale = _positive("scale", scale)
    z, mask, backend = _validate(z, mask, precision, process_group, backend)
    need = z.requires_grad and torch.is_grad_enabled()
    return torch.ops.mmae_fast.coding_rate_fwd(
        z, mask, scale, bool(normalize), bool(center), need, backend
    )[0]


def fast_gram(
    z: Tensor,
    *,
    side: str = "auto",
    normalize: bool = True,
    center: bool = False,
    mask: Tensor | None = None,
    precision: str = "highest",
    backend: str = "auto",
) -> Tensor:
    """Gram matrix of the prepared rows, differentiable, exactly symmetric.

    Equivalent to ``x @ x.mT`` (side "samples") or ``x.mT @ x`` ("features") with
    ``x = torch.nn.functional.normalize(z, dim=-1)``, without materialising x.

    Args:
        z, normalize, center, mask, precision, backend: see :func:`fast_matrix_entropy`.
        side: "samples" for (n, n), "features" for (d, d), "auto" for the smaller ("samples" if
            n = d).
    Returns:
        shape ``(..., k, k)``, float32 (float64 for float64 z). With normalised, uncentred rows the
        diagonal of the samples side is exactly 1 (0 for zero or dropped rows).
    Raises:
        As :func:`fast_matrix_entropy`; ValueError for an unknown side.
    """
    if side not in _SIDES:
        raise ValueError(f"side must be one of {_SIDES}, got {side!r}")
    z, mask, backend = _validate(z, mask, precision, None, backend)
    samples = side == "samples" or (side == "auto" and z.shape[-2] <= z.shape[-1])
    return torch.ops.mmae_fast.gram_fwd(z, mask, samples, bool(normalize), bool(center), backend)[0]


def effective_rank(
    z: Tensor,
    *,
    normalize: bool = True,
    center: bool = False,
    mask: Tensor | None = None,
    precision: str = "highest",
    process_group=None,
    backend: str = "auto",
) -> Tensor:
    """Effective rank ``exp(H_1)`` of features, between 1 and min(n, d); differentiable.

    Equivalent to ``fast_matrix_entropy(z, 1.0, ...).exp()``, arguments and errors included. The
    spectrum is that of the Gram matrix, as in Diff-eRank (with ``center=True`` up to its order of
    centring, see losses.py); RankMe puts the singular values of z in its place, which is a different
    number.

    [1] Roy, Vetterli, The effective rank, EUSIPCO 2007.
    """
    return fast_matrix_entropy(
        z,
        1.0,
        normalize=normalize,
        center=center,
        mask=mask,
        precision=precision,
        process_group=process_group,
        backend=backend,
    ).exp()


def _positive(name: str, value, allow_inf: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number, got {value!r}")
    value = float(value)
    if not value > 0 or (math.isinf(value) and not allow_inf):
        raise ValueError(f"{name} must be > 0{'' if allow_inf else ' and finite'}, got {value}")
    return value


def _validate(z, mask, precision, process_group, backend) -> tuple[Tensor, Tensor | None, str]:
    if not isinstance(z, Tensor):
        raise TypeError(f"z must be a torch.Tensor, got {type(z).__name__}")
    if z.dtype not in _DTYPES:
        raise TypeError(f"z must be float32, float64, bfloat16 or float16, got {z.dtype}")
    if z.layout != torch.strided:
        raise TypeError(f"z must be a dense (strided) tensor, got layout {z.layout}")
    if z.dim() < 2:
        raise ValueError(f"z must have shape (..., n, d), got {tuple(z.shape)}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, got {got}")
        if mask.shape != z.shape[:-1]:
            raise ValueError(
                f"mask must have z's shape without its last dimension, {tuple(z.shape[:-1])}, "
                f"got {tuple(mask.shape)}"
            )
        if mask.device != z.device:
            raise ValueError(f"mask must be on z's device {z.device}, got {mask.device}")
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be one of {_PRECISIONS}, got {precision!r}")
    if process_group is not None:
        raise NotImplementedError(
            f"process_group is not supported yet, got {process_group!r}; gather z first"
        )
    return z, mask, dispatch.select_backend(backend, z.device.type)


# --------------------------------------------------------------------------------------------------
# Operators


def _k(z: Tensor, samples: bool | None = None) -> int:
    n, d = z.shape[-2:]
    if samples is None:
        return min(n, d)
    return n if samples else d


def _empty(z: Tensor, *shape: int) -> Tensor:
    """An accumulation-dtype tensor of z's batch shape and more."""
    dtype = reference.accumulation_dtype(z.dtype)
    return z.new_empty(z.shape[:-2] + shape, dtype=dtype)


def _weight_or_empty(z: Tensor, need: bool) -> Tensor:
    return _empty(z, _k(z), _k(z)) if need else z.new_empty(0, dtype=_empty(z[..., :0, :0]).dtype)


def _gram_fwd(z, mask, samples, normalize, center, backend):
    return tuple(dispatch.module(backend).gram(z, mask, samples, normalize, center))


def _gram_fwd_fake(z, mask, samples, normalize, center, backend):
    k = _k(z, samples)
    return _empty(z, k, k), _empty(z, z.shape[-2]), _empty(z, z.shape[-1])


def _gram_bwd(grad, z, mask, gram, scale, mean, samples, normalize, center, backend):
    module = dispatch.module(backend)
    parts = module.GramParts(gram, scale, mean)
    return module.gram_bwd(grad, z, mask, parts, samples, normalize, center)


def _spectral_fwd(name: str) -> Callable:
    def forward(z, mask, parameter, normalize, center, need_weight, backend):
        run = getattr(dispatch.module(backend), name)
        value, weight = run(z, mask, parameter, normalize, center, need_weight)
        return value, value.new_empty(0) if weight is None else weight

    return forward


def _spectral_fwd_fake(z, mask, parameter, normalize, center, need_weight, backend):
    return _empty(z), _weight_or_empty(z, need_weight)


def _spectral_bwd(grad, z, mask, weight, parameter, normalize, center, backend):
    return dispatch.module(backend).weight_bwd(grad, z, mask, weight, normalize, center)


def _grad_fake(grad, z, *rest):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _vmap(op):
    """vmap over a leading dimension: operators take any leading dimensions already."""

    def rule(info, in_dims, *args):
        batched = [
            arg
            if not isinstance(arg, Tensor)
            else arg.movedim(dim, 0)
            if dim is not None
            else arg.expand(info.batch_size, *arg.shape)
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        out = op(*batched)
        if isinstance(out, Tensor):
            return out, 0
        # The empty stand-in for an unwanted weight has no batch dimension.
        dims = tuple(
            0 if o.dim() and o.shape[0] == info.batch_size and o.numel() else None for o in out
        )
        return out, dims

    return rule


def _register(name: str, schema: str, implementation, fake) -> Callable:
    _library.define(f"{name}{schema}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    qualified = f"mmae_fast::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    op = getattr(torch.ops.mmae_fast, name).default
    torch.library.register_vmap(qualified, _vmap(op), lib=_library)
    return op


def _second_order(value_of: Callable, unsupported: str | None):
    """Backward of a backward operator: differentiate the gradient of the plain PyTorch expression.

    ``value_of(z, mask, ctx)`` is that expression. Slower than the first derivative, and exact.
    """

    def setup(ctx, inputs, output):
        grad, z, mask = inputs[:3]
        ctx.save_for_backward(grad, z, mask)
        ctx.arguments = inputs[3:]

    def backward(ctx, cotangent):
        if unsupported and unsupported_here(ctx):
            raise NotImplementedError(unsupported)
        grad, z, mask = ctx.saved_tensors

        def gradient(g, x):
            _, pull = torch.func.vjp(lambda y: value_of(y, mask, ctx.arguments), x)
            return pull(g)[0]

        _, pull = torch.func.vjp(gradient, grad, z)
        grad_grad, grad_z = pull(cotangent)
        return (grad_grad, grad_z) + (None,) * (len(ctx.arguments) + 1)

    def unsupported_here(ctx):
        return ctx.arguments[1] != 2.0

    torch.library.register_autograd
    return setup, backward


_gram_fwd_op = _register(
    "gram_fwd",
    "(Tensor z, Tensor? mask, bool samples, bool normalize, bool center, str backend)"
    " -> (Tensor gram, Tensor scale, Tensor mean)",
    _gram_fwd,
    _gram_fwd_fake,
)
_gram_bwd_op = _register(
    "gram_bwd",
    "(Tensor grad, Tensor z, Tensor? mask, Tensor gram, Tensor scale, Tensor mean, bool samples,"
    " bool normalize, bool center, str backend) -> Tensor",
    _gram_bwd,
    _grad_fake,
)


def _gram_setup(ctx, inputs, output):
    z, mask, *ctx.arguments = inputs
    ctx.save_for_backward(z, mask, *output)
    ctx.set_materialize_grads(False)


def _gram_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    grad_z = _gram_bwd_op(grad, *ctx.saved_tensors, *ctx.arguments)
    return (grad_z,) + (None,) * 5


torch.library.register_autograd(
    "mmae_fast::gram_fwd", _gram_backward, setup_context=_gram_setup, lib=_library
)


def _gram_value(z, mask, arguments):
    samples, normalize, center = arguments[3:6]
    side = "samples" if samples else "features"
    return reference.gram(z, side=side, normalize=normalize, center=center, mask=mask)


def _register_spectral(name: str, parameter: str, value_of: Callable, unsupported: str | None):
    forward = _register(
        f"{name}_fwd",
        f"(Tensor z, Tensor? mask, float {parameter}, bool normalize, bool center, bool need_weight,"
        " str backend) -> (Tensor value, Tensor weight)",
        _spectral_fwd(f"{name}_fwd"),
        _spectral_fwd_fake,
    )
    backward = _register(
        f"{name}_bwd",
        f"(Tensor grad, Tensor z, Tensor? mask, Tensor weight, float {parameter}, bool normalize,"
        " bool center, str backend) -> Tensor",
        _spectral_bwd,
        _grad_fake,
    )

    def setup(ctx, inputs, output):
        z, mask, parameter, normalize, center, need_weight, backend = inputs
        ctx.save_for_backward(z, mask, output[1])
        ctx.arguments = (parameter, normalize, center, backend)
        ctx.has_weight = need_weight
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad, _):
        if grad is None:
            return (None,) * 7
        z, mask, weight = ctx.saved_tensors
        if not ctx.has_weight:  # z became differentiable behind the public function's back
            parameter, normalize, center, backend = ctx.arguments
            weight = forward(z.detach(), mask, parameter, normalize, center, True, backend)[1]
        return (backward(grad, z, mask, weight.detach(), *ctx.arguments),) + (None,) * 6

    torch.library.register_autograd(
        f"mmae_fast::{name}_fwd", differentiate, setup_context=setup, lib=_library
    )
    second_setup, second_backward = _second_order(value_of, unsupported)
    torch.library.register_autograd(
        f"mmae_fast::{name}_bwd", second_backward, setup_context=second_setup, lib=_library
    )


def _entropy_value(z, mask, arguments):
    _, alpha, normalize, center, _ = arguments
    return reference.matrix_entropy(z, alpha, normalize=normalize, center=center, mask=mask)


def _coding_rate_value(z, mask, arguments):
    _, scale, normalize, center, _ = arguments
    return reference.coding_rate(z, scale, normalize=normalize, center=center, mask=mask)


_setup, _backward = _second_order(_gram_value, None)
torch.library.register_autograd(
    "mmae_fast::gram_bwd", _backward, setup_context=_setup, lib=_library
)
_register_spectral("coding_rate", "scale", _coding_rate_value, None)
_register_spectral(
    "matrix_entropy",
    "alpha",
    _entropy_value,
    "the second derivative of a matrix entropy is offered for alpha = 2 only: the others need the"
    " derivative of an eigendecomposition, which does not exist at repeated eigenvalues",
)
