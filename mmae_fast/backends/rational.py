"""The von Neumann entropy of a Gram matrix without eigenvalues: a sum of shifted inverses.

With ``B = rho / s``, ``s = ||rho||_F``, whose eigenvalues x are in [0, 1],

    H = s tr f(B) - log s,    f(x) = -x log x  ≈  sum_i w_i x / (x + u_i) + b x

for fixed poles u_i > 0. Every term takes one Cholesky factor of ``B + u_i I`` and its inverse
``X_i``; no term waits for another. As ``d/dx x / (x + u) = u / (x + u)²``,

    dH/dG = (S - tr(rho S) I) / tr G,    S = sum_i w_i u_i X_i²

(the derivative of the exact H, approximated: s and b only add a multiple of I, which rho takes away
again). The poles are those of the best approximation; benchmarks/rational.py derives them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import factor

# Numbers that the shifted matrices of several poles may have together: below, one call serves them.
TOGETHER = 1 << 20


class Poles(NamedTuple):
    shifts: tuple[float, ...]  # u_i, ascending
    weights: tuple[float, ...]  # w_i
    slope: float  # b
    largest_error: float  # of f on [0, 1]


POLES = {
    8: Poles(
        shifts=(
            7.84673937119576e-06,
            0.000144013844821105,
            0.00120320168654476,
            0.00699579997136239,
            0.0329385654129001,
            0.138788082634278,
            0.604572916111776,
            4.39455810974527,
        ),
        weights=(
            2.91011821646113e-05,
            0.000344980034125278,
            0.00229398037411551,
            0.0114522625850839,
            0.0486525865284878,
            0.197177529438369,
            0.956401627160575,
            12.1323048511274,
        ),
        slope=-3.07932246384605,
        largest_error=4.77e-07,
    ),
    16: Poles(
        shifts=(
            6.10643608063024e-09,
            1.12056178491461e-07,
            9.35312603766036e-07,
            5.41413148222373e-06,
            2.50507745501963e-05,
            9.92353920908641e-05,
            0.000350129826870489,
            0.00112856279625909,
            0.00338285291926079,
            0.00956130295014335,
            0.0258089154232393,
            0.0675561821735842,
            0.175712748937431,
            0.477260155054132,
            1.53600369467316,
            9.42549727085981,
        ),
        weights=(
            2.26466634293147e-08,
            2.68386819739601e-07,
            1.78142874083445e-06,
            8.8179636744715e-06,
            3.62223885207392e-05,
            0.000130354762397002,
            0.000424411873415132,
            0.00127702034809658,
            0.00360702639770544,
            0.00969337816328688,
            0.0251539120861791,
            0.0644281966255072,
            0.169687301277615,
            0.501672954466711,
            2.06710654270136,
            25.0578265934965,
        ),
        slope=-3.80248767966639,
        largest_error=3.71e-10,
    ),
}

# The rounding of a Gram matrix moves its eigenvalues by a few eps of the largest, which has to stay
# well below the smallest pole, where B + u I must be positive definite and well enough conditioned.
# More poles reach closer to zero: for float32 8 of them (7.8e-6), for float64 16 (6.1e-9).
COUNT = {torch.float32: 8, torch.float64: 16}


def von_neumann_of_gram(
    g: Tensor, need_weight: bool, overwrite: bool = False
) -> tuple[Tensor, Tensor | None]:
    """H_1 of ``G / tr G``, ``(..., k, k)`` to ``(...)``, and ``V = dH/dG``.

    NaN where G has NaN or Inf. Besides G it takes k² numbers for B (none if ``overwrite`` lets B
    have the place of G), k² for V, and 2k² for the shifted inverses and their products with B, or
    2 TOGETHER if that is more.
    """
    poles = POLES[COUNT[g.dtype]]
    trace = g.diagonal(dim1=-2, dim2=-1).sum(-1)
    empty = trace == 0
    tau = torch.where(empty, 1, trace)
    b = torch.div(g, tau[..., None, None], out=g if overwrite else None)  # rho
    scale = torch.linalg.vector_norm(b, dim=-1).double().square().sum(-1).sqrt()
    scale = torch.where(empty, 1, scale).to(b.dtype)
    b /= scale[..., None, None]
    total = torch.zeros(g.shape[:-2], dtype=torch.float64, device=g.device)
    s = torch.zeros_like(b) if need_weight else None
    together = max(1, min(len(poles.shifts), TOGETHER // max(g.numel(), 1)))
    for first in range(0, len(poles.shifts), together):
        span = slice(first, first + together)
        x = _shifted_inverses(b, poles.shifts[span])
        for w, u, inverse in zip(poles.weights[span], poles.shifts[span], x, strict=True):
            total += w * torch.linalg.vecdot(b, inverse).double().sum(-1)
            if s is not None:
                _add_square(s, inverse, w * u)
        del x, inverse  # before the next are made
    h = scale.double() * total + poles.slope - scale.double().log()
    h = torch.where(empty, 0, h.to(g.dtype))
    if s is None:
        return h, None
    mean = scale * torch.linalg.vecdot(b, s).double().sum(-1).to(g.dtype)  # tr(rho S)
    s.diagonal(dim1=-2, dim2=-1).sub_(mean.unsqueeze(-1))
    return h, s.div_(tau[..., None, None]).masked_fill_(empty[..., None, None], 0)


def _shifted_inverses(b: Tensor, shifts: tuple[float, ...]) -> Tensor:
    """``(B + u I)⁻¹`` for every u, stacked in front; NaN where B + u I has no Cholesky factor."""
    a = b.expand(len(shifts), *b.shape).clone(memory_format=torch.contiguous_format)
    for own, u in zip(a, shifts, strict=True):  # as scalars: a tensor would have to come over
        own.diagonal(dim1=-2, dim2=-1).add_(u)
    return factor.inverse(factor.factorise(a)[0])


def _add_square(s: Tensor, x: Tensor, weight: float) -> None:
    """s += weight x²."""
    if s.dim() == 2:
        s.addmm_(x, x, alpha=weight)
    else:
        s.flatten(0, -3).baddbmm_(x.flatten(0, -3), x.flatten(0, -3), alpha=weight)
