"""The processes of a training: one, or those that torchrun started; and how they stop together."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmae_fast.training.batch_norm import BatchNorm, over_processes
from mmae_fast.training.config import UserError


def pick_device(name: str) -> torch.device:
    """Device of a name; ``auto`` is cuda where there is one. Raises: UserError: unusable name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {error}") from error


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Process group of all; none for a process alone."""
        return dist.group.WORLD if self.size > 1 else None

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes, the same everywhere."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def agree(self, error: Exception | None) -> None:
        """Raise what the main process failed with, everywhere: nobody waits for one that left."""
        if self.size > 1:
            said = [str(error) if error else None]
            dist.broadcast_object_list(said, device=torch.device("cpu"))
            if said[0] is not None:
                _meet()
            if error is None and said[0] is not None:
                raise UserError(said[0])
        if error is not None:
            raise error


@contextmanager
def join(device: str) -> Iterator[World]:
    """Process group of the processes that torchrun started, for the time of the context.

    A process that torchrun did not start, or that it started alone, gets none. Each rank takes the
    GPU of its local number. Raises: UserError: no such device.
    """
    size, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if size == 1:
        yield World(pick_device(device))
        return
    if (device == "auto" and torch.cuda.is_available()) or device == "cuda":
        if torch.cuda.device_count() < local:
            raise UserError(
                f"{local} processes on this node, but {torch.cuda.device_count()} GPUs: "
                "lower --nproc-per-node"
            )
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    place = pick_device(device)
    # Flags and messages travel between the hosts by gloo, whatever the weights take.
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    try:
        yield World(place, dist.get_rank(), size)
    except KeyboardInterrupt:  # all stopped at the same step
        _leave()
        raise
    # After an error the group is left alone: to take it down may wait for processes that are busy.
    _leave()


def _meet() -> None:
    """Wait until all are here: the connections of one that ends take what is under way with them.

    Who finds the others gone has been met by them before.
    """
    with suppress(RuntimeError):
        dist.all_reduce(torch.zeros(()))


def _leave() -> None:
    _meet()
    dist.destroy_process_group()


class StopOnSignal:
    """Turns Ctrl-C or SIGTERM, of any process, into a request that all see at the same step.

    A second signal has its usual effect in a process alone. Under torchrun it has none: the agent
    passes on what the processes may have received already.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, world: World) -> None:
        self._world, self._asked, self._under_way = world, False, None

    def __enter__(self) -> StopOnSignal:
        self._previous = {}
        # Python delivers signals to the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._ask) for s in self.SIGNALS}
        return self

    def requested(self) -> bool:
        """Whether to stop now; to be asked once a step, by every process.

        Among several processes the answer is what they knew one step ago: their flags are reduced
        while the step is computed, and nobody waits for a device.
        """
        if self._world.size == 1:
            return self._asked
        answer = self._answer()
        flag = torch.tensor(int(self._asked))
        self._under_way = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        return answer

    def _answer(self) -> bool:
        if self._under_way is None:
            return False
        flag, work = self._under_way
        work.wait()
        return bool(flag)

    def _ask(self, *_: object) -> None:
        self._asked = True
        if self._world.size == 1:
            self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exc: Any) -> None:
        if exc[0] is None or issubclass(exc[0], KeyboardInterrupt):
            self._answer()  # nothing may be under way when the group is taken down
        self._give_back()


def wrap(model: nn.Module, world: World, shard: bool) -> nn.Module:
    """The module to call: the model itself, under DDP, or sharded in place by FSDP2.

    Either averages gradients over the processes. Sharded are the transformer blocks, and the rest
    together. Raises: UserError: sharding asked of a process alone.
    """
    if any(isinstance(module, BatchNorm) for module in model.modules()) and world.size > 1:
        model = over_processes(model, world.device)
    if shard:
        if world.size == 1:
            raise UserError("--shard splits a model among processes: start them with torchrun")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        # Nothing here writes into an output of the model, which is what PyTorch warns of.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(world.device.type, (world.size,))
        for blocks in (m for m in model.modules() if isinstance(m, nn.ModuleList)):
            for block in blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "forward_features")
        return model
    if world.size == 1:
        return model
    with warnings.catch_warnings():
        # PyTorch 2.14 has another word for broadcast_buffers, which 2.11 does not know.
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            broadcast_buffers=False,  # they are fixed, or the same everywhere
            gradient_as_bucket_view=True,
        )
