"""Quantities of a batch whose rows lie on several processes (``process_group=``).

The life of a call: the ranks compare their arguments (:func:`_agree`) → one of two routes →
backward without communication, since every rank holds all that the gradient of its rows needs.

    N > 4 d, and the value is one of the d x d Gram matrix:  all-reduce of that matrix
    otherwise:                                               all-gather of the N rows

A ring moves 2 · 4 d² bytes per rank for the first and N · d · (bytes of a number) for the second,
which are equal at N = 4d for 16-bit rows; the first also divides the work of the Gram matrix among
the ranks, and bounds what the second keeps to 4 d² numbers. ``ROWS_PER_FEATURE`` is the 4.

Gradients: the value is the same on every rank, and each rank gets the gradient of its own rows,
times the number of ranks W where ``grad_scale="mean"``. Averaging over the ranks (DDP, FSDP)
divides by W, so that what comes out is the gradient of the global value, for any W and any shards.
``grad_scale="sum"`` is without that factor: for gradients that are summed, or to repeat published
programs whose regulariser acts as 1/W of its weight under averaging. Both take for granted that
every rank does the same with the value. (W is the size of the group: averaged over the ranks of
several groups, it is the gradient of the mean of their values.)

Under torch.compile a call with a process group is a graph break, and runs as it does without:
the number of rows of the other ranks is known on the host when the call is made, and not before.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import reference
from .backends import dispatch, operators

ROWS_PER_FEATURE = 4
GRAD_SCALES = ("mean", "sum")

F = TypeVar("F", bound=Callable)


def over_ranks(
    *views: str,
    rows: tuple[str, ...] = (),
    reduced: Callable | None = None,
    unless: str | None = None,
) -> Callable[[F], F]:
    """Gives a function of local rows its ``process_group`` and ``grad_scale``.

    Args:
        views: names of its arguments ``(..., n, d)`` whose rows are shared among the ranks.
        rows: names of those with one entry per row, ``(..., n)`` (masks, labels); None is allowed.
        reduced: ``reduced(shards, **arguments)`` is the same value made of ``shards.gram`` of its
            one view. It may return NotImplemented: the rows, please.
        unless: name of a flag that takes the views' rows for something else: no process group then.
    The function declares both keywords for its signature and never sees a group in them.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(*args, process_group=None, grad_scale="mean", **kwargs):
            if process_group is not None:
                call = (function, signature, views, rows, reduced, unless)
                if torch.compiler.is_compiling():
                    from .eager import eagerly

                    return eagerly(_over_ranks, call, args, kwargs, process_group, grad_scale)
                return _over_ranks(call, args, kwargs, process_group, grad_scale)
            _check_grad_scale(grad_scale)
            return function(*args, **kwargs)

        return wrapper

    return decorate


class Shards:
    """Rows on the ranks of a group: ``sizes[r]`` of them on rank r."""

    def __init__(self, group: dist.ProcessGroup, sizes: list[int], grad_scale: str):
        self.group, self.sizes = group, sizes
        self.rank = dist.get_rank(group)
        self.rows = sum(sizes)
        self.factor = len(sizes) if grad_scale == "mean" else 1

    def gather(self, x: Tensor, dim: int = -2) -> Tensor:
        """The rows of all ranks in the order of the ranks, differentiable, in x's dtype."""
        return _Gather.apply(x, dim, self)

    def gram(self, z: Tensor, mask, normalize: bool, center: bool, backend: str) -> Tensor:
        """``(..., d, d)`` Gram matrix of the rows of all ranks, differentiable."""
        local = operators.gram(z, mask, False, bool(normalize), bool(center), backend)[0]
        if center:
            local = local + self._between(z, mask, normalize)
        return _AllReduce.apply(local, self)

    def in_range(self, z: Tensor, mask) -> Tensor:
        """z by the largest entry of all ranks, for values that do not depend on the scale of z.

        So that the squares of unnormalised features neither vanish nor overflow.
        """
        entries = z.detach() if mask is None else torch.where(mask.unsqueeze(-1), z.detach(), 0)
        dtype = reference.accumulation_dtype(z.dtype)
        largest = entries.new_zeros(z.shape[:-2], dtype=dtype)
        if z.shape[-2] and z.shape[-1]:
            largest = entries.abs().amax((-2, -1)).to(dtype)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        factor = torch.where((largest == 0) | ~torch.isfinite(largest), 1, 1 / largest)
        return z.to(dtype) * factor[..., None, None]

    def _between(self, z: Tensor, mask, normalize: bool) -> Tensor:
        """This rank's part ``n_r (m_r - m)(m_r - m)ᵀ`` of the centred Gram matrix.

        With the Gram matrices centred by the ranks' own means m_r it adds up to the one centred by
        the global mean m, without cancellation. The sum of n_r (m_r - m) is zero, so that m counts
        as a constant in the gradient.
        """
        with torch.autocast(z.device.type, enabled=False):
            x = reference.prepare(z, normalize=normalize, mask=mask)
            if mask is None:
                count = x.new_full((*x.shape[:-2], 1), x.shape[-2])
            else:
                count = mask.sum(-1, keepdim=True).to(x.dtype)
            mean = x.sum(-2) / count.clamp(min=1)
            sums = torch.cat([count * mean.detach(), count], -1).double()
            dist.all_reduce(sums, group=self.group)
            overall = sums[..., :-1] / sums[..., -1:].clamp(min=1)
            difference = count.sqrt() * (mean - overall.to(mean.dtype))
            return difference.unsqueeze(-1) * difference.unsqueeze(-2)


