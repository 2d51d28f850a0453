"""The Triton backend: kernels/ for products and small factors, PyTorch's libraries for the rest.

| quantity       | Triton kernel                                 | PyTorch (torch_backend.py)      |
|----------------|-----------------------------------------------|---------------------------------|
| coding rate    | k = min(n, d) <= 64 (16-bit, not centred: 128,| Cholesky factor of larger ones  |
|                | but for sm_100); the Gram matrix above        |                                 |
| alpha = 2      | every k; nothing k x k without a gradient     | -                               |
| other alpha    | Gram matrix                                   | eigenvalues                     |
| Gram, gradient | every size, either side                       | -                               |
| float64        | -                                             | all: the kernels are made for   |
|                |                                               | tensor cores                    |

float32 is multiplied as 3xTF32, at full accuracy; precision "high" and "medium" both permit TF32,
about 2^-12 per factor (:func:`at`). 16-bit features are multiplied as they are, and what has to be
rounded on the way is kept in parts (kernels/tiles.py): there is nothing to permit.

The kernels only enqueue work: no host synchronisation, nothing that depends on values, so that CUDA
graphs can capture them once they are compiled (call once before the capture); no float atomics, so
that runs agree bitwise. Besides results they need O(n + d) numbers, and the workspaces that
kernels/gram.py and product.py state; a batch whose leading strides do not merge is copied.
"""

from functools import cache, partial, wraps
from types import SimpleNamespace

import torch

from ..kernels import coding_rate as small
from ..kernels import configs, product, rows
from ..kernels import gram as grams
from . import torch_backend
from .torch_backend import (  # noqa: F401 - the backend's own
    GramParts,
    full_precision,
    gram_coding_rate_fwd,
    gram_entropy_fwd,
    gram_rational_entropy_fwd,
    matrix_log_bwd,
    matrix_log_fwd,
)

FULL = "tf32x3"


def on_its_device(function):
    """Kernels go to the current device: make it that of the tensors. No autocast, see there."""

    @wraps(function)
    def wrapped(*args, **options):
        tensor = next(a for a in args if isinstance(a, torch.Tensor))
        with torch.cuda.device_of(tensor):
            return full_precision(function)(*args, **options)

    return wrapped


def served(z) -> bool:
    """float64 and empty features are PyTorch's."""
    return z.dtype != torch.float64 and z.numel() > 0


def flat(z, mask):
    """One batch dimension for z (..., n, d) and mask (..., n)."""
    batch = z.shape[:-2].numel()
    z = z.reshape(batch, *z.shape[-2:])
    return z, None if mask is None else mask.reshape(batch, -1).contiguous()


def row_parts(z, mask, normalize, center, precision, in_range=False):
    """Row scale (batch, n), and mean row (batch, d) if centred."""
    tf32 = precision == "tf32" and z.dtype == torch.float32 and not center
    scale = rows.row_scale(z, mask, normalize, in_range, tf32)
    return scale, rows.mean_row(z, scale, mask) if center else None


def fold(v, g, scale, mean, z, mask, normalize):
    """V -> W' on the samples side, (batch, n, n): torch_backend.fold without a copy of z."""
    dots = None
    if mean is not None:
        dots = rows.mean_dots(z, scale, mean, mask) if normalize else None
        kept = torch.ones_like(scale) if mask is None else mask.to(v.dtype)
        count = kept.sum(-1).clamp(min=1)[..., None, None]
        for side in (-1, -2):
            v = v - (v * kept.unsqueeze(-3 - side)).sum(side, keepdim=True) / count
        v = v * kept.unsqueeze(-1) * kept.unsqueeze(-2)
    if normalize:
        s = torch.linalg.vecdot(v, g)
        if dots is not None:
            s = s + (v @ dots.unsqueeze(-1)).squeeze(-1)
        v.diagonal(dim1=-2, dim2=-1).sub_(s)
    return v.mul_(2 * scale.unsqueeze(-1)).mul_(scale.unsqueeze(-2))


@on_its_device
def gram(z, mask, samples, normalize, center, precision=FULL) -> GramParts:
    if not served(z):
        return torch_backend.gram(z, mask, samples, normalize, center)
    shape, (z, mask) = z.shape, flat(z, mask)
    scale, mean = row_parts(z, mask, normalize, center, precision)
    g = grams.gram(z, scale, mean, mask, samples, unit=normalize, precision=precision)
    mean = scale.new_zeros(z.shape[0], z.shape[2]) if mean is None else mean
    return GramParts(*(x.reshape(shape[:-2] + x.shape[1:]) for x in (g, scale, mean)))


