"""The compiled CPU backend: csrc/cpu for everything but eigenvalues of large matrices.

| quantity                         | compiled kernel         | compiled Gram matrix, then LAPACK |
|----------------------------------|-------------------------|-----------------------------------|
| Gram, coding rate, gradient of z | every k = min(n, d)     | -                                 |
| coding rate of a ready Gram      | -                       | potrf, potri                      |
| entropy, alpha = 2, 3, 4 ... 16  | every k                 | -                                 |
| alpha = 1, inf but of float64    | every k                 | -                                 |
| alpha = 1, inf, other alpha      | k <= COMPILED_EIGEN_MAX | syevd                             |
| joint entropy (k = n)            | as the entropy          | as the entropy                    |

csrc/cpu/plan.h has the choice within the compiled kernels, and the limits' measurements.
"""

import torch

from .. import _C  # noqa: F401 - importing _C registers the operators
from . import torch_backend
from .torch_backend import (  # noqa: F401 - the backend's own
    GramParts,
    gram_coding_rate_fwd,
    gram_rational_entropy_fwd,
    matrix_log_bwd,
    matrix_log_fwd,
)

COMPILED_EIGEN_MAX = torch.ops.mmae_fast.cpu_max_eigen()

_ops = torch.ops.mmae_fast


def gram(z, mask, samples, normalize, center) -> GramParts:
    return GramParts(*_ops.cpu_gram(z, mask, samples, normalize, center))


def spectral_matrix(vectors, f):
    return _ops.cpu_spectral(vectors.mT.contiguous(), f.contiguous())


def coding_rate_fwd(z, mask, scale, normalize, center, need_weight):
    return _ops.cpu_coding_rate(z, mask, scale, normalize, center, need_weight)


def _compiled_entropy(op, z, alpha, k, *arguments):
    """What the compiled operator makes of z, or None: it does not serve z, or could not decide.

    Large matrices are not decomposed. One that is indefinite by more than rounding comes back as
    NaN, as do those of rows with NaN, which LAPACK's path answers with NaN too.
    """
    if k <= COMPILED_EIGEN_MAX:
        return op(*arguments)
    if not _ops.cpu_serves_entropy(z, alpha, k):
        return None
    result = op(*arguments)
    return None if result[0].isnan().any() else result


def matrix_entropy_fwd(z, mask, alpha, normalize, center, need_weight):
    arguments = (z, mask, alpha, normalize, center, need_weight)
    result = _compiled_entropy(_ops.cpu_entropy, z, alpha, min(z.shape[-2:]), *arguments)
    if result is not None:
        return result
    return torch_backend.matrix_entropy_fwd(*arguments, gram, spectral_matrix)


def rational_entropy_fwd(z, mask, alpha, normalize, center, need_weight):
    arguments = (z, mask, alpha, normalize, center, need_weight)
    return torch_backend.rational_entropy_fwd(*arguments, gram)


def gram_entropy_fwd(g, alpha, need_weight):
    arguments = (g.contiguous(), alpha, need_weight)
    result = _compiled_entropy(_ops.cpu_gram_entropy, g, alpha, g.shape[-1], *arguments)
    if result is not None:
        return result
    return torch_backend.gram_entropy_fwd(g, alpha, need_weight, spectral_matrix)


def joint_entropy_fwd(z1, z2, mask, alpha, normalize, center, need_weight):
    arguments = (z1, z2, mask, alpha, normalize, center, need_weight)
    result = _compiled_entropy(_ops.cpu_joint_entropy, z1, alpha, z1.shape[-2], *arguments)
    if result is not None:
        return result
    return torch_backend.joint_entropy_fwd(*arguments, gram, spectral_matrix)


def _product(grad, z, mask, weight, samples, normalize, center):
    grad, weight = grad.contiguous(), weight.contiguous()
    return _ops.cpu_weight_bwd(grad, z, mask, weight, samples, normalize, center)


def samples_bwd(grad, z, mask, weight):
    return _product(grad, z, mask, weight, True, False, False)


def weight_bwd(grad, z, mask, weight, normalize, center):
    return _product(grad, z, mask, weight, z.shape[-2] <= z.shape[-1], normalize, center)


def gram_bwd(grad, z, mask, parts, samples, normalize, center):
    return _ops.cpu_gram_bwd(grad.contiguous(), z, mask, *parts, samples, normalize, center)
