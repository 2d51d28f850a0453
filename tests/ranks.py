"""Processes for tests: gloo ranks that are started once, and run functions until the tests end.

A function of a test module is run as ``function(group, rank, *args)`` on the first ``world`` ranks;
a rank that does not answer in time fails the test, and all ranks are started anew for the next one.
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

WORLDS = (1, 2, 3, 4)
TIMEOUT = 100  # seconds, for machines that do other things as well


class Failure(NamedTuple):
    """What a rank raised."""

    kind: str
    message: str


def _work(rank, store, pipe):
    import torch
    import torch.distributed as dist

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
