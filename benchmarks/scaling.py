"""What a regulariser of the global batch costs per step on many GPUs, from rates: docs/scaling.md.

    python -m benchmarks.scaling                  fill the tables of docs/scaling.md
    python -m benchmarks.scaling --check          exit with 1 if they are stale
    python -m benchmarks.scaling --rates r.json   print the tables for measured rates

The rates are assumptions about an H100 until they are measured; r.json holds any of the fields of
``Rates``. The formulas are those of docs/scaling.md, which explains them.
"""

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from mmae_fast.distributed import ROWS_PER_FEATURE

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
MARKER = re.compile(r"(<!-- scaling:(\w+) -->)(.*?)(<!-- /scaling -->)", re.S)

GPUS = (8, 64, 1024)
WIDTHS = (768, 1024, 2048, 4096)
ROWS_PER_GPU = 128
BYTES = 2  # a number of bfloat16 features


@dataclass(frozen=True)
class Rates:
    """Per second, of one GPU; assumptions."""

    memory: float = 3.0e12  # bytes, read or written
    product: float = 50e12  # flops of float32 matrix products, full precision
    cholesky: float = 1e12  # flops of factor and inverse at k = 1000, growing as k
    eigen: float = 0.5e12  # flops of an eigendecomposition at k = 1000, growing as k
    model: float = 250e12  # flops of a ViT's forward and backward pass, bfloat16
    node: float = 360e9  # bytes through each rank of a ring, up to 8 GPUs
    network: float = 45e9  # the same, across nodes
    latency: float = 20e-6  # seconds, of a collective, per doubling of the ranks
    message: float = 30e-6  # seconds, of one small message between two hosts
    received: float = 3e-6  # seconds, of one of many that come in at once


@dataclass(frozen=True)
class Cost:
    route: str
    rows: int
    moved: float  # bytes that leave each GPU
    flops: float  # matrix products and factorisation on each GPU
    communication: float  # seconds
    products: float
    factor: float
    host: float

    @property
    def total(self) -> float:
        """On the GPU; the host compares arguments meanwhile."""
        return self.communication + self.products + self.factor


def vit_l_flops(tokens: int = 49, patches: int = 196) -> float:
    """Forward and backward pass of one image in a masked autoencoder, ViT-L/16 and its decoder."""

    def blocks(depth, width, tokens):
        return depth * (24 * width**2 * tokens + 4 * tokens**2 * width)

    return 3 * (blocks(24, 1024, tokens + 1) + blocks(8, 512, patches + 1))


def cost(gpus: int, d: int, quantity: str, rates: Rates, own: int = ROWS_PER_GPU) -> Cost:
    """One forward and backward pass of "coding rate" or "von Neumann" of own · gpus rows."""
    rows = own * gpus
    reduced = rows > ROWS_PER_FEATURE * d
    ring = (gpus - 1) / gpus
    moved = ring * (2 * 4 * d**2 if reduced else rows * d * BYTES)
    k = min(rows, d)
    # Gram matrix, and the same again for the gradient; whoever gathers does it for all rows.
    here = own if reduced else rows
    products = 2 * 2 * here * d * k
    traffic = 3 * here * d * BYTES + 4 * 4 * k**2
    factor = k**3 if quantity == "coding rate" else 9 * k**3
    rate = rates.cholesky if quantity == "coding rate" else rates.eigen
    bandwidth = rates.node if gpus <= 8 else rates.network
    return Cost(
        route="all-reduce" if reduced else "gather",
        rows=rows,
        moved=moved,
        flops=products + factor,
        communication=moved / bandwidth + math.ceil(math.log2(gpus)) * rates.latency,
        products=max(products / rates.product, traffic / rates.memory),
        factor=factor / (rate * k / 1000),
        host=(gpus - 1) * rates.received + (1 + math.ceil(math.log2(gpus))) * rates.message,
    )


def step_seconds(rates: Rates) -> float:
    return ROWS_PER_GPU * vit_l_flops() / rates.model


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def costs_table(rates: Rates) -> str:
    step = step_seconds(rates)
    rows = []
    for gpus in GPUS:
        for d in WIDTHS:
            rate, entropy = (cost(gpus, d, q, rates) for q in ("coding rate", "von Neumann"))
            rows.append(
                [
                    f"{gpus:,}",
                    f"{rate.rows:,}",
                    f"{d:,}",
                    rate.route,
                    f"{rate.moved / 1e6:.1f}",
                    f"{rate.flops / 1e9:.1f}",
                    f"{1e3 * rate.communication:.2f}",
                    f"{1e3 * rate.products:.2f}",
                    f"{1e3 * rate.factor:.2f}",
                    f"{rate.total / step:.1%}",
                    f"{entropy.total / step:.1%}",
                    f"{1e3 * rate.host:.1f}",
                ]
            )
    header = ["GPUs", "N", "d", "route", "MB moved", "GFLOP", "moving, ms", "products, ms"]
    return table([*header, "factor, ms", "coding rate", "von Neumann", "host, ms"], rows)


def limit_table(rates: Rates, share: float = 0.01) -> str:
    """The largest d, in steps of 64 up to 16384, whose cost is below a share of the step."""
    budget = share * step_seconds(rates)

    def largest(gpus, quantity, part):
        fits = [d for d in range(64, 16385, 64) if part(cost(gpus, d, quantity, rates)) <= budget]
        return f"{max(fits):,}" if fits else "none"

    rows = []
    for gpus in GPUS:
        row = [f"{gpus:,}"]
        row += [largest(gpus, q, lambda c: c.total) for q in ("coding rate", "von Neumann")]
        row += [largest(gpus, "coding rate", lambda c: c.communication + c.products)]
        rows.append(row)
    return table(["GPUs", "coding rate", "von Neumann", "Rényi-2 (no factor)"], rows)


def blocks(rates: Rates) -> dict[str, str]:
    values = [[field.name, f"{getattr(rates, field.name):.3g}"] for field in fields(rates)]
    values += [["step of ViT-L, ms", f"{1e3 * step_seconds(rates):.1f}"]]
    return {
        "rates": table(["rate", "value"], values),
        "costs": costs_table(rates),
        "limits": limit_table(rates),
    }


def filled(page: str, rates: Rates) -> str:
    text = blocks(rates)
    return MARKER.sub(lambda m: f"{m[1]}\n{text[m[2]]}\n{m[4]}", page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rates", type=Path)
    options = parser.parse_args()
    if options.rates:
        rates = Rates(**json.loads(options.rates.read_text()))
        print("\n\n".join(blocks(rates).values()))
        return 0
    page = PAGE.read_text()
    new = filled(page, Rates())
    if options.check:
        if new != page:
            print("docs/scaling.md is stale: run python -m benchmarks.scaling", file=sys.stderr)
        return int(new != page)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
