"""How it is measured: checked first, interleaved, on rotating inputs, medians and quartiles.

A sample is the time of one call (of a few, if one is too short for the clock), by the wall clock on
a CPU and by events on a GPU. Rounds take one sample of every implementation, in rotating order, so
that a slow moment of the machine hits all of them; each call gets the next of several inputs.
"""

import datetime
import functools
import hashlib
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import mmae_fast
from mmae_fast import fast_gram
from mmae_fast.backends import dispatch

from . import cases

ROOT = Path(__file__).parent.parent

# Largest relative error (2-norm, per matrix) of value and gradient that is still the quantity asked
# for. Ours has to hold the first pair. Baselines get the second where rows or Gram matrix are
# 16-bit: they are that inaccurate (the errors are in the results), and people use them.
TOLERANCE = {
    "float32": ((1e-3, 5e-3), (1e-3, 5e-3)),
    "bfloat16": ((1e-2, 2e-2), (5e-2, 5e-1)),
}


class WrongResult(AssertionError):
    """An implementation does not compute the quantity: there is nothing to time."""


# --------------------------------------------------------------------------------------------------
# Environment


def _output(*command: str) -> str | None:
    try:
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() if out.returncode == 0 else None


def cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        return re.search(r"^model name\s*:\s*(.+)$", text, re.M).group(1).strip()
    except (OSError, AttributeError):
        brand = _output("sysctl", "-n", "machdep.cpu.brand_string")
        return brand or platform.processor() or platform.machine()


