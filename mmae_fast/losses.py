"""Losses of masked autoencoders that regularise by matrix entropy, and all other losses by name.

Every loss is a number to minimise, computed in float32 whatever autocast says.

[1] Information Flow in Self-Supervised Learning, ICML 2024, arXiv:2309.17281 (M-MAE).
[2] How Mask Matters, NeurIPS 2022, arXiv:2210.08344 (U-MAE).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .coding_rates import coding_rate_reduction, emp_ssl_tcr
from .distributed import Shards, over_ranks
from .ops import (
    fast_coding_rate,
    fast_matrix_entropy,
    reduced_coding_rate,
    reduced_gram,
)
from .reference import accumulation_dtype
from .two_branch import (
    barlow_twins_loss,
    info_nce_loss,
    ivne_loss,
    matrix_alignment_loss,
    matrix_uniformity_loss,
    spectral_contrastive_loss,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "MatrixEntropyRegularizer",
    "barlow_twins_loss",
    "coding_rate_reduction",
    "emp_ssl_tcr",
    "info_nce_loss",
    "ivne_loss",
    "matrix_alignment_loss",
    "matrix_uniformity_loss",
    "spectral_contrastive_loss",
    "tcr_loss",
    "uniformity_loss",
]


def _reduced_tcr(shards: Shards, z, mu, center, backend) -> Tensor:
    return -reduced_coding_rate(shards, z, mu / z.shape[-1], center=center, backend=backend)


@over_ranks("z", reduced=_reduced_tcr)
def tcr_loss(
    z: Tensor,
    mu: float = 1.0,
    center: bool = False,
    *,
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Negative total coding rate of normalised features ([1], the regulariser of M-MAE).

    Equivalent to ``-logdet(I_d + mu / d · ẐᵀẐ)``, Ẑ the row-normalised features.

    Args:
        z: features, shape ``(..., n, d)``, float32/bfloat16/float16/float64.
        mu: dimensionless, > 0; 1 (ViT-B) or 3 (ViT-L) in the published code. (The paper writes
            ``log det(mu I + ZZᵀ)``: its mu is the inverse of the code's.)
        center: subtract the mean row after normalisation.
        process_group, grad_scale, backend: see :func:`mmae_fast.fast_matrix_entropy`. The published
            code is ``grad_scale="sum"``: averaged over W ranks, its weight acts as 1/W of itself.
    Returns: shape ``(...)``, float32 (float64 for float64 input), in nats.
    Raises: TypeError, ValueError: as :func:`mmae_fast.fast_coding_rate`.
    """
    return -fast_coding_rate(z, mu / z.shape[-1], center=center, backend=backend)


def _reduced_uniformity(shards: Shards, z, backend) -> Tensor:
    return reduced_gram(shards, z, backend=backend).square().sum((-2, -1)) / shards.rows**2


@over_ranks("z", reduced=_reduced_uniformity)
def uniformity_loss(
    z: Tensor,
    *,
    process_group: ProcessGroup | None = None,
    grad_scale: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Mean squared cosine similarity of all pairs ([2], the regulariser of U-MAE).

    Equivalent to ``(Ẑ Ẑᵀ).square().mean((-2, -1))``, and computed as ``(m/n)² exp(-H_2(Ẑ))``, m the
    number of rows that are not zero: for unit rows the trace of the Gram matrix is m, so
    ``H_2 = -log(||G||² / m²)``, which takes neither a factor nor, without a gradient, G itself.

    Args:
        z: features, shape ``(..., n, d)``.
        process_group, grad_scale, backend: see :func:`mmae_fast.fast_matrix_entropy`.
    Returns: shape ``(...)``, float32 (float64 for float64 input), dimensionless.
    """
    concentration = (-fast_matrix_entropy(z, 2.0, backend=backend)).exp()
    rows = (torch.linalg.vector_norm(z.detach(), 0, dim=-1) > 0).sum(-1)
    return concentration * (rows.to(concentration.dtype).square() / z.shape[-2] ** 2)


class MatrixEntropyRegularizer(nn.Module):
    """The term that is added to a reconstruction loss.

    | kind          | term                                 | method     |
    |---------------|--------------------------------------|------------|
    | "none"        | 0                                    | MAE        |
    | "uniformity"  | weight · mean_ij (ẑ_i·ẑ_j)²          | U-MAE [2]  |
    | "tcr"         | -weight · log det(I + mu/d ẐᵀẐ)      | M-MAE [1]  |
    | "von_neumann" | -weight · H_1(Ẑ)                     |            |
    | "renyi"       | -weight · H_alpha(Ẑ)                 |            |

    Args:
        kind: a row of the table.
        weight: lambda, >= 0; 0.01 in [1] and [2].
        mu: for "tcr".
        alpha: order, for "renyi".
        center: subtract the mean row after normalisation (not for "uniformity").
        process_group, grad_scale, backend: see :func:`mmae_fast.fast_matrix_entropy`. (A module
            that holds a group cannot be copied or pickled.)
    Raises:
        ValueError: unknown kind, negative weight, or centring asked of "uniformity".
    """

    KINDS = ("none", "uniformity", "tcr", "von_neumann", "renyi")

    def __init__(
        self,
        kind: str = "none",
        weight: float = 0.01,
        mu: float = 1.0,
        alpha: float = 2.0,
        center: bool = False,
        process_group: ProcessGroup | None = None,
        grad_scale: str = "mean",
        backend: str = "auto",
    ):
        super().__init__()
        if kind not in self.KINDS:
            raise ValueError(f"kind must be one of {self.KINDS}, got {kind!r}")
        if not weight >= 0:
            raise ValueError(f"weight must be >= 0, got {weight!r}")
        if kind == "uniformity" and center:
            raise ValueError("center=True is not defined for kind 'uniformity'")
        self.kind, self.weight, self.mu, self.alpha = kind, weight, mu, alpha
        self.center = center
        self.options = {
            "process_group": process_group,
            "grad_scale": grad_scale,
            "backend": backend,
        }

    def forward(self, z: Tensor) -> Tensor:
        """z (..., n, d) -> the weighted term, shape (...)."""
        if self.kind == "none":
            return z.new_zeros(z.shape[:-2], dtype=accumulation_dtype(z.dtype))
        if self.kind == "uniformity":
            return self.weight * uniformity_loss(z, **self.options)
        if self.kind == "tcr":
            return self.weight * tcr_loss(z, self.mu, self.center, **self.options)
        alpha = 1.0 if self.kind == "von_neumann" else self.alpha
        h = fast_matrix_entropy(z, alpha, center=self.center, **self.options)
        return -self.weight * h

    def extra_repr(self) -> str:
        names = ("kind", "weight", "mu", "alpha", "center")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
