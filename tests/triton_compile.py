"""The Triton kernels as machine code, without a GPU: registers, spills, tensor-core instructions.

    python tests/triton_compile.py            compiles all, compares with tests/triton_budget.json
    python tests/triton_compile.py --write    writes that file, and the table of docs/triton.md

triton.compile takes a kernel, types of its arguments and a target; the tools that come with Triton
read what it made. Registers belong to a version of the compiler: the budget names the one it was
written with, and those of other versions are held to no spills, shared memory and instructions.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from mmae_fast.kernels import coding_rate, configs, gram, product, rows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).parent.parent
BUDGET = ROOT / "tests" / "triton_budget.json"
PAGE = ROOT / "docs" / "triton.md"
ARCHITECTURES = (80, 90, 100)
TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
# What is not named here is a float32 tensor if its name is in POINTERS, and else an int.
POINTERS = {"scale", "mean", "gram", "moments", "partial", "weight", "grad", "dots", "value"}
POINTERS |= {"y", "sums", "largest"}
ALIGNED = {"n", "d", "order", "depth", "span"}
ALIGNED |= {"stride_b", "stride_n", "stride_o", "stride_s", "stride_y"}
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")  # mma.sync, wgmma, tcgen05


class Case(NamedTuple):
    kernel: object
    dtype: str
    options: dict
    config: configs.Config | None  # None: no tiles of the tables, no tensor cores
    out: str = "float32"


def cases(arch: int) -> dict[str, Case]:
    """The heaviest variant of every kernel, dtype and side, with the tables' tiles."""
    found = {}
    rows_of = {
        "samples": {"SAMPLES": True, "CENTER": False, "HAS_MASK": False},
        "features": {"SAMPLES": False, "CENTER": False, "HAS_MASK": True},
        "centred": {"SAMPLES": False, "CENTER": True, "HAS_MASK": True},
    }
    for dtype in ("float32", "bfloat16"):
        t = getattr(torch, dtype)
        for name, side in rows_of.items():
            raw = side["SAMPLES"]
            for order in (configs.SMALL_ORDER, 4096):
                if order == configs.SMALL_ORDER and raw != (dtype == "float32"):
                    continue
                config = configs.gram(t, order, side["SAMPLES"], side["CENTER"], arch)
                outputs = {"UNIT": raw, "FULL": True, "MOMENTS": False}
                options = side | outputs | {"SPLIT": False, "PRECISION": "tf32x3", "GROUP": 8}
                label = f"gram {dtype} {name} {config.block}"
                found[label] = Case(gram._gram_kernel, dtype, options, config)
                config = configs.product(t, order, order, arch)
                project = not side["SAMPLES"]
                options = side | {"PROJECT": project, "PRECISION": "tf32x3", "GROUP": 8}
                options["HAS_MASK"] = True
                label = f"product {dtype} {name} {config.block}"
                out = "float32" if project else dtype
                found[label] = Case(product._product_kernel, dtype, options, config, out)
            for order in {"samples": (16, 64, 128), "features": (), "centred": (64, 128)}[name]:
                largest = configs.largest_coding_rate(t, side["CENTER"], arch)
                if order > largest or order == largest / 2:
                    continue
                options = side | {"NORMALIZE": True, "WEIGHT": True, "PRECISION": "tf32x3"}
                config = configs.coding_rate(order)
                label = f"coding rate {dtype} {name} {order}"
                found[label] = Case(coding_rate._coding_rate_kernel, dtype, options, config)
    options = {"UNIT": True, "FULL": True, "MOMENTS": False, "BLOCK": 128, "GROUP": 8}
    found["gram splits"] = Case(gram._reduce_kernel, "float32", options, None)
    tile = {"BLOCK_N": 4, "BLOCK_D": 1024}
    options = {"NORMALIZE": True, "HAS_MASK": True, "TF32": False} | tile
    found["row scale"] = Case(rows._row_scale_kernel, "bfloat16", options, None)
    options = {"CHUNK": 256, "BLOCK_N": 32, "BLOCK_D": 128}
    found["mean row"] = Case(rows._mean_kernel, "bfloat16", options, None)
    found["mean dots"] = Case(rows._dots_kernel, "bfloat16", {"HAS_MASK": True} | tile, None)
    options = {"TILES": 8, "BLOCK_N": 32, "BLOCK_D": 128}
    found["projection"] = Case(product._project_kernel, "bfloat16", options, None, "bfloat16")
    return found


