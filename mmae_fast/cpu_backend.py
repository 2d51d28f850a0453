"""The compiled CPU backend: csrc/cpu for everything but the eigenvectors of large matrices.

| quantity                 | compiled kernel          | LAPACK on the compiled Gram matrix |
|--------------------------|--------------------------|------------------------------------|
| Gram, alpha = 2          | every k = min(n, d)      | -                                  |
| coding rate              | every k                  | -                                  |
| von Neumann, other alpha | k <= COMPILED_EIGEN_MAX  | syevd                              |
| gradient of z            | every k                  | -                                  |

The limit is where the two columns cross on two cores: the compiled eigensolver works on one matrix
per thread.
"""

import torch

from . import _C, torch_backend  # noqa: F401 - importing _C registers the operators
from .torch_backend import (  # noqa: F401 - the backend's own
    GramParts,
    gram_entropy_fwd,
    matrix_log_bwd,
    matrix_log_fwd,
)

COMPILED_EIGEN_MAX = torch.ops.mmae_fast.cpu_max_eigen()

_ops = torch.ops.mmae_fast


def gram(z, mask, samples, normalize, center) -> GramParts:
    return GramParts(*_ops.cpu_gram(z, mask, samples, normalize, center))


def coding_rate_fwd(z, mask, scale, normalize, center, need_weight):
    return _ops.cpu_coding_rate(z, mask, scale, normalize, center, need_weight)


def matrix_entropy_fwd(z, mask, alpha, normalize, center, need_weight):
    if alpha == 2 or min(z.shape[-2:]) <= COMPILED_EIGEN_MAX:
        return _ops.cpu_entropy(z, mask, alpha, normalize, center, need_weight)
    return torch_backend.matrix_entropy_fwd(z, mask, alpha, normalize, center, need_weight, gram)


def joint_entropy_fwd(z1, z2, mask, alpha, normalize, center, need_weight):
    return torch_backend.joint_entropy_fwd(
        z1, z2, mask, alpha, normalize, center, need_weight, gram
    )


def samples_bwd(grad, z, mask, weight):
    if z.shape[-2] > z.shape[-1]:  # the compiled product works on the smaller side
        return torch_backend.samples_bwd(grad, z, mask, weight)
    return weight_bwd(grad, z, mask, weight, True, False)


def weight_bwd(grad, z, mask, weight, normalize, center):
    grad, weight = grad.contiguous(), weight.contiguous()
    return _ops.cpu_weight_bwd(grad, z, mask, weight, normalize, center)


@torch_backend.full_precision
def gram_bwd(grad, z, mask, parts, samples, normalize, center):
    if samples != (z.shape[-2] <= z.shape[-1]):  # the compiled product works on the smaller side
        return torch_backend.gram_bwd(grad, z, mask, parts, samples, normalize, center)
    v = (grad + grad.mT) / 2
    weight = torch_backend.fold(v, parts, z, mask, samples, normalize, center)
    return weight_bwd(weight.new_ones(z.shape[:-2]), z, mask, weight, normalize, center)
