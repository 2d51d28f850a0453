"""The README's numbers and the figures, from benchmarks/results/*.json and from nothing else.

    python -m benchmarks.report            fill the README's markers, draw the figures
    python -m benchmarks.report --check    exit with 1 if the README is stale (draws nothing)

A block between ``<!-- bench:NAME -->`` and ``<!-- /bench -->`` is replaced by the text of NAME:
``headline`` (a sentence), ``figure``, ``cpu-table`` and ``gpu-table``.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

from . import cases, measure, run

README = Path(__file__).parent.parent / "README.md"
MARKER = re.compile(r"(<!-- bench:([\w-]+) -->)(.*?)(<!-- /bench -->)", re.S)
NO_GPU = "Not yet measured on a GPU."


def load(folder: Path, device: str) -> dict | None:
    """The newest finished measurement of a device type."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [
        r
        for r in found
        if r.get("schema") == run.SCHEMA
        and r["complete"]
        and not r["settings"]["quick"]
        and r["environment"]["device"] == device
    ]
    return max(found, key=lambda r: r["environment"]["date"], default=None)


def hardware(env: dict) -> str:
    if env["device"] == "cuda":
        return f"{env['gpu']}, CUDA {env['cuda']}"
    return f"{env['cpu']} ({env['threads']} threads, {env['isa']})"


def versions(env: dict) -> str:
    commit = f", commit {env['commit']}" if env["commit"] else ""
    return f"PyTorch {env['torch']}, mmae_fast {env['mmae_fast']}{commit}, {env['date']}"


def ratios(result: dict, direction: str, quantity: str | None = None) -> list[float]:
    return [
        row["implementations"]["eager"]["over_fast"]
        for row in result["cases"]
        if row["direction"] == direction
        and quantity in (None, row["quantity"])
        and "over_fast" in row["implementations"].get("eager", {})
    ]


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def memory_ratio(result: dict) -> float | None:
    """Geometric mean of eager's peak memory over ours, value and gradient; from 1 MiB on."""
    pairs = [
        [row["implementations"].get(name, {}).get("peak_bytes") for name in ("eager", "fast")]
        for row in result["cases"]
        if row["direction"] == "fwd+bwd"
    ]
    found = [eager / fast for eager, fast in pairs if eager and fast and min(eager, fast) >> 20]
    return geometric_mean(found) if found else None


def spread(values: list[float]) -> str:
    low, high, mean = min(values), max(values), geometric_mean(values)
    return f"{low:.1f}x to {high:.1f}x (geometric mean {mean:.1f}x)"


def headline(result: dict | None) -> str:
    if result is None:
        return "Not yet measured."
    both, forward = ratios(result, "fwd+bwd"), ratios(result, "fwd")
    memory = memory_ratio(result)
    saving = f", in {memory:.1f}x less memory (geometric mean)" if memory else ""
    return (
        f"Value and gradient {spread(both)} as fast as eager PyTorch{saving}, values alone "
        f"{spread(forward)}: {len(both)} cases, {hardware(result['environment'])}, "
        f"{versions(result['environment'])}."
    )


def figure_link(result: dict | None) -> str:
    if result is None:
        return ""
    path = f"benchmarks/results/{measure.device_slug(result['environment'])}.png"
    return f"![Speed-up over eager PyTorch]({path})"


