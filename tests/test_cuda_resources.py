"""Registers, shared memory and occupancy of the CUDA kernels; the instructions they are made of.

cuda_resources.py compiles and reads the compiler's report; cuda_resources.json is the budget.
"""

import json
import re
import subprocess
from pathlib import Path

import pytest

from .cuda_emulation.harness import emulator, needs_emulator
from .cuda_resources import (
    BUDGET,
    PAGE,
    POLICIES,
    compiled,
    kernels,
    occupancy,
    page,
    setup,
    words,
)

# The orders that are worth a line: the largest of each plan, and of images of 197 tokens. Kernel,
# type and numbers; whatever the policy.
ORDERS = {
    "spectral_kernel float32 2x2": (32, 64),
    "spectral_kernel float32 2x8": (128,),
    "spectral_kernel float64 4x4": (32, 64),
    "spectral_kernel float64 6x6": (96,),
    "packed_kernel float32": (197, 256),
    "packed_kernel float64": (151, 197, 233),
    "jacobi_kernel float32 256": (32, 64, 128),
    "jacobi_kernel float32 512": (153, 197, 235),
    "jacobi_kernel float64 256": (32, 64, 103, 128),
    "jacobi_kernel float64 512": (139, 165),
    "features_bwd_kernel float32 2x2": (128,),
    "features_bwd_kernel float32 2x4": (256,),
    "features_bwd_kernel float64 2x6": (96,),
    "features_bwd_kernel float64 2x16": (256,),
}


def plans_of(name: str) -> list[dict[str, int]]:
    """What csrc/cuda/plan.h plans for a kernel of the report at those orders."""
    m = emulator()
    kernel, kind = name.split()[:2]
    is_double = kind == "float64"
    one_matrix = {"spectral_kernel": "spectral", "packed_kernel": "packed_rate"}
    one_matrix["jacobi_kernel"] = "jacobi"
    rows = []
    without_policy = " ".join(part for part in name.split() if part not in POLICIES.values())
    for order in ORDERS.get(without_policy, (0,)):
        threads, shared = 256, 0
        if kernel in one_matrix:
            plan = m.plan(getattr(m.Kernel, one_matrix[kernel]), order, is_double)
            threads, shared = plan["threads"], plan["shared_bytes"]
        elif kernel == "features_bwd_kernel":
            shared = m.rows_shared_bytes(order, is_double)
        elif kernel in ("gram_kernel", "samples_bwd_kernel"):
            shared = m.product_shared_bytes(is_double)
        elif kernel == "row_mean_kernel":
            shared = m.row_mean_shared_bytes
        elif kernel == "common_scale_kernel":
            shared = m.common_scale_shared_bytes
        rows.append({"order": order, "threads": threads, "shared": shared})
    return rows


@pytest.fixture(scope="module")
def budget():
    return json.loads(BUDGET.read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The compiler's report, and the folder of its cubins."""
    nvcc, reason = setup().find_toolkit()
    if nvcc is None:
        pytest.skip(f"needs nvcc: {reason}")
    folder = tmp_path_factory.mktemp("cubins")
    return compiled(nvcc, folder), folder


def test_compiler_keeps_to_the_budget(built, budget):
    """No kernel spills, none uses local memory, none has more registers than was planned with."""
    report, _ = built
    assert "warning" not in report, report
    found = kernels(report)
    assert found.keys() == budget.keys()
    for name, row in found.items():
        assert row["stack"] == 0 and row["spill"] == 0, f"{name}: {row}"
        # Another release of the compiler may take a few more.
        assert row["registers"] <= budget[name]["registers"] + 8, f"{name}: {row}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "100", "120"])
def test_other_architectures(tmp_path, arch):
    nvcc, reason = setup().find_toolkit()
    if nvcc is None:
        pytest.skip(f"needs nvcc: {reason}")
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True)
    if f"compute_{arch}" not in known.stdout.split():
        pytest.skip(f"this nvcc does not know sm_{arch}")
    report = compiled(nvcc, tmp_path, arch)
    assert "warning" not in report, report
    assert all(row["stack"] == 0 and row["spill"] == 0 for row in kernels(report).values())


