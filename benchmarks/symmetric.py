"""``python -m benchmarks.symmetric``: what the shapes of cases.py do not ask of a GPU.

1. The Gram matrix alone, against cuBLAS (``x @ x.mT``, all of it) at k = 768, 1024, 4096: time, and
   what part of the tensor cores' rate in a large product (8192³, measured in the same run) its
   k (k + 1) m flops reach. Above 50% is more than any product of the whole square can.
2. What the regulariser adds to a training step of a ViT-B encoder (12 blocks of 768, 50 tokens an
   image, autocast to bfloat16): share of the step.

Interleaved and checked like every benchmark here; results in benchmarks/results/symmetric/.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mmae_fast import fast_gram
from mmae_fast.backends import dispatch
from mmae_fast.losses import MatrixEntropyRegularizer

from . import measure

RESULTS = Path(__file__).parent / "results" / "symmetric"
ORDERS, DEPTH = (768, 1024, 4096), 4096


def own_backends(device: str) -> list[str]:
    names = ("torch", "triton", "cuda") if device == "cuda" else ("cpu",)
    return [b for b in names if dispatch.refusal(b, device) is None]


def plain_product(z, tf32: bool):
    """cuBLAS."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        return z @ z.mT
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def products(device: str, dtype: torch.dtype) -> dict:
    """By name: maps z (k, m) to its Gram matrix. Raw rows, as the library's product has them."""
    found = {"product": partial(plain_product, tf32=False)}
    if dtype == torch.float32 and device == "cuda":
        found["product, TF32"] = partial(plain_product, tf32=True)
    for backend in own_backends(device):
        found[backend] = partial(fast_gram, side="samples", normalize=False, backend=backend)
    if "triton" in found and dtype == torch.float32:
        found["triton, TF32"] = partial(found["triton"], precision="high")
    return found


def gram_rows(device: str, quick: bool, budget_s: float) -> list[dict]:
    clock = measure.timer(device)
    rates = measure.machine_rates(device, quick)["product_flops_per_s"]
    rows = []
    for dtype in (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,):
        name = str(dtype).removeprefix("torch.")
        for k in (24, 40) if quick else ORDERS:
            depth = 56 if quick else DEPTH
            inputs = [torch.randn(k, depth, device=device).to(dtype) for _ in range(4)]
            truth = inputs[0].double() @ inputs[0].double().mT
            calls = {}
            for label, function in products(device, dtype).items():
                error = ((function(inputs[0]).double() - truth).abs().max() / truth.max()).item()
                coarse = dtype == torch.bfloat16 or "TF32" in label
                if error > (1e-2 if coarse else 1e-5):
                    raise RuntimeError(f"{label}, {k}×{depth} {name}: wrong by {error:.1e}")
                calls[label] = [partial(function, z) for z in inputs]
            for label, samples in measure.interleave(calls, clock, budget_s).items():
                median = statistics.median(samples)
                share = k * (k + 1) * depth / median / rates[name]
                row = {"k": k, "m": depth, "dtype": name, "implementation": label}
                rows.append(row | {"median_s": median, "of_product_rate": share})
    return rows


class Encoder(nn.Module):
    """Blocks of a ViT on ready tokens (batch, tokens, width)."""

    def __init__(self, blocks: int, width: int, heads: int):
        super().__init__()
        options = {"activation": "gelu", "batch_first": True, "norm_first": True, "dropout": 0.0}
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, **options)
        self.blocks = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)

    def forward(self, tokens):
        return self.blocks(tokens)


def step_rows(device: str, quick: bool, budget_s: float) -> list[dict]:
    clock = measure.timer(device)
    batch, tokens, width = (6, 3, 16) if quick else (1024, 50, 768)
    encoder = Encoder(*((1, 16, 2) if quick else (12, 768, 12))).to(device)
    inputs = [torch.randn(batch, tokens, width, device=device) for _ in range(2)]

    def step(regulariser, x):
        with torch.autocast(device, dtype=torch.bfloat16):
            y = encoder(x)
        loss = y[:, 1:].float().square().mean()
        if regulariser is not None:
            loss = loss + regulariser(y[:, 0])
        loss.backward()
        encoder.zero_grad(set_to_none=True)

    regularisers = {"none": None}
    for kind in ("tcr", "uniformity", "renyi"):
        for backend in own_backends(device):
            module = MatrixEntropyRegularizer(kind, backend=backend)
            regularisers[f"{kind}, {backend}"] = module
    calls = {k: [partial(step, r, x) for x in inputs] for k, r in regularisers.items()}
    for some in calls.values():
        some[0]()  # compiles
    samples = measure.interleave(calls, clock, budget_s)
    medians = {name: statistics.median(s) for name, s in samples.items()}
    return [
        {"regulariser": name, "batch": batch, "median_s": t, "share": 1 - medians["none"] / t}
        for name, t in medians.items()
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.symmetric", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: PyTorch sees no GPU, nothing is measured", file=sys.stderr)
        return 2
    if device == "cpu" and not options.quick:
        parser.error("--device cpu needs --quick: what is asked here is about a GPU")
    if options.quick and options.out == RESULTS:
        parser.error("--quick needs --out: its numbers are no results")
    env = measure.environment(device)
    budget = 0.02 if options.quick else 1.0
    result = {"environment": env, "gram": gram_rows(device, options.quick, budget)}
    result["step"] = step_rows(device, options.quick, 8 * budget)
    for row in result["gram"]:
        print(
            f"{row['k']:5}×{row['m']} {row['dtype']:9} {row['implementation']:14}"
            f"{row['median_s'] * 1e6:9.1f} µs {row['of_product_rate']:6.0%} of the product's rate"
        )
    for row in result["step"]:
        print(f"{row['regulariser']:18}{row['median_s'] * 1e3:8.2f} ms a step {row['share']:7.2%}")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{measure.device_slug(env)}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