def markdown(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured_quantities(rows: list[dict]) -> tuple[str, ...]:
    return tuple(q for q in run.ORDER if any(row["quantity"] == q for row in rows))


def speed_table(result: dict, name: str, quantities: tuple[str, ...]) -> str:
    rows = {(run.shape_of(r), r["quantity"], r["direction"]): r for r in result["cases"]}
    shapes = list(dict.fromkeys(shape for shape, _, _ in rows))

    def cell(shape, quantity):
        found = [rows.get((shape, quantity, d)) for d in cases.DIRECTIONS]
        return " / ".join(run.ratio(row, name) if row else "-" for row in found)

    return markdown(
        ["batch × n × d", *(cases.QUANTITIES[q].title for q in quantities)],
        [[shape.label, *(cell(shape, q) for q in quantities)] for shape in shapes],
    )


def table(result: dict) -> str:
    """Speed-ups over eager, then over each stronger baseline that was measured."""
    env = result["environment"]
    parts = [
        f"Speed-up over eager PyTorch, forward / forward + backward. {hardware(env)}; "
        f"{versions(env)}.",
        speed_table(result, "eager", measured_quantities(result["cases"])),
    ]
    for name in ("cholesky_ex", "torch.compile", "XsyevBatched"):
        some = [r for r in result["cases"] if name in r["implementations"]]
        if some:
            quantities = measured_quantities(some)
            parts += [
                f"Over `{name}`:",
                speed_table({**result, "cases": some}, name, quantities),
            ]
    return "\n\n".join(parts)


def blocks(folder: Path) -> dict[str, str]:
    cpu, gpu = load(folder, "cpu"), load(folder, "cuda")
    return {
        "headline": headline(cpu),
        "figure": figure_link(cpu),
        "cpu-table": table(cpu) if cpu else "Not yet measured.",
        "gpu-table": table(gpu) if gpu else NO_GPU,
    }


def fill(text: str, content: dict[str, str]) -> str:
    """The text with its blocks up to date.

    Raises:
        ValueError: a marker has an unknown name.
    """

    def replace(match):
        begin, name, _, end = match.groups()
        if name not in content:
            raise ValueError(f"unknown marker bench:{name}; there are {', '.join(content)}")
        return f"{begin}\n{content[name]}\n{end}"

    return MARKER.sub(replace, text)


def draw(result: dict, path: Path) -> None:
    """Bars of the speed-up over eager: shapes down, quantities in colours, one panel each way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = {(run.shape_of(r), r["quantity"], r["direction"]): r for r in result["cases"]}
    shapes = list(dict.fromkeys(shape for shape, _, _ in rows))
    colours = (
        "#1b6ca8",
        "#e07a1f",
        "#3a9d5d",
        "#b5477d",
        "#8d6bb8",
        "#c9a227",
        "#8c8c8c",
        "#4b4b4b",
    )
    height = 0.8 / len(run.ORDER)
    figure, panels = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.85 * len(shapes)), sharey=True, layout="constrained"
    )
    for panel, direction in zip(panels, cases.DIRECTIONS, strict=True):
        for i, (quantity, colour) in enumerate(zip(run.ORDER, colours, strict=True)):
            found = [
                rows.get((shape, quantity, direction), {"implementations": {}})["implementations"]
                for shape in shapes
            ]
            lengths = [f.get("eager", {}).get("over_fast", 0) for f in found]
            places = [j + (i - (len(run.ORDER) - 1) / 2) * height for j in range(len(shapes))]
            title = cases.QUANTITIES[quantity].title
            bars = panel.barh(places, lengths, height * 0.92, color=colour, label=title)
            labels = [f"{x:.1f}x" if x else "" for x in lengths]
            panel.bar_label(bars, labels, padding=2, fontsize=7.5)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title("value" if direction == "fwd" else "value and gradient")
        panel.set_xlabel("times as fast as eager PyTorch")
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.1)
    panels[0].set_yticks(range(len(shapes)), [shape.label for shape in shapes])
    panels[0].set_ylabel("batch × n × d")
    panels[0].invert_yaxis()
    handles, titles = panels[0].get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside lower center", ncols=len(titles), frameon=False)
    env = result["environment"]
    figure.suptitle(f"{hardware(env)}\n{versions(env)}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=run.RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(argv)
    before = options.readme.read_text()
    after = fill(before, blocks(options.results))
    names = [match[1] for match in MARKER.findall(before)]
    if options.check:
        if after != before:
            print(f"{options.readme} is stale: run `python -m benchmarks.report`", file=sys.stderr)
        return int(after != before)
    if after != before:
        options.readme.write_text(after)
    print(f"{options.readme}: {', '.join(names) or 'no markers'}")
    for device in ("cpu", "cuda"):
        result = load(options.results, device)
        if result is not None:
            path = options.results / f"{measure.device_slug(result['environment'])}.png"
            draw(result, path)
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
