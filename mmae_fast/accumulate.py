"""Gradient accumulation under which a regulariser sees the whole batch.

The entropy of a batch is not the mean of the entropies of its parts, so that plain accumulation
minimises something else. Here every micro-batch runs twice: once without a graph, for its features;
then, when the regulariser's gradient of all features is known, once more to pull its part of that
gradient back (as GradCache does for contrastive losses [1]).

[1] Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, RepL4NLP 2021,
    arXiv:2101.06983.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

Features = Tensor | tuple[Tensor, ...]


def accumulate_gradients(
    model: nn.Module,
    forward: Callable[[Any], tuple[Tensor | None, Features]],
    micro_batches: Iterable[Any],
    regularizer: Callable[..., Tensor],
    *,
    scale: Callable[[Tensor], Tensor] | None = None,
    generators: Sequence[torch.Generator] = (),
) -> tuple[Tensor | None, Tensor]:
    """Adds the gradient of ``loss + regularizer(features)`` of a whole batch to the parameters.

    Equivalent to ::

        losses, features = zip(*(forward(batch) for batch in micro_batches))
        rows = torch.tensor([f.shape[-2] for f in features])
        loss = (torch.stack(losses) * rows / rows.sum()).sum()
        term = regularizer(torch.cat(features, -2))
        (loss + term).backward()

    in the memory of one micro-batch's graph and all features, for one more forward pass. ::

        for step in ...:
            loss, term = accumulate_gradients(
                model, lambda batch: model(*batch), micro_batches, MatrixEntropyRegularizer("tcr")
            )
            optimizer.step()
            optimizer.zero_grad()

    Args:
        model: the module that ``forward`` runs; under DistributedDataParallel or ``fully_shard``
            the wrapped one. Gradients are synchronised with the last micro-batch; buffers (running
            statistics) end as after one pass.
        forward: a micro-batch -> (loss, features); loss is a scalar mean over its rows, or None;
            features ``(..., n, d)``, or a tuple of such (views) with the same n. Autocast belongs
            in here or around the call.
        micro_batches: any number, of any sizes; all are held. (``fully_shard`` communicates in the
            forward pass: every rank must have as many.)
        regularizer: features of the whole batch (one argument per view) -> scalar. With a process
            group it is that of all ranks, and called once per step.
        scale: ``torch.amp.GradScaler().scale``, for float16.
        generators: ``torch.Generator`` objects that ``forward`` draws from, besides PyTorch's own
            (CPU and the device of the model's parameters), which are replayed in any case.
    Returns:
        loss (None if there is none) and regularizer's term, both without graph and unscaled.
    Raises:
        ValueError: no micro-batches, or some with a loss and some without.
    Note:
        Exact if the second pass repeats the first: dropout and masks are drawn alike, but from no
        generator that is not PyTorch's (numpy's, Python's).
    """
    micro_batches = list(micro_batches)
    if not micro_batches:
        raise ValueError("micro_batches must have at least one micro-batch, got none")
    if scale is None:
        scale = _unscaled
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    states, losses, features = [], [], []
    with torch.no_grad():
        for batch in micro_batches:
            states.append(_rng_state(model, generators))
            loss, parts = forward(batch)
            losses.append(loss)
            features.append(parts if isinstance(parts, tuple) else (parts,))
        for buffer, before in buffers:
            buffer.copy_(before)
    end = _rng_state(model, generators)

    weights = _weights(losses, features)
    total = None
    if weights is not None:
        total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    whole = [torch.cat(view, -2).requires_grad_() for view in zip(*features, strict=True)]
    term = regularizer(*whole)
    if term.requires_grad:
        scale(term).backward()
    gradients = [_split(view.grad, features, i) for i, view in enumerate(whole)]

    last = len(micro_batches) - 1
    for i, batch in enumerate(micro_batches):
        with _synchronised(model, i == last):
            _set_rng_state(states[i], generators)
            loss, parts = forward(batch)
            roots = list(parts if isinstance(parts, tuple) else (parts,))
            cotangents = [gradient[i] for gradient in gradients]
            if weights is not None:
                roots.append(scale(weights[i] * loss))
                cotangents.append(torch.ones_like(roots[-1]))
            pairs = zip(roots, cotangents, strict=True)
            pairs = [(x, g) for x, g in pairs if g is not None and x.requires_grad]
            torch.autograd.backward(*map(list, zip(*pairs, strict=True))) if pairs else None
    _set_rng_state(end, generators)
    return total, term.detach()


def _unscaled(x: Tensor) -> Tensor:
    return x


def _weights(losses: list[Tensor | None], features) -> list[float] | None:
    """A micro-batch's share of the rows, or None where there is no loss."""
    missing = sum(loss is None for loss in losses)
    if missing == len(losses):
        return None
    if missing:
        raise ValueError(f"{missing} of {len(losses)} micro-batches have no loss")
    rows = [views[0].shape[-2] for views in features]
    return [n / max(sum(rows), 1) for n in rows]


def _split(gradient: Tensor | None, features, view: int) -> Sequence[Tensor | None]:
    if gradient is None:
        return [None] * len(features)
    return gradient.split([views[view].shape[-2] for views in features], -2)


def _rng_state(model: nn.Module, generators: Sequence[torch.Generator]):
    device = get_device_states(*model.parameters())
    return torch.get_rng_state(), device, [generator.get_state() for generator in generators]


def _set_rng_state(state, generators: Sequence[torch.Generator]) -> None:
    cpu, device, own = state
    torch.set_rng_state(cpu)
    set_device_states(*device)
    for generator, state_of_it in zip(generators, own, strict=True):
        generator.set_state(state_of_it)


@contextlib.contextmanager
def _synchronised(model: nn.Module, last: bool):
    """Whether the gradients of this micro-batch are averaged over the ranks, in DDP and FSDP2."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    if hasattr(model, "no_sync") and not last:
        with model.no_sync():
            yield
    else:
        yield
