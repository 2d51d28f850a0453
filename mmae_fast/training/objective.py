"""What is minimised: the terms of a method's loss, and the backward pass of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from mmae_fast import losses
from mmae_fast.losses import MatrixEntropyRegularizer
from mmae_fast.training.config import METHODS, LossConfig, UserError
from mmae_fast.training.launch import World, synchronise
from mmae_fast.training.models import MaeOutput


class MaskedObjective:
    """Loss terms of a masked autoencoder: reconstruction, regulariser of the class token."""

    terms = ("recon_loss", "regularizer")

    def __init__(self, config: LossConfig, world: World) -> None:
        self.regularizer = build_regularizer(config, world)

    def __call__(self, out: MaeOutput) -> tuple[Tensor, Tensor]:
        return out.loss, self.regularizer(out.features)

    def features(self, out: MaeOutput) -> Tensor:
        return out.features

    def share(self, features: Tensor, step_seconds: float) -> dict[str, float]:
        """Part of a step that the regulariser's forward and backward pass take."""
        return {"regularizer_share": regularizer_seconds(self.regularizer, features) / step_seconds}


class TwoBranchObjective:
    """The loss of two branches, of the projections of two views."""

    terms = ("two_branch_loss",)

    def __init__(self, config: LossConfig, world: World) -> None:
        self.loss: Callable[[Tensor, Tensor], Tensor] = {
            "barlow_twins": partial(losses.barlow_twins_loss, lambd=config.lambd),
            "spectral": partial(losses.spectral_contrastive_loss, mu=config.mu),
            "simclr": partial(losses.info_nce_loss, temperature=config.temperature),
        }[config.method]
        self.ranks = {"process_group": world.group, "grad_scale": config.grad_scale}

    def __call__(self, out: tuple[Tensor, Tensor]) -> tuple[Tensor]:
        return (self.loss(*out, **self.ranks),)

    def share(self, features: Tensor, step_seconds: float) -> dict[str, float]:
        return {}  # the loss is all there is

    def features(self, out: tuple[Tensor, Tensor]) -> Tensor:
        return out[0]


Objective = MaskedObjective | TwoBranchObjective


def build_objective(config: LossConfig, world: World) -> Objective:
    """What turns a model's output into the terms whose sum is minimised."""
    two_branch = METHODS[config.method][0] is None
    return (TwoBranchObjective if two_branch else MaskedObjective)(config, world)


def build_regularizer(config: LossConfig, world: World) -> MatrixEntropyRegularizer:
    try:
        return MatrixEntropyRegularizer(
            METHODS[config.method][0],
            config.weight,
            config.mu,
            config.alpha,
            config.center,
            process_group=world.group,
            grad_scale=config.grad_scale,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def regularizer_seconds(regularizer: nn.Module, features: Tensor, repeats: int = 3) -> float:
    """Median time of the regulariser's forward and backward pass on given features."""
    features = features.detach().requires_grad_()
    times = []
    for _ in range(1 + repeats):
        synchronise(features.device)
        start = time.perf_counter()
        value = regularizer(features)
        if not value.requires_grad:
            return 0.0
        value.backward()
        synchronise(features.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one warms up
