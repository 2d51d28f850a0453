"""Coding rates of a batch's parts: by class (MCR²), by patch (EMP-SSL).

Batched over leading dimensions, differentiable, and computed in float32 (float64 for float64 input)
whatever autocast says. ``process_group``, ``grad_scale``: as of
:func:`mmae_fast.fast_matrix_entropy`.

[1] Learning Diverse and Discriminative Representations via the Principle of Maximal Coding Rate
    Reduction (MCR²), NeurIPS 2020, arXiv:2006.08558.
[2] EMP-SSL: Towards Self-Supervised Learning in One Training Epoch, arXiv:2304.03977.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .distributed import Shards, over_ranks
from .ops import _positive, _validate_features, fast_coding_rate, reduced_coding_rate
from .reference import prepare

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@over_ranks("z", rows=("labels",))
def coding_rate_reduction(
    z: Tensor,
    labels: Tensor,
    eps2: float = 0.5,
    *,
    normalize: bool = True,
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Coding rate reduction ``R(Z) - Σ_j (n_j / n) R(Z_j)``, to be maximised ([1]).

        R(Z) = ½ log det(I + d / (n eps²) ZᵀZ),   Z_j the n_j rows of class j

    Equivalent to a loop of ``0.5 * torch.logdet(torch.eye(d) + d / (len(x) * eps2) * x.T @ x)``
    over the classes, in one batched call: rows are gathered by class and padded to the largest.

    Args:
        z: features, shape ``(..., n, d)``.
        labels: integers, shape ``(..., n)``; any values, every value a class of its own.
        eps2: eps², the squared distortion, > 0.
        normalize: divide rows by their norm, as [1] does in the network's last layer.
        backend: see :func:`mmae_fast.fast_coding_rate`.
    Returns:
        shape ``(...)``, in nats, not negative up to rounding.
    Raises:
        TypeError, ValueError: as :func:`mmae_fast.fast_coding_rate`, and for labels.
    Note:
        Memory: (classes) x (largest class) x d numbers, i.e. that of z for classes of one size, and
        (classes) x k² for k = min(largest class, d). Waits for the device once (the padded size
        depends on the labels), so torch.compile(fullgraph=True) does not apply.
    """
    eps2 = _positive("eps2", eps2)
    _validate_features("z", z)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an integer tensor, got {got}")
    if labels.shape != z.shape[:-1]:
        raise ValueError(
            f"labels must have z's shape without its last dimension, {tuple(z.shape[:-1])}, got"
            f" {tuple(labels.shape)}"
        )
    batch, (n, d) = z.shape[:-2], z.shape[-2:]
    x = prepare(z, normalize=normalize)
    if not x.numel():
        return x.new_zeros(batch)
    whole = fast_coding_rate(x, d / (n * eps2), normalize=False, backend=backend)
    index, kept, counts = _by_class(labels.reshape(-1, n))
    counts = counts.to(x.dtype)
    scale = d / (counts.clamp(min=1) * eps2)
    parts = x.reshape(-1, d)[index] * scale.sqrt()[..., None, None]
    rates = fast_coding_rate(parts, 1.0, normalize=False, mask=kept, backend=backend)
    return (whole - (counts / n * rates).sum(-1).reshape(batch)) / 2


def _patch_rate_scale(z, eps2, n) -> float:
    eps2 = _positive("eps2", eps2)
    _validate_features("z", z)
    if z.dim() < 3:
        raise ValueError(f"z must have shape (..., patches, n, d), got {tuple(z.shape)}")
    return z.shape[-1] / (max(n, 1) * eps2)


def _reduced_emp_ssl_tcr(shards: Shards, z, eps2, backend) -> Tensor:
    scale = _patch_rate_scale(z, eps2, shards.rows)
    return reduced_coding_rate(shards, z, scale, backend=backend).mean(-1) / 2


@over_ranks("z", reduced=_reduced_emp_ssl_tcr)
def emp_ssl_tcr(
    z: Tensor,
    eps2: float = 0.2,
    *,
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Total coding rate averaged over patches, to be maximised ([2]).

    Equivalent to the mean over patches p of
    ``0.5 * torch.logdet(torch.eye(d) + d / (n * eps2) * x[p].T @ x[p])``, x the normalised rows.

    Args:
        z: features, shape ``(..., patches, n, d)``.
        eps2: eps², > 0; 0.2 in the published program (which calls it eps).
    Returns: shape ``(...)``, in nats.
    Raises: ValueError for fewer than 3 dimensions, else as :func:`mmae_fast.fast_coding_rate`.
    """
    scale = _patch_rate_scale(z, eps2, z.shape[-2])
    return fast_coding_rate(z, scale, backend=backend).mean(-1) / 2


def _by_class(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """labels (batch, n) -> for each class, its rows among the batch · n, padded.

    Index (batch, classes, width), whether it is a row and not padding (the same shape), and the
    counts (batch, classes).
    """
    batch, n = labels.shape
    values, inverse = labels.unique(return_inverse=True)
    classes = len(values)
    key = (inverse + classes * torch.arange(batch, device=labels.device)[:, None]).flatten()
    counts = torch.bincount(key, minlength=batch * classes)
    order = key.argsort()
    start = counts.cumsum(0) - counts
    column = torch.arange(batch * n, device=labels.device) - start[key[order]]
    width = int(counts.max())
    index = order.new_zeros(batch * classes, width).index_put_((key[order], column), order)
    kept = torch.arange(width, device=labels.device) < counts.unsqueeze(-1)
    shape = (batch, classes, width)
    return index.reshape(shape), kept.reshape(shape), counts.reshape(batch, classes)
