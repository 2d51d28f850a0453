"""``python -m benchmarks.run``: every case on the hardware at hand, one table, one JSON file.

    python -m benchmarks.run                    CPU, or the GPU if there is one
    python -m benchmarks.run --device cpu       CPU
    python -m benchmarks.run --quick --out DIR  tiny shapes: does it run?

Exits with 1 if one of our results was wrong, or could not be had.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import cases, measure
from .memory import MemoryProbe

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1
ORDER = (
    "von_neumann",
    "coding_rate",
    "renyi2",
    "renyi3",
    "renyi_inf",
    "joint2",
    "ready1",
    "gram",
)  # of the columns
# The most wanted first.
SLOW_ORDER = (
    "coding_rate",
    "renyi2",
    "gram",
    "von_neumann",
    "renyi3",
    "renyi_inf",
    "joint2",
    "ready1",
)
# Passes over the shapes: whether of what takes long to prepare, of which quantities, until which
# part of the time. Eager eigenvalues take seconds on a GPU: they wait until the rest is there.
PASSES = {
    "cpu": ((False, ORDER, 2 / 3), (True, SLOW_ORDER, 1.0)),
    "cuda": (
        (False, SLOW_ORDER[:3], 0.45),
        (False, SLOW_ORDER[3:], 0.75),
        (True, SLOW_ORDER, 1.0),
    ),
}


def shapes_for(device: str, quick: bool) -> tuple[cases.Shape, ...]:
    if quick:
        return cases.QUICK_SHAPES
    return cases.GPU_SHAPES if device == "cuda" else cases.CPU_SHAPES


def add_memory(row: dict, shape: cases.Shape, probe: MemoryProbe) -> None:
    for name, result in row["implementations"].items():
        if "peak_bytes" not in result:
            arguments = (shape, row["quantity"], row["direction"], name)
            result["peak_bytes"] = probe.peak(*arguments)


def suite(
    shapes: tuple[cases.Shape, ...],
    setting: measure.Setting,
    probe: MemoryProbe,
    vendor: bool = False,
    deadline: float = float("inf"),
    progress: Callable[[str, list[dict]], None] = lambda message, rows: None,
) -> tuple[list[dict], list[str]]:
    """Rows of the results, and the cases that the time limit or the memory left no room for.

    The last pass does what takes long to prepare (compilation), each measured interleaved with
    "fast" again; its ratio is the one to that partner.
    """
    rows, dropped = {}, []
    start = time.monotonic()
    for slow, quantities, part in PASSES[setting.device]:
        for shape in shapes:
            inputs = cases.make_inputs(shape, setting.device)
            for quantity in quantities:
                if not cases.measured(shape, quantity, setting.device):
                    continue
                every = cases.implementations(quantity, shape, setting.device, vendor)
                wanted = {k: v for k, v in every.items() if v.slow == slow or k == "fast"}
                if slow and len(wanted) == 1:
                    continue
                case = f"{shape.label} {cases.QUANTITIES[quantity].title}"
                if time.monotonic() > start + (deadline - start) * part:
                    dropped.append(f"{case}{' (torch.compile, CUDA graph)' if slow else ''}")
                    continue
                try:
                    data = measure.make_data(shape, quantity, inputs)
                except torch.OutOfMemoryError:
                    dropped.append(f"{case} (no memory for the float64 reference)")
                    continue
                for direction in cases.DIRECTIONS:
                    progress(f"{case} {direction}", list(rows.values()))
                    row = measure.measure(data, direction, wanted, setting)
                    if setting.device == "cpu":
                        add_memory(row, shape, probe)
                    key = (shape, quantity, direction)
                    if slow and key in rows:
                        row["implementations"].pop("fast", None)
                        for part in ("implementations", "not_timed"):
                            rows[key][part] |= row[part]
                    else:
                        rows[key] = row
            del inputs
            if setting.device == "cuda":
                torch.cuda.empty_cache()
    return list(rows.values()), dropped


# --------------------------------------------------------------------------------------------------
# The table


def aligned(header: list[str], body: list[list[str]]) -> str:
    lines = [header, *body]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def row(first: str, *others: str) -> str:
        right = (c.rjust(w) for c, w in zip(others, widths[1:], strict=True))
        return "  ".join([first.ljust(widths[0]), *right])

    text = [row(*line) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def table(rows: list[dict], cell: Callable[[dict], str]) -> str:
    """Shapes down, quantities across; a cell for forward / forward and backward."""
    names = {}
    for row in rows:
        names.setdefault(shape_of(row), {})[row["quantity"], row["direction"]] = cell(row)
    columns = [q for q in ORDER if any((q, "fwd") in cells for cells in names.values())]
    body = [
        [s.label, *(" / ".join(c.get((q, d), "-") for d in cases.DIRECTIONS) for q in columns)]
        for s, c in names.items()
    ]
    return aligned(["batch×n×d", *(cases.QUANTITIES[q].title for q in columns)], body)


def shape_of(row: dict) -> cases.Shape:
    return cases.Shape(*row["shape"], row["dtype"])


def ratio(row: dict, name: str = "eager") -> str:
    found = row["implementations"].get(name, {}).get("over_fast")
    return "-" if found is None else f"{found:.1f}x"


def fast_field(field: str, form: Callable[[float], str]) -> Callable[[dict], str]:
    def cell(row: dict) -> str:
        found = row["implementations"].get("fast", {}).get(field)
        return "-" if found is None else form(found)

    return cell


def megabytes(row: dict) -> str:
    peaks = [row["implementations"].get(i, {}).get("peak_bytes") for i in ("fast", "eager")]
    return "-" if None in peaks else f"{peaks[0] / 2**20:.0f}:{peaks[1] / 2**20:.0f}"


def problems(rows: list[dict]) -> list[str]:
    return [
        f"{shape_of(row).label} {row['quantity']} {row['direction']}: {name} not timed: {reason}"
        for row in rows
        for name, reason in row["not_timed"].items()
    ]


def summary(result: dict) -> str:
    """The table that a run ends with."""
    env, rows = result["environment"], result["cases"]
    hardware = env.get("gpu") or f"{env['cpu']}, {env['threads']} threads, {env['isa']}"
    rates = result["rates"]
    peak = ", ".join(f"{k} {v * 1e-9:.0f} GFLOP/s" for k, v in rates["flops_per_s"].items())
    parts = [
        f"{hardware}; torch {env['torch']}, mmae_fast {env['mmae_fast']}, commit {env['commit']}",
        f"measured here: copy {rates['copy_bytes_per_s'] * 1e-9:.1f} GB/s, product {peak}",
        "",
        "Speed-up over eager PyTorch, forward / forward + backward",
        table(rows, ratio),
    ]
    others = {n for row in rows for n in row["implementations"]} - {"fast", "eager"}
    for name in sorted(others):
        some = [r for r in rows if name in r["implementations"]]
        parts += ["", f"Time of {name} over ours", table(some, lambda r, n=name: ratio(r, n))]
    parts += [
        "",
        "Ours in ms",
        table(rows, fast_field("median_s", lambda x: f"{x * 1e3:.3g}")),
        "",
        "Ours, fraction of the roofline (above 100%: a cache held the input)",
        table(rows, fast_field("roofline", lambda x: f"{x:.0%}")),
    ]
    if any(megabytes(row) != "-" for row in rows):
        parts += ["", "Peak extra memory in MiB, ours:eager", table(rows, megabytes)]
    if result["dropped"]:
        parts += ["", "Not measured: " + "; ".join(result["dropped"])]
    return "\n".join([*parts, *(["", *problems(rows)] if problems(rows) else [])])


# --------------------------------------------------------------------------------------------------
# Command line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds per case")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds in all")
    parser.add_argument("--vendor", action="store_true", help="also cuSOLVER's XsyevBatched")
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory on the CPU")
    options = parser.parse_args(argv)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: --device cuda, but PyTorch sees no GPU", file=sys.stderr)
        return 2
    if options.quick and options.out == RESULTS:
        parser.error("--quick needs --out: its numbers are no results")

    start = time.monotonic()
    env = measure.environment(device)
    path = options.out / f"{measure.device_slug(env)}.json"
    rates = measure.machine_rates(device, options.quick)
    budget, rounds = (0.02, 2) if options.quick else (options.budget, 5)
    setting = measure.Setting(device, rates, budget, rounds)
    result = {
        "schema": SCHEMA,
        "environment": env,
        "rates": rates,
        "settings": {"budget_s": budget, "min_rounds": rounds, "quick": options.quick},
    }

    def save(rows: list[dict], dropped: list[str], complete: bool) -> None:
        result.update(cases=rows, dropped=dropped, complete=complete)
        result["seconds"] = round(time.monotonic() - start, 1)
        options.out.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        os.replace(partial, path)

    def progress(message: str, rows: list[dict]) -> None:
        print(f"[{time.monotonic() - start:5.0f} s] {message}", file=sys.stderr, flush=True)
        if device == "cuda":  # a crash or a time limit must not cost what was measured
            save(rows, [], complete=False)

    with MemoryProbe(enabled=device == "cpu" and not options.no_memory) as probe:
        deadline = start + options.time_limit
        shapes = shapes_for(device, options.quick)
        rows, dropped = suite(shapes, setting, probe, options.vendor, deadline, progress)
    save(rows, dropped, complete=True)
    print(summary(result))
    print(f"\nwrote {path}")
    ours = [r for r in rows if any(name.startswith("fast") for name in r["not_timed"])]
    wrong = [p for p in problems(rows) if "wrong:" in p and device == "cpu"]
    return 1 if ours or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
