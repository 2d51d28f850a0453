"""What nvcc makes of csrc/cuda on sm_90a: tests/cuda_resources.json, the table of docs/cuda.md.

    python tests/cuda_resources.py            # compile, compare
    python tests/cuda_resources.py --write    # record what was found, and the table of docs/cuda.md

The file has, per kernel and type: registers per thread, and the plan's threads and shared memory
for the largest order of it; from those the occupancy follows. No GPU is needed.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUDGET = ROOT / "tests" / "cuda_resources.json"
PAGE = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- resources -->\n", "<!-- /resources -->"
# Of one multiprocessor of sm_90.
REGISTERS, THREADS, SHARED, BLOCKS = 65536, 2048, 228 * 1024, 32
WARN = "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage"
TYPES = {"f": "float32", "d": "float64"}
# How tiles.cuh multiplies, by the mangled name: products per number, or none of tensor cores.
POLICIES = {
    "WarpTileILi2ELi2E": "3xTF32",
    "WarpTileILi2ELi0E": "2xTF32",
    "WarpTileILi0ELi2E": "2xTF32",
    "WarpTileILi1ELi1E": "TF32",
    "PairTileI": "16-bit",
}


def setup():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("mmae_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(nvcc: str, folder: Path, arch: str = "90a") -> str:
    """Cubins of csrc/cuda in a folder; the compiler's report."""
    flags = [*setup().NVCC_FLAGS.split(), f"-gencode=arch=compute_{arch},code=sm_{arch}", WARN]
    running = [
        subprocess.Popen(
            [nvcc, *flags, "-cubin", str(source), "-o", str(folder / f"{source.name}.cubin")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    ]
    text = "".join(process.communicate()[0] for process in running)
    if any(process.returncode for process in running):
        raise SystemExit(text)
    return text


def words(name: str, kind: str, arguments: str) -> str:
    """Kernel, type, policy, template numbers: the tile of a policy, or the largest block."""
    policy = next((policy for policy in POLICIES if policy in arguments), None)
    numbers = re.findall(r"Li([0-9]+)E", arguments.partition(policy)[2] if policy else arguments)
    parts = [name, TYPES[kind], POLICIES[policy]] if policy else [name, TYPES[kind]]
    return " ".join([*parts, "x".join(numbers)]).strip()


def kernels(report: str) -> dict[str, dict[str, int]]:
    """Kernel, type, policy and numbers, in words → registers, stack bytes, spilled bytes."""
    pattern = (
        r"entry function '_ZN4mmae4cuda\d+([a-z0-9_]+_kernel)I([fd])([^']*?)Ev[^']*'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers"
    )
    found = {}
    for *parts, stack, stores, loads, registers in re.findall(pattern, report, re.DOTALL):
        row = {"registers": int(registers), "stack": int(stack), "spill": int(stores) + int(loads)}
        key = words(*parts)
        assert found.setdefault(key, row)["registers"] == row["registers"], key
    return dict(sorted(found.items()))


def blocks_per_multiprocessor(registers: int, threads: int, shared: int) -> int:
    """Of sm_90: registers come in 8 per thread and 256 per warp, shared memory with 1 KiB more."""
    per_warp = -(-registers * 32 // 256) * 256
    return min(REGISTERS // (per_warp * threads // 32), THREADS // threads, BLOCKS,
               SHARED // (shared + 1024))  # fmt: skip


def occupancy(row: dict) -> tuple[int, float]:
    blocks = blocks_per_multiprocessor(row["registers"], row["threads"], row["shared"])
    return blocks, blocks * row["threads"] / THREADS


def table(budget: dict) -> str:
    head = "| kernel | registers | spilled | at order | threads | shared memory | blocks / SM |"
    lines = [head + " occupancy |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for name, row in budget.items():
        for plan in row["plans"]:
            blocks, share = occupancy(row | plan)
            lines.append(
                f"| {name} | {row['registers']} | {row['spill']} B | {plan['order']} |"
                f" {plan['threads']} | {plan['shared'] / 1024:.1f} KiB | {blocks} | {share:.0%} |"
            )
    return "\n".join(lines) + "\n"


def page(budget: dict) -> str:
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table(budget) + END + rest.partition(END)[2]


def main() -> None:
    nvcc, reason = setup().find_toolkit()
    if nvcc is None:
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder:
        found = kernels(compiled(nvcc, Path(folder)))
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    for name, row in found.items():
        limit = budget.get(name, {}).get("registers")
        print(f"{name}: {row['registers']} registers (budget {limit}), spilled {row['spill']} B")
    if "--write" in sys.argv[1:]:
        sys.path.insert(0, str(ROOT))
        from tests.test_cuda_resources import plans_of

        rows = {name: row | {"plans": plans_of(name)} for name, row in found.items()}
        BUDGET.write_text(json.dumps(rows, indent=1) + "\n")
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
