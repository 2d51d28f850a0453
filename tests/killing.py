"""Trains in forked processes that are killed (SIGKILL) at random moments and resumed.

    python tests/killing.py FOLDER KILLS STEPS SEED

leaves two runs in FOLDER, ``whole`` and ``killed``, that should be the same, and prints how many
processes were killed. Started as a program of its own: the processes are forked before PyTorch has
started any thread.
"""

import dataclasses
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from mmae_fast.checkpoint import latest_checkpoint
from mmae_fast.config import ModelConfig, PretrainConfig
from mmae_fast.data import ImageData
from mmae_fast.train import pretrain

MODEL = ModelConfig(
    patch_size=4,
    embed_dim=16,
    depth=1,
    num_heads=2,
    decoder_embed_dim=8,
    decoder_depth=1,
    decoder_num_heads=2,
)
STEPS_PER_EPOCH = 3


def images():
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8 * STEPS_PER_EPOCH, 1, 8, 8), dtype=torch.uint8, generator=rng)
    return ImageData(pixels, None, (), "made up")


class Silent:
    def start(self, total, done=0):
        pass

    def advance(self, units=1):
        pass

    def say(self, note):
        pass


def start(config):
    """Process id of a child that trains."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        pretrain(config, (images(), None), Silent())
        status = 0
    finally:
        os._exit(status)


def finished(child, wait=False):
    pid, status = os.waitpid(child, 0 if wait else os.WNOHANG)
    if pid and os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"a training failed: {os.waitstatus_to_exitcode(status)}")
    return pid != 0


def main(folder, kills, steps, seed):
    config = PretrainConfig(
        model=MODEL,
        out=folder / "whole",
        epochs=steps / STEPS_PER_EPOCH,
        warmup_epochs=1,
        batch_size=8,
        base_lr=1e-2,
        ema=0.9,
        clip_grad=1.0,
        log_every=2,
        monitor_every=0,
        device="cpu",
    )
    finished(start(config), wait=True)
    config = dataclasses.replace(config, out=folder / "killed")
    rng, done = random.Random(seed), 0
    while done < kills:
        before = latest_checkpoint(config.out)
        resume = (config.out / "config.json").exists()
        child = start(dataclasses.replace(config, resume=resume))
        # Mostly after some progress, sometimes while it starts.
        progress = rng.random() < 0.8
        while progress and latest_checkpoint(config.out) == before and not finished(child):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            raise SystemExit("the training ended before it could be killed: more steps") from None
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            raise SystemExit(f"a training ended by itself: {os.waitstatus_to_exitcode(status)}")
        done += 1
    resume = (config.out / "config.json").exists()
    finished(start(dataclasses.replace(config, resume=resume)), wait=True)
    print(done, "killed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
