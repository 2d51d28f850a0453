"""``mmae doctor``: versions, devices, which backend serves what, and why the others do not."""

import os
import platform
import sys
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

from . import __version__
from .backends import dispatch

_PACKAGES = ("torch", "torchvision", "triton", "timm", "numpy", "safetensors")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            ]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def devices() -> list[tuple[str, str]]:
    """(device type, description) of what tensors can live on here."""
    found = [("cpu", f"{cpu_name()}, {torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        gib = p.total_memory / 2**30
        found.append((f"cuda:{i}", f"{p.name}, sm_{p.major}{p.minor}, {gib:.0f} GiB"))
    return found


def main() -> None:
    console = Console()
    versions = Table("software", "version", title="Versions", title_justify="left")
    versions.add_row("mmae_fast", __version__)
    versions.add_row("python", f"{platform.python_version()} ({sys.executable})")
    for package in _PACKAGES:
        versions.add_row(package, _version(package))
    console.print(versions)

    hardware = Table("device", "what it is", title="Devices", title_justify="left")
    for name, description in devices():
        hardware.add_row(name, description)
    if not torch.cuda.is_available():
        reason = "built without CUDA" if torch.version.cuda is None else "no GPU or driver found"
        hardware.add_row("cuda", f"not available: torch {torch.__version__}, {reason}")
    console.print(hardware)

    ladder = Table(
        "backend", "CPU tensors", "CUDA tensors", title="Backends, in order of preference",
        title_justify="left",
    )  # fmt: skip
    for backend in dispatch.BACKENDS:
        cells = []
        for device in ("cpu", "cuda"):
            reason = dispatch.refusal(backend, device)
            chosen = dispatch.select_backend("auto", device) == backend
            yes = "yes, by name only: not yet run on a GPU"
            if chosen or backend not in dispatch.UNMEASURED:
                yes = "yes (auto)" if chosen else "yes"
            cells.append(f"no: {reason}" if reason else yes)
        ladder.add_row(backend, *cells)
    console.print(ladder)

    if dispatch.refusal("cuda", "cuda") is None:
        from .backends import cuda_backend

        table = Table(
            "operation with backend='cuda'", "compiled kernels up to min(n, d)",
            title_justify="left", title="Operations on CUDA tensors",
        )  # fmt: skip
        single, double = (cuda_backend.limits(is_double) for is_double in (False, True))
        for quantity, limit in single.items():
            table.add_row(quantity, f"{limit} (float64: {double[quantity]})")
        batched = "cuSOLVER XsyevBatched" if cuda_backend.has_solver() else "cuSOLVER syevd"
        table.add_row("eigenvalues of larger batches", batched)
        console.print(table)

    if dispatch.refusal("triton", "cuda") is None:
        from .kernels import configs

        table = Table(
            "operation with backend='triton'", "served by", title_justify="left",
            title="Operations on CUDA tensors",
        )  # fmt: skip
        table.add_row("fast_gram, order 2, every gradient; 32 and 16-bit", "Triton kernels")
        arch = configs.architecture(None)
        orders = [
            configs.largest_coding_rate(t, False, arch) for t in (torch.float32, torch.bfloat16)
        ]
        table.add_row(
            "fast_coding_rate",
            f"one Triton kernel up to min(n, d) = {orders[0]} (16-bit: {orders[1]}), then Gram"
            " kernel + cuSOLVER potrf",
        )
        table.add_row("entropy of any other order", "Gram kernel + cuSOLVER syevd")
        table.add_row("float64", "PyTorch's libraries: the kernels are made for tensor cores")
        console.print(table)

    if dispatch.EXTENSION_ERROR is None:
        from .backends import cpu_backend

        served = Table(
            "operation on CPU tensors", "served by", title_justify="left", title="Operations"
        )
        served.add_row("fast_gram, fast_coding_rate, order 2; every gradient", "compiled kernels")
        served.add_row(
            "entropy of any other order",
            f"compiled kernels up to min(n, d) = {cpu_backend.COMPILED_EIGEN_MAX}, then Gram kernel"
            " + LAPACK syevd",
        )
        console.print(served)
        forced = " (forced by MMAE_FAST_ISA)" if os.environ.get("MMAE_FAST_ISA") else ""
        console.print(
            f"Instruction set of the CPU kernels: {torch.ops.mmae_fast.cpu_isa()}{forced}"
        )
    else:
        console.print(f"[red]CPU kernels: {dispatch.EXTENSION_ERROR}[/red]")
