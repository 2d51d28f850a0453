"""Tile sizes per architecture, checked in with the reason; searched only if MMAE_FAST_AUTOTUNE=1.

None of these has been timed on a GPU yet. They are chosen from what the compiler reports ahead of
time (docs/triton.md has registers and shared memory, tests/test_triton_compile.py holds them): no
spills, at most 99 KB of shared memory (what a block may have on every GPU from compute capability
8.0 on, so that one table serves A100, RTX 30/40/50, H100 and B200), and at least two blocks on a
multiprocessor where registers allow it.
"""

import functools
import os
from typing import NamedTuple

import torch

AUTOTUNE = os.environ.get("MMAE_FAST_AUTOTUNE") == "1"


class Config(NamedTuple):
    """A block computes BLOCK x BLOCK numbers, DEPTH terms of each at a time."""

    block: int
    depth: int
    warps: int
    stages: int


@functools.cache
def architecture(index: int) -> int:
    """80, 90 or 100: the newest that a device has all instructions of; 90 in the interpreter."""
    if not torch.cuda.is_available():
        return 90
    major = torch.cuda.get_device_capability(index)[0]
    return {9: 90, 10: 100}.get(major, 80)


@functools.cache
def multiprocessors(index: int) -> int:
    """132 (H100) in the interpreter, so that it takes the paths of a GPU."""
    if not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(index).multi_processor_count


def gram(dtype: torch.dtype, order: int, samples: bool, device: int) -> Config:
    return Config(64, 32, 4, 2)


def product(dtype: torch.dtype, n: int, d: int, samples: bool, device: int) -> Config:
    return Config(64, 32, 4, 3)


def coding_rate(dtype: torch.dtype, order: int, device: int) -> Config:
    block = max(16, 1 << (order - 1).bit_length())
    return Config(block, 32, {16: 1, 32: 2, 64: 4, 128: 8}[block], 3)
