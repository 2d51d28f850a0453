"""BatchNorm over the batch of all processes, on a CPU too, which SyncBatchNorm refuses."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

BatchNorm = nn.modules.batchnorm._BatchNorm


class _Sum(Function):
    """Sum over the processes; so is its gradient, since all of them use it."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return _Sum.forward(ctx, grad)


class GlooBatchNorm(BatchNorm):
    """BatchNorm of any dimension; every process has as many images, as the batch is cut evenly."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, ...)``, to the dtype of x; statistics are float32."""
        if not self.training:
            state = self.running_mean, self.running_var, self.weight, self.bias
            return F.batch_norm(x, *state, eps=self.eps)
        rest = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _Sum.apply(x.float().sum(rest)) / count
        # In two passes, as one process does it: the mean square less the squared mean cancels.
        centred = x.float() - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(rest)) / count
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(variance.detach() * (count / (count - 1)), self.momentum)
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


def over_processes(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its BatchNorms over all processes; names and parameters stay."""
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.__class__ = GlooBatchNorm
    return model
