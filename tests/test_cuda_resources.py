"""Registers, shared memory and occupancy of the CUDA kernels; the instructions they are made of.

cuda_resources.py compiles and reads the compiler's report; cuda_resources.json is the budget.
"""

import json
import re
import subprocess
from pathlib import Path

import pytest

from .cuda_emulation.harness import emulator, needs_emulator
from .cuda_resources import BUDGET, PAGE, compiled, kernels, occupancy, page, setup

# The orders that are worth a line: the largest of each plan, and of images of 197 tokens.
ORDERS = {
    "spectral_kernel float32 4": (32, 64),
    "spectral_kernel float32 8": (128,),
    "spectral_kernel float64 4": (32, 64),
    "spectral_kernel float64 6": (96,),
    "packed_kernel float32": (197, 256),
    "packed_kernel float64": (151, 197, 233),
    "jacobi_kernel float32 256": (32, 64, 128),
    "jacobi_kernel float32 512": (153, 197, 235),
    "jacobi_kernel float64 256": (32, 64, 103, 128),
    "jacobi_kernel float64 512": (139, 165),
    "features_bwd_kernel float32 8": (128,),
    "features_bwd_kernel float32 16": (256,),
    "features_bwd_kernel float64 6": (96,),
    "features_bwd_kernel float64 16": (256,),
}


def plans_of(name: str) -> list[dict[str, int]]:
    """What csrc/cuda/plan.h plans for a kernel of the report at those orders."""
    m = emulator()
    kernel, kind = name.split()[:2]
    is_double = kind == "float64"
    one_matrix = {"spectral_kernel": "spectral", "packed_kernel": "packed_rate"}
    one_matrix["jacobi_kernel"] = "jacobi"
    rows = []
    for order in ORDERS.get(name, (0,)):
        threads, shared = 256, 0
        if kernel in one_matrix:
            plan = m.plan(getattr(m.Kernel, one_matrix[kernel]), order, is_double)
            threads, shared = plan["threads"], plan["shared_bytes"]
        elif kernel == "features_bwd_kernel":
            shared = m.rows_shared_bytes(order, is_double)
        elif kernel in ("gram_kernel", "samples_bwd_kernel"):
            by_warps = kernel == "gram_kernel" and not is_double
            shared = m.product_shared_bytes(is_double, by_warps)
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
    assert blocks["gram_kernel float32 3", 0] >= 2


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
    products = {"WarpTileILi1E": 4, "WarpTileILi3E": 12}  # per step of 8
    for name, text in seen.items():
        assert not re.search(r"\b(LDL|STL)\b", text), name
        wanted = [count for policy, count in products.items() if policy in name]
        tensor_core = re.findall(r"\bHMMA\.\S*TF32", text)
        assert len(tensor_core) == (wanted[0] if wanted else 0), name
        assert "HMMA" not in text or wanted, name
        if "jacobi_kernelIf" in name or "samples_bwd_kernelIf" in name:
            assert text.count("FFMA") > 16, name
        if "gram_kernelId" in name or "samples_bwd_kernelId" in name:
            assert text.count("DFMA") > 16, name
    assert sum("gram_kernelIf" in name for name in seen) >= 2