# Those whose registers are scarcest, compiled by every run of the tests; the others are slow ones.
QUICK = {
    80: ("gram float32 samples 64", "gram bfloat16 features 128", "product float32 centred 64"),
    90: (
        "gram float32 samples 128",
        "gram bfloat16 samples 128",
        "gram bfloat16 features 128",
        "product float32 centred 128",
        "coding rate bfloat16 samples 128",
        "coding rate float32 samples 64",
    ),
    100: ("gram bfloat16 samples 128", "gram float32 centred 128"),
}


def compile_case(case: Case, arch: int) -> dict:
    """Registers, stack and shared bytes, and which tensor-core instructions there are."""
    options = dict(case.options)
    launch = {"num_warps": 8 if case.kernel in (gram._reduce_kernel, rows._row_scale_kernel) else 4}
    if case.config:
        options |= {"BLOCK": case.config.block, "DEPTH": case.config.depth}
        launch = {"num_warps": case.config.warps, "num_stages": case.config.stages}
    signature, constants, attributes = {}, {}, {}
    for at, name in enumerate(case.kernel.arg_names):
        if name in options or name == "stride_d":
            signature[name], constants[name] = "constexpr", options.get(name, 1)
            continue
        types = {"z": TYPES[case.dtype], "out": TYPES[case.out], "mask": "*i1", "c": "fp32"}
        signature[name] = types.get(name, "*fp32" if name in POINTERS else "i32")
        free = case.kernel.params[at].do_not_specialize
        if signature[name].startswith("*") or (name in ALIGNED and not free):
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, sass = (tool(flag, file.name) for flag in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": made.metadata.shared,
        "tensor_core": [name for name in TENSOR_CORE if re.search(rf"\b{name}\b", sass)],
    }


def tool(*arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def problems(name: str, arch: int, case: Case, found: dict, budget: dict) -> list[str]:
    """What is over the budget."""
    wrong = []
    if found["stack"] or found["spills"]:
        wrong.append(f"{found['stack']} bytes of stack, {found['spills']} spill instructions")
    if found["shared"] > configs.SHARED_BYTES:
        wrong.append(f"{found['shared']} bytes of shared memory")
    if case.config and not found["tensor_core"]:
        wrong.append("no tensor-core instructions")
    allowed = budget["sm"][str(arch)].get(name)
    if allowed is None:
        wrong.append("not in the budget: python tests/triton_compile.py --write")
    elif budget["triton"] == triton.__version__:
        for what in ("registers", "shared"):
            if found[what] > allowed[what]:
                wrong.append(f"{what}: {found[what]}, budget {allowed[what]}")
    return [f"sm_{arch} {name}: {what}" for what in wrong]


def table(budget: dict) -> str:
    """Registers a thread / KB of shared memory a block, of every case and architecture."""
    names = list(dict.fromkeys(n for found in budget["sm"].values() for n in found))
    lines = ["| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |"]
    lines += ["|---|" + "---:|" * len(ARCHITECTURES)]
    for name in dict.fromkeys(re.sub(r" \d+$", "", n) if n[:2] != "co" else n for n in names):
        cells = []
        for arch in map(str, ARCHITECTURES):
            sizes = [n for n in budget["sm"][arch] if n == name or n.startswith(f"{name} ")]
            if not sizes:
                cells.append("–")
                continue
            largest = max(sizes, key=lambda n: int(re.sub(r"\D", "", n.split()[-1]) or 0))
            found = budget["sm"][arch][largest]
            size = largest.split()[-1] if name[:2] != "co" and largest != name else ""
            tile = f"{size}²: " if size else ""
            cells.append(f"{tile}{found['registers']} / {found['shared'] / 1024:.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, nargs="*", default=ARCHITECTURES)
    options = parser.parse_args()
    budget = {"triton": triton.__version__, "sm": {}}
    if BUDGET.exists():
        budget = json.loads(BUDGET.read_text())
    wrong = []
    for arch in options.arch:
        made = {}
        for name, case in cases(arch).items():
            made[name] = compile_case(case, arch)
            print(f"sm_{arch} {name}: {made[name]}", flush=True)
        if options.write:
            budget = {"triton": triton.__version__, "sm": budget["sm"] | {str(arch): made}}
        for name, case in cases(arch).items():
            wrong += problems(name, arch, case, made[name], budget)
    if options.write:
        BUDGET.write_text(json.dumps(budget, indent=1) + "\n")
        if len(budget["sm"]) == len(ARCHITECTURES):
            start, end = "<!-- aot -->", "<!-- /aot -->"
            text = PAGE.read_text()
            before, after = text.split(start)[0], text.split(end)[1]
            PAGE.write_text(f"{before}{start}\n{table(budget)}\n{end}{after}")
    raise SystemExit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
