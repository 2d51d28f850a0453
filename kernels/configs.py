"""Tile sizes per architecture, checked in with the reason; searched only if MMAE_FAST_AUTOTUNE=1.

None of these has been timed on a GPU yet. They are the largest tiles that the compiler, asked ahead
of time, places without spilling a register (tests/triton_budget.json; docs/triton.md), in at most
99 KB of shared memory: what a block may have on every GPU from compute capability 8.0 on, so that
the table of sm_80 serves RTX 30, 40 and 50 as well. sm_90 and sm_100 hold operands or sums outside
the registers, and take deeper or larger tiles.

The search, for those who measure: the first call of a product with new shapes times all candidates
(it synchronises; not within a CUDA graph) and keeps the fastest for the life of the process.
"""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

AUTOTUNE = os.environ.get("MMAE_FAST_AUTOTUNE") == "1"
SHARED_BYTES = 99 << 10


class Config(NamedTuple):
    """A block computes BLOCK x BLOCK numbers, DEPTH terms of each at a time."""

    block: int
    depth: int
    warps: int
    stages: int


# Operands: "float32", or centred; 16-bit as they are ("raw"), in parts ("split"), times float32 W'
# ("wide").
GRAM = {
    (80, "float32"): Config(64, 32, 8, 3),  # 128, or 4 warps: the parts of 3xTF32 spill
    (90, "float32"): Config(128, 16, 8, 3),  # 32 deep: spills
    (100, "float32"): Config(128, 16, 8, 3),
    (80, "raw"): Config(128, 64, 8, 2),  # 3 stages: 128 KB
    (90, "raw"): Config(128, 64, 8, 3),
    (100, "raw"): Config(128, 64, 8, 3),
    (80, "split"): Config(128, 16, 8, 3),  # deeper: spills
    (90, "split"): Config(128, 64, 8, 2),
    (100, "split"): Config(128, 64, 8, 2),
}
PRODUCT = {
    (80, "float32"): Config(64, 32, 8, 2),
    (90, "float32"): Config(128, 32, 8, 2),
    (100, "float32"): Config(128, 32, 8, 2),
    (80, "wide"): Config(128, 16, 8, 3),
    (90, "wide"): Config(128, 32, 8, 2),
    (100, "wide"): Config(128, 32, 8, 3),
}
# Below this order a triangle of 128 x 128 tiles is mostly corners.
SMALL_ORDER = 256
SMALL = {80: Config(64, 32, 8, 2), 90: Config(64, 32, 4, 3), 100: Config(64, 32, 8, 2)}
CODING_RATE_WARPS = {16: 1, 32: 2, 64: 8, 128: 8}  # that hold a tile without spilling
CANDIDATES = (
    *dict.fromkeys(SMALL.values()),
    Config(64, 64, 4, 3),
    Config(128, 16, 8, 3),
    Config(128, 32, 8, 2),
    Config(128, 32, 8, 3),
    Config(128, 64, 8, 3),
)


@functools.cache
def architecture(index: int | None) -> int:
    """80, 90 or 100: whose table serves the device; 90 in the interpreter."""
    if not torch.cuda.is_available():
        return 90
    major = torch.cuda.get_device_capability(index)[0]
    return {9: 90, 10: 100}.get(major, 80)


@functools.cache
def multiprocessors(index: int | None) -> int:
    """132 (H100) in the interpreter, so that it takes the paths of a GPU."""
    if not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(index).multi_processor_count


def gram(dtype: torch.dtype, order: int, samples: bool, center: bool, arch: int) -> Config:
    if order <= SMALL_ORDER:
        return SMALL[arch]
    kind = "raw" if samples else "split"
    if dtype == torch.float32 or center:
        kind = "float32"
    return GRAM[arch, kind]


def product(dtype: torch.dtype, n: int, d: int, arch: int) -> Config:
    if min(n, d) <= SMALL_ORDER:
        return SMALL[arch]
    return PRODUCT[arch, "float32" if dtype == torch.float32 else "wide"]


def largest_coding_rate(dtype: torch.dtype, center: bool, arch: int) -> int:
    """The largest order that one block's registers hold; 3xTF32 and sm_100 spill at 128."""
    return 64 if dtype == torch.float32 or center or arch == 100 else 128


def coding_rate(order: int) -> Config:
    block = max(16, 1 << (order - 1).bit_length())
    return Config(block, 32, CODING_RATE_WARPS[block], 3)


def seconds(launch: Callable[[], object]) -> float:
    """Of one launch, the best of five; infinite where it cannot be compiled or placed."""
    try:
        launch()
    except Exception:  # each version of Triton has its own error for too large a tile
        return float("inf")
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return min(times)


_found: dict[tuple, Config] = {}


def choose(key: tuple, default: Config, launch: Callable[[Config], object]) -> Config:
    """The table's configuration, or the fastest candidate for this key if a search is asked for."""
    if not AUTOTUNE:
        return default
    if key not in _found:
        candidates = dict.fromkeys((default, *CANDIDATES))
        _found[key] = min(candidates, key=lambda c: seconds(lambda: launch(c)))
    return _found[key]
