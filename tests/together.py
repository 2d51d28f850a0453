"""Runs the same training in several ways, each in processes of its own that are forked.

    python tests/together.py RUNS

RUNS is JSON: a list of objects, ``ranks`` and what is changed of the configuration. Started as a
program of its own: the processes are forked before PyTorch has started any thread, and import
nothing anew.
"""

import dataclasses
import json
import os
import socket
import sys
from pathlib import Path

import torch

from mmae_fast.training.config import LossConfig, ModelConfig, PretrainConfig
from mmae_fast.training.data import ImageData
from mmae_fast.training.train import pretrain

CONFIG = PretrainConfig(
    model=ModelConfig(
        patch_size=2,
        embed_dim=16,
        depth=2,
        num_heads=2,
        decoder_embed_dim=8,
        decoder_depth=1,
        decoder_num_heads=2,
    ),
    loss=LossConfig("m_mae", weight=0.2),
    epochs=25,
    warmup_epochs=5,
    batch_size=16,
    base_lr=1e-2,
    clip_grad=1.0,
    ema=0.95,
    log_every=2,
    monitor_every=50,
    save_every=5,
    device="cpu",
)


class Silent:
    def start(self, total, done=0):
        pass

    def advance(self, units=1):
        pass

    def say(self, note):
        pass

    def tell(self, line):
        pass


def images():
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=rng)
    return ImageData(pixels, None, (), "made up")


def start(config, data, ranks):
    """Process ids of children that train together, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            os.environ |= {key: str(value) for key, value in numbers.items()}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            status = 1
            try:
                pretrain(config, (data, None), Silent())
                if config.compile:
                    print(f"rank {rank} compiled {compiled()}", flush=True)
                status = 0
            except ValueError as error:
                print(f"rank {rank}: {error}", flush=True)
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return children


def compiled():
    """How many graphs and how many breaks between them."""
    from torch._dynamo.utils import counters

    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return f"{graphs} graphs, {breaks} breaks"


def wait(children):
    """Their exit statuses; negative: the signal that ended them."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(runs):
    for changes in runs:
        ranks = changes.pop("ranks")
        for part in {"loss", "two_branch"} & changes.keys():
            changes[part] = dataclasses.replace(getattr(CONFIG, part), **changes[part])
        changes["out"] = Path(changes["out"])
        statuses = wait(start(dataclasses.replace(CONFIG, **changes), images(), ranks))
        print(changes["out"].name, *statuses, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
