"""One update of the weights, decided on the device: the host gives orders and does not wait."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmae_fast.accumulate import accumulate_gradients
from mmae_fast.training.batch_norm import BatchNorm
from mmae_fast.training.config import PretrainConfig, UserError
from mmae_fast.training.launch import World, wrap
from mmae_fast.training.objective import Objective

Phase = Callable[[str], AbstractContextManager[Any]]


def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from zero, then half a cosine down to zero."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


class TrainingStep:
    """Forward and backward pass, clipping, AdamW, moving average of the weights.

    A step whose gradient has a NaN or an infinity leaves all of them as they were, and BatchNorm's
    statistics; the gradients are averaged over the processes before, so that all decide alike.

    Args:
        model: on the device of ``world``; sharded in place where the configuration says so.
        phase: context managers around "forward", "loss", "backward" (or, with accumulation, all
            "parts") and "optimizer", for a profile.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: PretrainConfig,
        world: World,
        phase: Phase = lambda name: nullcontext(),
    ) -> None:
        self.model, self.objective, self.config, self.world = model, objective, config, world
        self.phase = phase
        if config.compile:
            compile_blocks(model)
        self.network = wrap(model, world, config.shard)
        self.optimizer = torch.optim.AdamW(
            param_groups_weight_decay(model, config.weight_decay),
            lr=config.base_lr,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.params = dict(model.named_parameters())
        for param in self.params.values():
            # What AdamW's first step would make; here it has a place to be loaded into.
            self.optimizer.state[param] = {
                "step": torch.zeros((), device=world.device),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }
        averaged = self.params if config.ema is not None else {}
        self.average = {name: param.detach().clone() for name, param in averaged.items()}
        self.running = [
            buffer
            for module in model.modules()
            if isinstance(module, BatchNorm)
            for buffer in module.buffers()
        ]
        # Since the last reading: steps done, sums of the loss and its terms over them; skipped in
        # all, in a row now, and in a row at most.
        self.sums = torch.zeros(2 + len(objective.terms), device=world.device)
        self.skipped = torch.zeros(3, dtype=torch.int64, device=world.device)

    def __call__(self, inputs: tuple[Tensor, ...], lr: float) -> Tensor:
        """Update with this process's part of a batch; return the features that the loss saw."""
        running = [buffer.clone() for buffer in self.running]
        gradients = self._gradients if self.config.accumulate == 1 else self._gradients_in_parts
        features, terms = gradients(inputs)
        with self.phase("optimizer"), torch.no_grad():
            norm = nn.utils.get_total_norm([p.grad for p in self.params.values()])
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            bad = ~norm.isfinite()
            for buffer, before in zip(self.running, running, strict=True):
                torch.where(bad, before, buffer, out=buffer)
            self._update(norm, bad, lr)
            self._count(terms, bad)
        return features

    def _gradients(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Leave the gradients in the parameters; return features and the terms of the loss."""
        with self.phase("forward"):
            out = self._forward(inputs)
        with self.phase("loss"):
            terms = self.objective(out)
        with self.phase("backward"):
            sum(terms).backward()
        return self.objective.features(out).detach(), torch.stack(terms).detach()

    def _gradients_in_parts(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The same, holding the activations of one part of the batch at a time."""
        parts = list(zip(*(x.chunk(self.config.accumulate) for x in inputs), strict=True))
        regularizer = self.objective.regularizer
        losses, seen = [], []

        def forward(part: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            if torch.is_grad_enabled():
                out = self._forward(part)
                losses.append(out.loss.detach())
                seen.append(out.features.detach())
                return out.loss, out.features
            # The first of two passes is for the features, and for nothing without a regulariser.
            images = part[0]
            if regularizer.kind == "none":
                return images.new_zeros(()), images.new_zeros(len(images), 1)
            return images.new_zeros(()), self._forward(part, features_only=True)

        with self.phase("parts"):
            _, term = accumulate_gradients(self.network, forward, parts, regularizer)
        return torch.cat(seen), torch.stack([torch.stack(losses).mean(), term])

    def _forward(self, inputs: tuple[Tensor, ...], **options: bool) -> Any:
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=bf16):
            return self.network(*inputs, **options)

    def _update(self, norm: Tensor, bad: Tensor, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # The fused kernel takes both as GradScaler's: it divides the gradients by the first, and
        # does nothing, not even count, where the second is not zero.
        if self.config.clip_grad is not None:
            self.optimizer.grad_scale = (norm / self.config.clip_grad).clamp(min=1).float()
        self.optimizer.found_inf = bad.float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            weight = (1 - self.config.ema) * (~bad).float()
            for name, average in self.average.items():
                average.lerp_(self.params[name], weight)

    def _count(self, terms: Tensor, bad: Tensor) -> None:
        values = torch.cat([terms.new_ones(1), terms.sum().unsqueeze(0), terms])
        self.sums += torch.where(bad, 0.0, values)
        in_all, in_a_row, at_most = self.skipped.unbind()
        in_all += bad
        in_a_row += 1
        in_a_row *= bad
        torch.maximum(at_most, in_a_row, out=at_most)

    def read(self) -> dict[str, float]:
        """Means of the loss and its terms since ``restart``, and the steps skipped in all.

        Waits for the device. Raises: UserError: too many steps in a row were skipped.
        """
        self.world.mean(self.sums)
        skipped, _, at_most = self.skipped.tolist()
        if at_most >= self.config.max_skipped:
            raise UserError(
                f"{at_most} steps in a row had a gradient that is not finite; lower --base-lr or "
                "set --clip-grad"
            )
        done, *sums = self.sums.tolist()
        means = (value / done if done else math.nan for value in sums)
        names = ("loss", *self.objective.terms)
        return dict(zip(names, means, strict=True)) | {"skipped_steps": skipped}

    def doubtful(self) -> bool:
        """Whether the last step was skipped: the weights may be of no use any more.

        Waits for the device. Raises: as ``read``.
        """
        self.read()
        return bool(self.skipped[1])

    def restart(self) -> None:
        """Forget the sums that ``read`` gave."""
        self.sums.zero_()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that training changes, by file and name; to be saved, or loaded into."""
        training = {"sums": self.sums, "skipped": self.skipped}
        for name, param in self.params.items():
            state = self.optimizer.state[param]
            training |= {f"{key}.{name}": value for key, value in state.items()}
        model = self.model.state_dict()
        files = {"model": model, "training": training}
        return files | ({"ema": {**model, **self.average}} if self.average else {})


def compile_blocks(model: nn.Module) -> None:
    """Compile the transformer blocks, each kind once; a model without blocks as a whole."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for module in [block for blocks in lists for block in blocks] or [model]:
        module.compile()