@needs_emulator
def test_plans_are_those_of_the_budget(budget):
    for name, row in budget.items():
        assert row["plans"] == plans_of(name), name


def test_occupancy(budget):
    blocks = {}
    for name, row in budget.items():
        for plan in row["plans"]:
            blocks[name, plan["order"]], share = occupancy(row | plan)
            assert blocks[name, plan["order"]] >= 1, name
            if "jacobi" not in name and "packed" not in name and "float64" not in name:
                assert share >= 0.125, (name, plan)
    # What the plans are made for.
    assert blocks["packed_kernel float32", 197] == 2
    assert blocks["jacobi_kernel float32 256", 64] >= 3
    assert blocks["jacobi_kernel float32 256", 32] >= 8
    for name in ("gram_kernel float32 3xTF32 2x2", "gram_kernel float32 16-bit 2x2"):
        assert blocks[name, 0] >= 2
    assert blocks["samples_bwd_kernel float32 3xTF32 2x2", 0] >= 2
    assert blocks["features_bwd_kernel float32 3xTF32 2x4", 256] >= 2
    assert blocks["spectral_kernel float32 3xTF32 2x2", 64] >= 2


def test_page(budget):
    assert PAGE.read_text() == page(budget), "run python tests/cuda_resources.py --write"


def disassembler() -> Path | None:
    triton = pytest.importorskip("triton", reason="its wheel brings the disassembler")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return tool if tool.exists() else None


def functions(tool: Path, cubin: Path) -> dict[str, str]:
    """Mangled name → SASS."""
    done = subprocess.run([tool, "-c", str(cubin)], check=True, capture_output=True, text=True)
    parts = re.split(r"\.section\s+\.text\.([^,\s]+)", done.stdout)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_instructions(built):
    """Tensor cores where they are promised and nowhere else; nothing goes through local memory."""
    tool = disassembler()
    if tool is None:
        pytest.skip("this triton has no nvdisasm")
    seen = {}
    for cubin in sorted(built[1].glob("*.cubin")):
        seen |= functions(tool, cubin)
    products = {"3xTF32": 3, "2xTF32": 2, "TF32": 1}
    kinds = set()
    for mangled, text in seen.items():
        assert not re.search(r"\b(LDL|STL)\b", text), mangled
        found = re.search(r"cuda\d+([a-z0-9_]+_kernel)I([fd])(.*?)Ev", mangled)
        name = words(*found.groups())
        kernel, *kind = name.split()
        instructions = re.findall(r"\bHMMA\.(\S+)", text)
        if len(kind) == 3:  # type, policy, tile
            kinds.add((kernel, kind[1]))
            rows, columns = map(int, kind[2].split("x"))
            if kind[1] == "16-bit":  # one loop for either type, of 16 numbers per step
                wanted = ["16816.F32", "16816.F32.BF16"]
            else:
                wanted = ["1688.F32.TF32"] * products[kind[1]]
            assert sorted(instructions) == sorted(wanted * (rows * columns)), name
        else:
            assert not instructions, name
        if kernel == "jacobi_kernel" and kind[0] == "float32":
            assert text.count("FFMA") > 16, name
        if kernel in ("gram_kernel", "samples_bwd_kernel") and kind[0] == "float64":
            assert text.count("DFMA") > 16, name
    forward = {(kernel, policy) for kernel in ("spectral_kernel", "gram_kernel")
               for policy in ("3xTF32", "TF32", "16-bit")}  # fmt: skip
    backward = {(kernel, policy) for kernel in ("samples_bwd_kernel", "features_bwd_kernel")
                for policy in ("3xTF32", "TF32", "2xTF32")}  # fmt: skip
    assert kinds == forward | backward
