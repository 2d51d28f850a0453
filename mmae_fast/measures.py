"""Measures of frozen features: entropies, ranks, decay of the spectrum, what two views share.

[1] Garrido et al., RankMe, ICML 2023, arXiv:2210.02885.
[2] Stringer et al., High-dimensional geometry of population responses in visual cortex, Nature
    2019 (the power law of the eigenvalues).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmae_fast import fast_matrix_entropy
from mmae_fast.information import joint_entropy

ORDERS = (1, 2)  # alpha of every entropy here
SMALLEST_FIT = 5  # eigenvalues below which no power law is fitted


@torch.no_grad()
def shared_information(z1: Tensor, z2: Tensor, center: bool = False) -> dict[str, float]:
    """What two views of the same n samples share, in nats, for alpha = 1 and 2.

    ``entropy_α``: mean of the two views' H_α; ``joint_entropy_α``: H_α of the Hadamard product of
    their Gram matrices; ``mutual_information_α = 2 entropy_α − joint_entropy_α``;
    ``effective_rank = exp(entropy_1)``.

    Args: z1, z2: shapes ``(n, d1)`` and ``(n, d2)``; rows are normalised.
    """
    out = {}
    for alpha in ORDERS:
        single = [fast_matrix_entropy(z, alpha, center=center) for z in (z1, z2)]
        joint = joint_entropy(z1, z2, alpha, center=center)
        mean, joint = ((single[0] + single[1]) / 2).item(), joint.item()
        out[f"entropy_{alpha}"] = mean
        out[f"joint_entropy_{alpha}"] = joint
        out[f"mutual_information_{alpha}"] = 2 * mean - joint
    out["effective_rank"] = math.exp(out["entropy_1"])
    return out


@torch.no_grad()
def spectral_measures(z: Tensor, center: bool = False) -> dict[str, float | list[float]]:
    """Entropies (nats), ranks and spectrum of features ``(n, d)``.

    ``entropy_1``, ``entropy_2`` and ``effective_rank = exp(entropy_1)`` are of ``ρ = ẐᵀẐ / n``, Ẑ
    the rows scaled to unit norm; ``spectrum`` its eigenvalues, largest first, ``slope`` the
    exponent of their decay (``power_law``) and ``fit_range`` the indices that it was fitted to.
    ``rankme`` is of Z itself: see ``rankme``.
    """
    values = spectrum(z, center)
    slope, first, last = power_law(values)
    entropies = {f"entropy_{alpha}": _entropy(z, alpha, center) for alpha in ORDERS}
    return {
        **entropies,
        "effective_rank": math.exp(entropies["entropy_1"]),
        "rankme": rankme(z),
        "slope": slope,
        "fit_range": [first, last],
        "spectrum": values.tolist(),
    }


def _entropy(z: Tensor, alpha: float, center: bool) -> float:
    return fast_matrix_entropy(z, alpha, center=center).item()


def spectrum(z: Tensor, center: bool = False) -> Tensor:
    """Eigenvalues of ``ρ = ẐᵀẐ / tr(ẐᵀẐ)``, the min(n, d) that can differ from zero, largest first.

    Ẑ ``(n, d)``: the rows of z scaled to unit norm (a zero row stays zero), then centred if asked.
    """
    z = F.normalize(z.double(), dim=1)
    if center:
        z = z - z.mean(dim=0)
    gram = z.T @ z if z.shape[1] <= z.shape[0] else z @ z.T
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)


def rankme(z: Tensor) -> float:
    """RankMe [1]: exp of the entropy of ``p = σ / Σσ``, σ the singular values of Z ``(n, d)``.

    Not the effective rank of ``ρ``: singular values instead of their squares, rows as they are.
    """
    sigma = torch.linalg.svdvals(z.double())
    share = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny)
    return torch.special.entr(share).sum().exp().item()


def power_law(values: Tensor) -> tuple[float, int, int]:
    """Exponent a of ``λ_i ∝ i^(−a)`` [2] by least squares in log-log, and the indices fitted.

    Fitted to i = k/20 … k/2 (counted from 1, at least 2), without eigenvalues below 1e-9 of the
    first: the first ones bend away, the last ones are noise. NaN for fewer than 5.

    Args: values: eigenvalues, largest first, shape ``(k,)``.
    """
    first, last = max(2, round(len(values) / 20)), round(len(values) / 2)
    last = min(last, int((values > 1e-9 * values[:1]).sum()))
    if last - first + 1 < SMALLEST_FIT:
        return math.nan, first, last
    x = torch.arange(first, last + 1, dtype=torch.float64).log()
    y = values[first - 1 : last].double().log().cpu()
    x = x - x.mean()
    return -((x @ y) / (x @ x)).item(), first, last


@torch.no_grad()
def token_entropy(tokens: Tensor, alpha: float = 1.0, center: bool = False) -> Tensor:
    """H_alpha (nats) of the tokens of each image: ``(B, T, D)`` to ``(B,)``."""
    return fast_matrix_entropy(tokens, alpha, center=center)
