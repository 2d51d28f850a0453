"""Matrix entropy of a module's features inside a training loop that is not ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .ops import fast_matrix_entropy


class EntropyMonitor:
    """Forward hook that records matrix entropy and effective rank of a module's output.

    Equivalent to calling, on the first and then on each ``every``-th forward pass ::

        with torch.no_grad():
            h = mmae_fast.fast_matrix_entropy(output.detach().reshape(-1, d), alpha)

    Outputs, gradients and random states stay bitwise as they are without it. ::

        with EntropyMonitor(model.backbone, every=100) as monitor:
            train(model)
        monitor.records[-1]  # {"call": 900, "entropy": 3.1, "effective_rank": 22.2, ...}

    Args:
        module: its output must be a tensor of float32, float64, bfloat16 or float16, or a tuple or
            list that starts with one.
        every: forward passes from one record to the next, >= 1. A pass that activation
            checkpointing repeats counts again.
        alpha: order of the entropy, > 0.
        tokens: what becomes of the axes between the batch and the features. ``"all"``: every
            position is a row, ``(B, T, d)`` gives B·T rows; ``"mean"``: their mean, B rows; an
            integer t: position t, e.g. 0 for a class token of ``(B, T, d)``.
        dim: axis of the features: -1, or 1 for the maps ``(B, C, H, W)`` of a convolution.
        center: subtract the mean row after normalisation.
    Raises:
        TypeError, ValueError: for arguments out of range here, for outputs that do not fit in the
            forward pass.
    Note:
        Distributed training: each process sees its own part of a batch. Where torch.distributed is
        initialised, rank 0 alone records, of its local features; nothing is communicated, so that
        ranks may call the module unequally often.
        Values stay on the device until ``records`` is read: no synchronisation in the loop.
        The hook belongs outside of compiled regions: attach it to a module that runs eagerly.
    """

    def __init__(
        self,
        module: nn.Module,
        every: int = 100,
        *,
        alpha: float = 1.0,
        tokens: str | int = "all",
        dim: int = -1,
        center: bool = False,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every must be an int, got {type(every).__name__}")
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        if not alpha > 0:
            raise ValueError(f"alpha must be > 0, got {alpha!r}")
        if tokens not in ("all", "mean") and (
            isinstance(tokens, bool) or not isinstance(tokens, int)
        ):
            raise ValueError(f"tokens must be 'all', 'mean' or an int, got {tokens!r}")
        self.every, self.alpha, self.tokens = every, alpha, tokens
        self.dim, self.center = dim, center
        self.calls = 0
        self._values: list[tuple[dict[str, Any], Tensor, Tensor | None]] = []
        self._handle = module.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, inputs: Any, output: Any) -> None:
        call, self.calls = self.calls, self.calls + 1
        if call % self.every or not _is_first_rank():
            return
        if isinstance(output, (tuple, list)) and output:
            output = output[0]
        if not isinstance(output, Tensor):
            raise TypeError(
                "the module's output must be a tensor, or a tuple or list that starts with one, "
                f"got {type(output).__name__}"
            )
        with torch.no_grad():
            z = self._rows(output.detach())
            entropy = fast_matrix_entropy(z, self.alpha, center=self.center)
            h1 = None if self.alpha == 1 else fast_matrix_entropy(z, center=self.center)
        about = {"call": call, "rows": len(z), "training": module.training}
        self._values.append((about, entropy, h1))

    def _rows(self, output: Tensor) -> Tensor:
        """Features ``(n, d)``."""
        if output.ndim < 2:
            raise ValueError(
                f"the module's output must have a batch and a feature axis, got shape "
                f"{tuple(output.shape)}"
            )
        z = output.movedim(self.dim, -1)
        if self.tokens == "all" or z.ndim == 2:
            return z.reshape(-1, z.shape[-1])
        z = z.flatten(1, -2)
        return z.mean(dim=1) if self.tokens == "mean" else z[:, self.tokens]

    @property
    def records(self) -> list[dict[str, Any]]:
        """``call`` (from 0), ``entropy`` (H_alpha, nats), ``effective_rank`` (exp(H_1) whatever
        alpha), ``rows`` and ``training`` of each record. Waits for the device."""
        return [
            {
                **about,
                "entropy": entropy.item(),
                "effective_rank": (entropy if h1 is None else h1).exp().item(),
            }
            for about, entropy, h1 in self._values
        ]

    def remove(self) -> None:
        """Take the hook off the module. The records stay; a second call does nothing."""
        self._handle.remove()

    def __enter__(self) -> EntropyMonitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def _is_first_rank() -> bool:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_rank() == 0
