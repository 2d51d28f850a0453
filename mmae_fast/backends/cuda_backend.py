"""The compiled CUDA backend: csrc/cuda/ for batches of small matrices, PyTorch's libraries above.

| quantity                | compiled kernels                           | above                     |
|-------------------------|--------------------------------------------|---------------------------|
| coding rate             | k = min(n, d) <= 256 (float64: 233)        | potrf, by PyTorch         |
| alpha = 2               | k <= 256                                   | PyTorch                   |
| other alpha, also of    | k <= 235 (float64: 165)                    | XsyevBatched, if there is |
| two views (k = n) and   |                                            | a batch and the library;  |
| of ready Gram matrices  |                                            | PyTorch's syevd           |
| Gram matrix, gradient   | order <= 256                               | PyTorch                   |

Limits for the 227 KiB of shared memory that a block of an H100 or B200 may have; others are in
docs/cuda.md, and :func:`limits` says those of a device. Up to k = 128 (float64: 96) one kernel goes
from features to coding rate or alpha = 2 and weight; everything else goes by way of the Gram
matrix.

Gram matrices are made by tensor cores: float32 in three TF32 products at full accuracy, in one
where precision "high" or "medium" permits it (:func:`at`); 16-bit features in one, exactly, on the
samples side. The fused kernel, every gradient and float64 do without them.

The compiled kernels only enqueue work on the current stream: no host synchronisation, nothing that
depends on values, so that CUDA graphs can capture them; and they are bitwise reproducible. Neither
is promised of the vendor's eigensolvers.

The extension is a library of its own, loaded with this module; ``EXTENSION_ERROR`` says why it
could not be, or is None.
"""

import functools
import importlib
from types import SimpleNamespace

import torch

from . import torch_backend
from .torch_backend import (  # noqa: F401 - the backend's own
    GramParts,
    gram_coding_rate_fwd,
    gram_rational_entropy_fwd,
    matrix_log_bwd,
    matrix_log_fwd,
    rational_entropy_fwd,
)

try:
    importlib.import_module("mmae_fast._C_cuda")
    EXTENSION_ERROR = None
except (ImportError, OSError) as error:
    EXTENSION_ERROR = (
        f"the compiled CUDA extension did not load ({error}); on a machine with the CUDA toolkit,"
        " reinstall with `MMAE_FAST_CUDA=1 pip install --no-build-isolation .`"
    )

_ops = torch.ops.mmae_fast


# Asked for at every call, and always the same: an operator's call costs more than a kernel launch.
@functools.cache
def _largest(ops, is_rate: bool, is_order_2: bool, is_double: bool, device: int) -> int:
    return ops.cuda_max_order(is_rate, 2.0 if is_order_2 else 1.0, is_double, device)


def compiled(z, order: int, alpha: float = 2.0, is_rate: bool = False) -> bool:
    """Whether the compiled kernels take this quantity of matrices of this order, on z's device.

    Products of features have the limit of alpha = 2.
    """
    is_double, device = z.dtype == torch.float64, z.get_device()
    return order <= _largest(_ops, is_rate, alpha == 2, is_double, device)


def gram(z, mask, samples, normalize, center, tf32=False) -> GramParts:
    if compiled(z, z.shape[-2 if samples else -1]):
        return GramParts(*_ops.cuda_gram(z, mask, samples, normalize, center, tf32))
    return torch_backend.gram(z, mask, samples, normalize, center)


def coding_rate_fwd(z, mask, scale, normalize, center, need_weight, tf32=False):
    if compiled(z, min(z.shape[-2:]), is_rate=True):
        return _ops.cuda_coding_rate(z, mask, scale, normalize, center, need_weight, tf32)
    return torch_backend.coding_rate_fwd(z, mask, scale, normalize, center, need_weight)


def has_solver() -> bool:
    """Whether cusolverDnXsyevBatched (CUDA 12.6.2 or newer) is to be had.

    PyTorch's CUDA builds load the library that has it; nothing else is looked for.
    """
    return _ops.cuda_has_solver()


