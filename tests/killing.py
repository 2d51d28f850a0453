"""Trains in forked processes that are killed (SIGKILL) at random moments and resumed.

    python tests/killing.py FOLDER KILLS STEPS SEED RANKS

leaves two runs in FOLDER, ``whole`` and ``killed``, that should be the same, and prints how many
trainings were killed. Started as a program of its own: the processes are forked before PyTorch has
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
from together import start, wait

from mmae_fast.training.checkpoint import latest_checkpoint
from mmae_fast.training.config import ModelConfig, PretrainConfig
from mmae_fast.training.data import ImageData

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


def kill(children, rng):
    """One at a random moment, the others a moment later, as torchrun would."""
    rng.shuffle(children)
    for child in children:
        os.kill(child, signal.SIGKILL)
        time.sleep(rng.uniform(0, 0.02))
    if wait(children)[0] != -signal.SIGKILL:
        raise SystemExit("the training ended before it could be killed: more steps")


def main(folder, kills, steps, seed, ranks):
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
    if any(wait(start(config, images(), ranks))):
        raise SystemExit("the training failed")
    config = dataclasses.replace(config, out=folder / "killed")
    rng = random.Random(seed)

    def begin():
        resume = (config.out / "config.json").exists()
        return start(dataclasses.replace(config, resume=resume), images(), ranks)

    for _ in range(kills):
        before = latest_checkpoint(config.out)
        children = begin()
        # Mostly after some progress, sometimes while it starts.
        progress = rng.random() < 0.8
        deadline = time.monotonic() + 60
        while progress and latest_checkpoint(config.out) == before:
            if time.monotonic() > deadline:
                kill(children, rng)
                raise SystemExit("a training made no progress")
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        kill(children, rng)
    if any(wait(begin())):
        raise SystemExit("the training failed")
    print(kills, "killed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