def source_digest() -> str:
    """Names the sources measured, also where there is no git."""
    digest = hashlib.sha256()
    for folder in ("mmae_fast", "csrc", "kernels"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".inl", ".cu", ".cuh"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def environment(device: str) -> dict:
    """Hardware, versions, commit, date."""
    commit = _output("git", "rev-parse", "--short=10", "HEAD")
    measured = ("mmae_fast", "csrc", "kernels", "setup.py", "benchmarks/*.py")
    if commit and _output("git", "status", "--porcelain", "--untracked-files=no", "--", *measured):
        commit += "-dirty"
    has_extension = dispatch.EXTENSION_ERROR is None
    found = {
        "device": device,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.ops.mmae_fast.cpu_isa() if has_extension else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mmae_fast": mmae_fast.__version__,
        "commit": commit,
        "sources": source_digest(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": _output(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"
            ),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return found


def device_slug(env: dict) -> str:
    """File name of the results: ``cpu-intel-xeon-2t``, ``nvidia-h100-80gb-hbm3``."""
    name = env.get("gpu") or re.sub(
        r"\((r|tm)\)|@.*|\bcpu\b|\bprocessor\b", " ", env["cpu"], flags=re.I
    )
    if env["device"] == "cpu":
        name = f"cpu {name} {env['threads']}t"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# --------------------------------------------------------------------------------------------------
# Clocks


def _cpu_timer(calls: list[Callable]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)


def _cuda_timer(calls: list[Callable]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / len(calls)


def timer(device: str) -> Callable:
    return _cuda_timer if device == "cuda" else _cpu_timer


def interleave(
    implementations: dict[str, list[Callable]],
    clock: Callable,
    budget_s: float,
    min_rounds: int = 5,
    max_rounds: int = 100,
    sample_s: float = 2e-3,
) -> dict[str, list[float]]:
    """Seconds per call, one sample per round: rounds until the budget is used up.

    Every implementation was called before, by :func:`check`; the short ones are warmed up further.
    """
    names = list(implementations)
    inner, lasts = {}, {}
    for name, calls in implementations.items():
        lasts[name] = clock(calls[-1:])
        if lasts[name] < 0.1:
            lasts[name] = clock(calls[:1])
        inner[name] = max(1, min(200, round(sample_s / max(lasts[name], 1e-7))))
    if sum(lasts.values()) > budget_s:
        min_rounds = min(min_rounds, 3 if sum(lasts.values()) < 20 * budget_s else 2)
    samples = {name: [] for name in names}
    start, turn = time.perf_counter(), 0
    for turn in range(max_rounds):
        if turn >= min_rounds and time.perf_counter() - start > budget_s:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            calls = implementations[name]
            at = turn * inner[name]
            chosen = [calls[(at + i) % len(calls)] for i in range(inner[name])]
            samples[name].append(clock(chosen))
    return samples


@functools.cache
def machine_rates(device: str, quick: bool = False) -> dict:
    """The two rates of the roofline: bytes/s of a copy (read + write), flops/s of a product.

    The product is PyTorch's. Some CPUs get well under half of their arithmetic from the library
    behind it; there the rate is that of the compiled Gram matrix, if it is higher, so that no
    fraction of the roofline is flattered: its least flops, one triangle, per second.
    """
    clock = timer(device)
    size = (4 << 20) if quick else (1 << 30) if device == "cuda" else (256 << 20)
    side = 256 if quick else 8192 if device == "cuda" else 2048
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source).zero_()
    best = min(clock([lambda: target.copy_(source)]) for _ in range(9))
    rates = {"copy_bytes_per_s": 2 * size / best, "flops_per_s": {}, "product_flops_per_s": {}}
    for dtype in ("float32", "bfloat16") if device == "cuda" else ("float32",):
        a = torch.randn(side, side, device=device, dtype=torch.float32).to(getattr(torch, dtype))
        best = min(clock([lambda a=a: a @ a]) for _ in range(7))
        rates["flops_per_s"][dtype] = rates["product_flops_per_s"][dtype] = 2 * side**3 / best
        if device == "cpu":
            gram = functools.partial(fast_gram, a, normalize=False)
            best = min(clock([gram]) for _ in range(7))
            own = rates["gram_flops_per_s"] = side * side * (side + 1) / best
            rates["flops_per_s"][dtype] = max(own, rates["flops_per_s"][dtype])
    return rates


# --------------------------------------------------------------------------------------------------
# Truth


class Data(NamedTuple):
    """One shape and quantity: inputs, the gradient's cotangent, and what the first input gives."""

    shape: cases.Shape
    quantity: str
    inputs: list[Tensor]
    grad: Tensor
    checked: list[int]  # the matrices of a batch that the reference computes
    expected: tuple[Tensor, Tensor]  # of those


def make_data(
    shape: cases.Shape, quantity: str, inputs: list[Tensor], most_checked: int = 32
) -> Data:
    """The reference in float64 is slow: it computes evenly spaced matrices of a large batch."""
    z = inputs[0]
    grad = cases.cotangent(quantity, z)
    count = min(most_checked, shape.batch)
    checked = [i * (shape.batch - 1) // max(count - 1, 1) for i in range(count)]
    truth = cases.QUANTITIES[quantity].truth
    some = (z[checked], grad[checked]) if shape.batch > 1 else (z, grad)
    expected = cases.run(truth, some[0].double(), "fwd+bwd", some[1])
    return Data(shape, quantity, inputs, grad, checked, expected)


def relative_error(x: Tensor, expected: Tensor, dims: int) -> float:
    """Largest over the matrices of ‖x - expected‖ / ‖expected‖; infinite for NaN."""
    if x.shape != expected.shape:
        raise WrongResult(f"shape {tuple(x.shape)}, expected {tuple(expected.shape)}")
    difference = x.double() - expected
    if dims:
        difference = difference.flatten(-dims).norm(dim=-1)
        expected = expected.flatten(-dims).norm(dim=-1)
    return float((difference / expected).abs().nan_to_num(torch.inf).max())


def check(name: str, data: Data, out: tuple[Tensor, ...]) -> list[float]:
    """Relative errors of value and, if there is one, gradient, for the first input.

    Raises:
        WrongResult: one of them is above TOLERANCE.
    """
    limits = TOLERANCE[data.shape.dtype][0 if name.startswith("fast") else 1]
    errors = []
    for i, what in enumerate(("value", "gradient")[: len(out)]):
        dims = 2 if what == "gradient" or data.quantity == "gram" else 0
        x = out[i][data.checked] if data.shape.batch > 1 else out[i]
        errors.append(relative_error(x, data.expected[i], dims))
        if not torch.isfinite(out[i]).all():
            raise WrongResult(f"{name}: the {what} is not finite")
        if not errors[i] <= limits[i]:
            raise WrongResult(f"{name}: relative error {errors[i]:.1e} of the {what} > {limits[i]}")
    return errors


# --------------------------------------------------------------------------------------------------
# One case


class Setting(NamedTuple):
    device: str
    rates: dict
    budget_s: float = 3.0  # per case, for all its implementations together
    min_rounds: int = 5


def cuda_peak(call: Callable) -> int:
    """Most memory allocated during a call beyond what was there before, results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def statistics_of(samples: list[float], work: tuple[float, float], rates: dict, dtype: str) -> dict:
    """Statistics of one implementation; ``roofline`` is the fraction of what the rates allow."""
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    flops, size = work
    floor = max(flops / rates["flops_per_s"][dtype], size / rates["copy_bytes_per_s"])
    return {
        "median_s": median,
        "q1_s": q1,
        "q3_s": q3,
        "samples": len(samples),
        "gb_per_s": size / median * 1e-9,
        "gflop_per_s": flops / median * 1e-9,
        "roofline": floor / median,
    }


def measure(data: Data, direction: str, implementations: dict, setting: Setting) -> dict:
    """One row of the results.

    Nothing is timed before its result was checked; what is wrong or cannot run is in ``not_timed``,
    with the reason.
    """
    shape, quantity = data.shape, data.quantity
    work = cases.least_work(shape, quantity, direction)
    ready, found, not_timed = {}, {}, {}
    for name, implementation in implementations.items():
        try:
            grad = data.grad.to(cases.value_dtype(name, quantity, shape.dtype))
            prepared = implementation.prepare(data.inputs, direction, grad)
            errors = check(name, data, prepared[0]())
        except Exception as error:  # out of memory, or an operation that this torch lacks
            kind = "wrong" if isinstance(error, WrongResult) else type(error).__name__
            not_timed[name] = f"{kind}: {str(error).strip()[:200]}"
            continue
        ready[name] = prepared
        found[name] = {"errors": errors, "backend": cases.backend_of(name, setting.device)}
    samples = {}
    if ready:
        clock = timer(setting.device)
        samples = interleave(ready, clock, setting.budget_s, setting.min_rounds)
    for name, times in samples.items():
        result = found[name]
        result |= statistics_of(times, work, setting.rates, shape.dtype)
        if setting.device == "cuda":
            result["peak_bytes"] = cuda_peak(ready[name][0])
        if name != "fast" and "fast" in samples:
            result["over_fast"] = result["median_s"] / statistics.median(samples["fast"])
    return {
        "shape": list(shape[:3]),
        "dtype": shape.dtype,
        "quantity": quantity,
        "direction": direction,
        "flops": work[0],
        "bytes": work[1],
        "implementations": found,
        "not_timed": not_timed,
    }