def _eigh_batched(g, want_vectors):
    rows = g.contiguous().clone()
    lam, info = _ops.cuda_eigh_(rows, want_vectors)
    lam = torch.where((info == 0).unsqueeze(-1), lam, torch.nan)
    return lam, rows.mT if want_vectors else None


def _entropy_of_gram(g, alpha, need_weight, overwrite=False):
    if compiled(g, g.shape[-1], alpha):
        return _ops.cuda_gram_entropy(g.contiguous(), alpha, need_weight)
    # Of a batch PyTorch would take one matrix after the other.
    batched = g.shape[:-2].numel() > 1 and has_solver()
    eigh = _eigh_batched if batched else torch_backend.eigh
    return torch_backend.entropy_of_gram(g, alpha, need_weight, overwrite=overwrite, eigh=eigh)


@torch_backend.full_precision
def matrix_entropy_fwd(z, mask, alpha, normalize, center, need_weight, tf32=False):
    if compiled(z, min(z.shape[-2:]), alpha):
        return _ops.cuda_entropy(z, mask, alpha, normalize, center, need_weight, tf32)

    def of_gram(g, need_weight, overwrite):
        return _entropy_of_gram(g, alpha, need_weight, overwrite)

    return torch_backend._entropy_fwd(z, mask, normalize, center, need_weight, gram, of_gram)


@torch_backend.full_precision
def gram_entropy_fwd(g, alpha, need_weight):
    return _entropy_of_gram(g, alpha, need_weight)


def joint_entropy_fwd(z1, z2, mask, alpha, normalize, center, need_weight, tf32=False):
    arguments = (z1, z2, mask, alpha, normalize, center, need_weight)
    of_rows = functools.partial(gram, tf32=tf32)
    return torch_backend.joint_entropy_fwd(*arguments, gram=of_rows, of_gram=_entropy_of_gram)


def limits(is_double: bool = False, device: int = 0) -> dict[str, int]:
    """Largest min(n, d) of the compiled kernels on a device, per quantity."""
    quantities = {
        "coding rate": (True, 0.0),
        "alpha = 2": (False, 2.0),
        "other alpha": (False, 1.0),
    }
    return {
        name: _ops.cuda_max_order(is_rate, alpha, is_double, device)
        for name, (is_rate, alpha) in quantities.items()
    }


def samples_bwd(grad, z, mask, weight):
    if z.shape[-2] > z.shape[-1]:
        return torch_backend.samples_bwd(grad, z, mask, weight)
    return weight_bwd(grad, z, mask, weight, True, False)


def weight_bwd(grad, z, mask, weight, normalize, center):
    if compiled(z, min(z.shape[-2:])):
        grad, weight = grad.contiguous(), weight.contiguous()
        return _ops.cuda_weight_bwd(grad, z, mask, weight, normalize, center)
    return torch_backend.weight_bwd(grad, z, mask, weight, normalize, center)


def gram_bwd(grad, z, mask, parts, samples, normalize, center):
    smaller = samples == (z.shape[-2] <= z.shape[-1])
    if not smaller or not compiled(z, min(z.shape[-2:])):
        return torch_backend.gram_bwd(grad, z, mask, parts, samples, normalize, center)
    v = (grad + grad.mT) / 2
    weight = torch_backend.fold(v, parts, z, mask, samples, normalize, center)
    return weight_bwd(weight.new_ones(z.shape[:-2]), z, mask, weight, normalize, center)


def at(precision: str) -> SimpleNamespace:
    """This module at another of PyTorch's words for the precision of float32 products."""
    own = dict(globals())
    if precision != "highest":
        for function in (gram, coding_rate_fwd, matrix_entropy_fwd, joint_entropy_fwd):
            own[function.__name__] = functools.partial(function, tf32=True)
    return SimpleNamespace(**own)
