"""The compiled CUDA backend: csrc/cuda/ for batches of small matrices, PyTorch's libraries above.

| quantity              | compiled kernel                      | PyTorch (torch_backend.py)  |
|-----------------------|--------------------------------------|-----------------------------|
| coding rate, alpha = 2| k = min(n, d) <= 128 (float64: 96)   | above                       |
| other alpha           | -                                    | on the Gram matrix below    |
| Gram matrix           | order <= 128 (float64: 96)           | above                       |
| gradient of z         | where k is as small                  | above                       |

The compiled kernels only enqueue work on the current stream: no host synchronisation, nothing that
depends on values, so that CUDA graphs can capture them; and they are bitwise reproducible. The
limits are what one block's shared memory holds on every GPU from compute capability 8.0 on.

The extension is a library of its own, loaded with this module; ``EXTENSION_ERROR`` says why it
could not be, or is None.
"""

import importlib

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


def compiled(z, order: int, alpha: float = 2.0, is_rate: bool = False) -> bool:
    """Whether the compiled kernels take this quantity of matrices of this order, on z's device.

    Products of features have the limit of alpha = 2.
    """
    limit = _ops.cuda_max_order(is_rate, alpha, z.dtype == torch.float64, z.get_device())
    return order <= limit


def gram(z, mask, samples, normalize, center) -> GramParts:
    if compiled(z, z.shape[-2 if samples else -1]):
        return GramParts(*_ops.cuda_gram(z, mask, samples, normalize, center))
    return torch_backend.gram(z, mask, samples, normalize, center)


def coding_rate_fwd(z, mask, scale, normalize, center, need_weight):
    if compiled(z, min(z.shape[-2:]), is_rate=True):
        return _ops.cuda_coding_rate(z, mask, scale, normalize, center, need_weight)
    return torch_backend.coding_rate_fwd(z, mask, scale, normalize, center, need_weight)


def matrix_entropy_fwd(z, mask, alpha, normalize, center, need_weight):
    if compiled(z, min(z.shape[-2:]), alpha):
        return _ops.cuda_entropy(z, mask, alpha, normalize, center, need_weight)
    return torch_backend.matrix_entropy_fwd(z, mask, alpha, normalize, center, need_weight, gram)


def gram_entropy_fwd(g, alpha, need_weight):
    if compiled(g, g.shape[-1], alpha):
        return _ops.cuda_gram_entropy(g.contiguous(), alpha, need_weight)
    return torch_backend.gram_entropy_fwd(g, alpha, need_weight)


def joint_entropy_fwd(z1, z2, mask, alpha, normalize, center, need_weight):
    return torch_backend.joint_entropy_fwd(
        z1, z2, mask, alpha, normalize, center, need_weight, gram
    )


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