@on_its_device
def coding_rate_fwd(z, mask, scale, normalize, center, need_weight, precision=FULL):
    if not served(z):
        return torch_backend.coding_rate_fwd(z, mask, scale, normalize, center, need_weight)
    batch, (z, mask) = z.shape[:-2], flat(z, mask)
    n, d = z.shape[1:]
    samples = n <= d
    s, mean = row_parts(z, mask, normalize, center, precision)
    if min(n, d) <= configs.largest_coding_rate(
        z.dtype, center, configs.architecture(z.device.index)
    ):
        value, weight, g = small.coding_rate(
            z, s, mean, mask, scale, samples, normalize, need_weight, precision=precision
        )
        folded = g is None
    else:
        # A factor reads one triangle, and of the transpose that is the one there is.
        g = grams.gram(
            z, s, mean, mask, samples, unit=normalize, full=need_weight, precision=precision
        )
        symmetric = g if need_weight else g.mT
        value, weight = torch_backend.coding_rate_of_gram(symmetric, scale, need_weight)
        folded = False
    if need_weight and not folded:
        weight = fold(weight, g, s, mean, z, mask, normalize) if samples else weight.mul_(2)
    if need_weight:
        weight = weight.reshape(*batch, *weight.shape[1:])
    return value.reshape(batch), weight


@on_its_device
def matrix_entropy_fwd(z, mask, alpha, normalize, center, need_weight, precision=FULL):
    arguments = (mask, alpha, normalize, center, need_weight)
    if not served(z):
        return torch_backend.matrix_entropy_fwd(z, *arguments)
    batch, (z, mask) = z.shape[:-2], flat(z, mask)
    samples = z.shape[1] <= z.shape[2]
    # Without normalisation one factor per matrix keeps squares in range; entropies do not see it.
    scale, mean = row_parts(z, mask, normalize, center, precision, in_range=True)
    rest = (z, scale, mean, mask, samples)
    if alpha == 2 and not need_weight:
        square, trace = grams.moments(*rest, unit=normalize, precision=precision).unbind(-1)
        return renyi2(square, trace).reshape(batch), None
    g = grams.gram(*rest, unit=normalize, precision=precision)
    h, v = torch_backend.entropy_of_gram(g, alpha, need_weight)
    if not need_weight:
        return h.reshape(batch), None
    if samples:
        v = fold(v, g, scale, mean, z, mask, normalize)
    else:
        v = v.mul_(2) if normalize else v.mul_(2 * scale.amax(-1).square()[:, None, None])
    return h.reshape(batch), v.reshape(*batch, *v.shape[1:])


def renyi2(square, trace):
    """H_2 from ||G||² and tr G (batch,), float64; NaN where z had NaN or Inf."""
    empty = trace == 0
    h = 2 * torch.where(empty, 1, trace).log() - torch.where(empty, 1, square).log()
    return (torch.where(empty, 0, h) + (trace - trace)).float()


@on_its_device
def rational_entropy_fwd(z, mask, alpha, normalize, center, need_weight, precision=FULL):
    arguments = (z, mask, alpha, normalize, center, need_weight)
    return torch_backend.rational_entropy_fwd(*arguments, partial(gram, precision=precision))


@on_its_device
def joint_entropy_fwd(z1, z2, mask, alpha, normalize, center, need_weight, precision=FULL):
    return torch_backend.joint_entropy_fwd(
        z1, z2, mask, alpha, normalize, center, need_weight, partial(gram, precision=precision)
    )


def _product(grad, z, mask, weight, samples, normalize, center, precision):
    shape, (z, mask) = z.shape, flat(z, mask)
    scale, mean = (None, None) if samples else row_parts(z, mask, normalize, center, precision)
    k = weight.shape[-1]
    grad, weight = grad.reshape(-1).contiguous(), weight.reshape(-1, k, k).contiguous()
    out = product.weight_product(
        grad, z, scale, mean, mask, weight, samples, normalize, precision=precision
    )
    return out.reshape(shape)


@on_its_device
def samples_bwd(grad, z, mask, weight, precision=FULL):
    if not served(z):
        return torch_backend.samples_bwd(grad, z, mask, weight)
    return _product(grad, z, mask, weight, True, False, False, precision)


@on_its_device
def weight_bwd(grad, z, mask, weight, normalize, center, precision=FULL):
    if not served(z):
        return torch_backend.weight_bwd(grad, z, mask, weight, normalize, center)
    samples = z.shape[-2] <= z.shape[-1]
    return _product(grad, z, mask, weight, samples, normalize, center, precision)


@on_its_device
def gram_bwd(grad, z, mask, parts, samples, normalize, center, precision=FULL):
    if not served(z):
        return torch_backend.gram_bwd(grad, z, mask, parts, samples, normalize, center)
    v = (grad + grad.mT) / 2
    if samples:
        x, m = flat(z, mask)
        k = v.shape[-1]
        g, s, mean = (p.reshape(x.shape[0], *p.shape[z.dim() - 2 :]) for p in parts)
        weight = fold(v.reshape(-1, k, k), g, s, mean if center else None, x, m, normalize)
    else:
        weight = v.mul_(2)
    ones = weight.new_ones(z.shape[:-2])
    return _product(ones, z, mask, weight, samples, normalize, center, precision)


@cache
def at(precision: str) -> SimpleNamespace:
    """This module at another of PyTorch's words for the precision of float32 products."""
    own = dict(globals())
    if precision != "highest":
        functions = (gram, coding_rate_fwd, matrix_entropy_fwd, rational_entropy_fwd)
        for function in (*functions, joint_entropy_fwd, samples_bwd, weight_bwd, gram_bwd):
            own[function.__name__] = partial(function, precision="tf32")
    return SimpleNamespace(**own)
