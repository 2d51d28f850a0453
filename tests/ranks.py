"""Processes for tests: gloo ranks that are started once, and run functions until the tests end.

A function of a test module is run as ``function(group, rank, *args)`` on the first ``world`` ranks;
a rank that does not answer in time fails the test, and all ranks are started anew for the next one.
Below, what the tests do with rows that are shared among ranks.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

WORLDS = (1, 2, 3, 4)
TIMEOUT = 100  # seconds, for machines that do other things as well


class Failure(NamedTuple):
    """What a rank raised."""

    kind: str
    message: str


def _work(rank, store, pipe):
    torch.set_num_threads(1)
    size = WORLDS[-1]
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    groups = {world: dist.new_group(range(world)) for world in WORLDS}
    pipe.send_bytes(b"ready")
    while True:
        task = pickle.loads(pipe.recv_bytes())
        if task is None:
            break
        function, world, args = task
        try:
            result = function(groups[world], rank, *args)
        except Exception as error:
            result = Failure(type(error).__name__, str(error))
        pipe.send_bytes(pickle.dumps(result))
    dist.destroy_process_group()


class Ranks:
    def __init__(self):
        self.processes = []

    def __call__(self, function, world, *args):
        """The results of all ranks, in their order; a :class:`Failure` where one raised."""
        if not self.processes:
            self._start()
        task = pickle.dumps((function, world, args))
        for pipe in self.pipes[:world]:
            pipe.send_bytes(task)
        results, end = [], time.monotonic() + TIMEOUT
        for rank, pipe in enumerate(self.pipes[:world]):
            if not pipe.poll(max(0, end - time.monotonic())):
                self.stop(kill=True)
                raised = [result for result in results if isinstance(result, Failure)]
                pytest.fail(f"rank {rank} of {world} did not answer in {TIMEOUT} s; {raised=}")
            try:
                results.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                self.stop(kill=True)
                pytest.fail(f"rank {rank} of {world} died")
        return results

    def _start(self):
        # Children find the tests and the package as the parent does.
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parent.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        )
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        self.pipes = []
        for rank in range(WORLDS[-1]):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(pipe)
        for pipe in self.pipes:
            pipe.recv_bytes()

    def stop(self, kill=False):
        for process, pipe in zip(self.processes, self.pipes if self.processes else [], strict=True):
            if kill:
                process.kill()
            else:
                pipe.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.join(TIMEOUT)
        if self.processes:
            self.folder.cleanup()
        self.processes = []


# --------------------------------------------------------------------------------------------------
# Rows shared among ranks

REDUCED, GATHERED = (2, 46, 5), (2, 12, 9)  # shapes of all rows: N > 4d, and not
SHARES = {1: [1.0], 2: [0.35, 0.65], 3: [0.4, 0.0, 0.6], 4: [0.25, 0.35, 0.0, 0.4]}


def sizes_of(n, world):
    sizes = [round(n * share) for share in SHARES[world]]
    sizes[-1] += n - sum(sizes)
    assert sum(sizes) == n and min(sizes) >= 0
    return sizes


def cotangent(value):
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)


def value_and_grads(function, views, rows):
    views = [view.clone().requires_grad_() for view in views]
    value = function(*views, **rows)
    (value * cotangent(value)).sum().backward()
    return value.detach(), [view.grad for view in views]


def own_rows(rank, views, rows, sizes):
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    return [view[..., own, :] for view in views], {k: x[..., own] for k, x in rows.items()}


def assert_close(actual, expected, tolerance, largest, what):
    """Within tolerance of the largest entry of the whole tensor."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    if expected.numel():
        error = (actual - expected).abs().max() / largest
        assert error <= tolerance, (what, float(error))