def _over_ranks(call, args, kwargs, group, grad_scale):
    _check_group(group)
    function, signature, views, rows, reduced, unless = call
    try:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = {k: v for k, v in bound.arguments.items() if k not in _OWN}
        error = None
    except TypeError as caught:
        arguments, error = {}, caught
    tensors = dict.fromkeys(views, -2) | dict.fromkeys(rows, -1)
    first = arguments.get(views[0])
    n = first.shape[-2] if isinstance(first, Tensor) and first.dim() > 1 else -1
    transformed = torch._C._are_functorch_transforms_active()
    parts = [f"{name}={_describe(arg, tensors.get(name), n)}" for name, arg in arguments.items()]
    parts += [f"grad_scale={grad_scale!r}", str(error or "")] + ["torch.func"] * transformed
    if arguments.get("backend") in dispatch.BACKENDS and isinstance(first, Tensor):
        parts.append(dispatch.refusal(arguments["backend"], first.device.type))
    sizes = _agree(group, f"{function.__name__}({', '.join(filter(None, parts))})", n)

    # From here on, what is wrong on one rank is wrong on all.
    if error is not None:
        raise error
    if transformed:
        raise NotImplementedError("process_group does not compose with torch.func's transforms")
    _check_grad_scale(grad_scale)
    if unless is not None and arguments[unless]:
        raise ValueError(f"process_group is not defined for {unless}={arguments[unless]!r}")
    given = [(arguments[name], dim) for name, dim in tensors.items()]
    if not all(_has_rows(x, dim, n) or (x is None and dim == -1) for x, dim in given):
        return function(**arguments)  # its own validation says what is wrong
    shards = Shards(group, sizes, grad_scale)
    if reduced is not None and shards.rows > ROWS_PER_FEATURE * first.shape[-1]:
        value = reduced(shards, **arguments)
        if value is not NotImplemented:
            return value
    for name, dim in tensors.items():
        if arguments[name] is not None:
            arguments[name] = shards.gather(arguments[name], dim)
    return function(**arguments)


_OWN = ("process_group", "grad_scale")


def _check_grad_scale(grad_scale) -> None:
    if grad_scale not in GRAD_SCALES:
        raise ValueError(f"grad_scale must be one of {GRAD_SCALES}, got {grad_scale!r}")


def _check_group(group) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"process_group={group!r} needs torch.distributed.init_process_group() first"
        )
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this rank is not a member of process_group")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup (or None), got"
            f" {type(group).__name__} {group!r}"
        )


def _has_rows(x, dim: int, n: int) -> bool:
    dense = isinstance(x, Tensor) and x.layout == torch.strided
    return dense and x.dim() >= -dim and x.shape[dim] == n and n >= 0


def _describe(x, dim: int | None, n: int) -> str:
    """An argument as every rank must have it: what may differ, the number of rows, reads n."""
    if not isinstance(x, Tensor):
        return repr(x) if isinstance(x, (int, float, str, type(None))) else type(x).__name__
    shape = [str(size) for size in x.shape]
    if dim is not None and _has_rows(x, dim, n):
        shape[dim] = "n"
    return f"{x.dtype} {x.layout} {x.device.type} [{', '.join(shape)}]"


def _agree(group: dist.ProcessGroup, description: str, n: int) -> list[int]:
    """The number of rows of every rank; or, where descriptions differ, one error on all of them.

    An exchange of 16 bytes a rank, on the host: no GPU waits or is waited for. It is made at every
    call, because a rank that skipped it for a known shape would leave the others waiting.
    """
    digest = hashlib.blake2b(description.encode(), digest_size=8).digest()
    mine = torch.tensor([n, int.from_bytes(digest, "little", signed=True)], device="cpu")
    control = _control_group(group)
    everyone = mine.new_empty(dist.get_world_size(group), 2)
    # To one and back to all: gloo's all-gather is a ring, of as many messages in a row as ranks.
    first = dist.get_rank(control) == 0
    dist.gather(mine, list(everyone.unbind()) if first else None, group=control, group_dst=0)
    dist.broadcast(everyone, group=control, group_src=0)
    sizes, digests = everyone.T.tolist()
    if len(set(digests)) == 1:
        return sizes
    descriptions = [None] * len(sizes)
    dist.all_gather_object(descriptions, description, group=control)
    had: dict[str, list[str]] = {}
    for rank, size, text in zip(
        dist.get_process_group_ranks(group), sizes, descriptions, strict=True
    ):
        had.setdefault(text, []).append(f"{rank} (n = {size})")
    listed = "".join(
        f"\n  rank {', '.join(ranks[:8])}{' ...' * (len(ranks) > 8)}: {text}"
        for text, ranks in had.items()
    )
    raise ValueError(
        "the ranks of process_group must differ in the number of rows n only, got" + listed
    )


_control_groups: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _control_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that carries CPU tensors: itself, or a gloo group made once."""
    if "cpu:" in dist.get_backend_config(group):
        return group
    if group not in _control_groups:
        ranks = dist.get_process_group_ranks(group)
        order = {} if ranks == sorted(ranks) else {"sort_ranks": False}
        _control_groups[group] = dist.new_group(
            ranks, backend="gloo", use_local_synchronization=True, **order
        )
    return _control_groups[group]


class _Once(torch.autograd.Function):
    """A gradient times a number, itself without derivative."""

    @staticmethod
    def forward(ctx, grad, factor):
        return grad * factor

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "the second derivative is not offered with process_group: it would need the gradients"
            " of the other ranks' rows"
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, shards):
        ctx.dim, ctx.shards = dim, shards
        with torch.autocast(x.device.type, enabled=False):  # it promotes what is concatenated
            return _gather(x, dim, shards)

    @staticmethod
    def backward(ctx, grad):
        shards = ctx.shards
        start = sum(shards.sizes[: shards.rank])
        own = grad.narrow(ctx.dim, start, shards.sizes[shards.rank])
        return _Once.apply(own, shards.factor), None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shards):
        ctx.factor = shards.factor
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=shards.group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return _Once.apply(grad, ctx.factor), None


def _gather(x: Tensor, dim: int, shards: Shards) -> Tensor:
    """As bytes, which every backend takes of every dtype, and padded to the longest shard."""
    x = x.movedim(dim, 0)
    longest, ranks = max(shards.sizes), len(shards.sizes)
    if not longest or not math.prod(x.shape[1:]):  # so on all ranks, or on none
        return x.new_empty(shards.rows, *x.shape[1:]).movedim(0, dim)
    own = x.new_zeros(longest, *x.shape[1:])
    own[: x.shape[0]] = x
    parts = x.new_empty(ranks, *own.shape)
    received = parts.view(ranks, -1).view(torch.uint8)
    dist.all_gather(list(received.unbind()), own.view(-1).view(torch.uint8), group=shards.group)
    if len(set(shards.sizes)) == 1:
        out = parts.flatten(0, 1)
    else:
        out = torch.cat([part[:size] for part, size in zip(parts, shards.sizes, strict=True)])
    return out.movedim(0, dim)
