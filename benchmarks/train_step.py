"""``python -m benchmarks.train_step``: one training step of M-MAE, here and as it was published.

    python -m benchmarks.train_step                  ViT-Tiny/4, 32 pixels, batch 256, fp32, CPU
    python -m benchmarks.train_step --device cuda    ViT-B/16, 224 pixels, batch 128; fp16 and bf16

The baseline is written from the description of the published program: attention that materialises
its weights; AdamW as ``torch.optim.AdamW`` is by default; fp16 autocast with a gradient scaler on a
GPU; the regulariser as ``logdet`` of an identity that is made on the host at every step plus the
Gram matrix, in the precision of autocast; an online linear head on detached features; four losses
read at every step and one synchronisation. Both steps get the same images, draw their own masks and
leave out loading and augmentation. Their losses are compared before anything is timed; rounds
alternate. On a GPU peak memory is that of each step alone. Writes ``results/training/*.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmae_fast.training.config import LossConfig, ModelConfig, PretrainConfig
from mmae_fast.training.launch import World, synchronise
from mmae_fast.training.models import MaskedAutoencoder
from mmae_fast.training.objective import build_objective
from mmae_fast.training.recipes import VIT_TINY
from mmae_fast.training.step import TrainingStep

from . import measure

OUT = Path(__file__).parent / "results" / "training"
LR, WEIGHT, MU = 1e-4, 0.01, 1.0


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained: sizes, images per step, and our precision."""

    name: str
    model: ModelConfig
    img_size: int
    batch: int
    classes: int
    precision: str


CASES = {
    "cpu": Case("ViT-Tiny/4, 32 pixels, batch 256", VIT_TINY, 32, 256, 10, "fp32"),
    "cuda": Case("ViT-B/16, 224 pixels, batch 128", ModelConfig(), 224, 128, 1000, "bf16"),
}
QUICK = Case(
    "quick", ModelConfig(4, 16, 2, 2, 8, 1, 2), img_size=8, batch=8, classes=3, precision="fp32"
)

Step = Callable[[Tensor, Tensor], dict[str, float]]


def make_model(case: Case, device: torch.device) -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = dataclasses.replace(case.model, double_norm=True)
    return MaskedAutoencoder(case.img_size, **vars(model)).to(device)


class Published:
    """The step as the published program takes it."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.model, self.device = make_model(case, device), device
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        self.head = nn.Linear(case.model.embed_dim, case.classes).to(device)
        params = [*self.model.parameters(), *self.head.parameters()]
        groups = [
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
            {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.05},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            out = self.model(images)
            z = F.normalize(out.features, dim=-1)
            d = z.shape[-1]
            gram = torch.eye(d).to(self.device) + MU / d * (z.T @ z)
            regularizer = -WEIGHT * torch.logdet(gram)
            classified = F.cross_entropy(self.head(out.features.detach()), labels)
            loss = out.loss + regularizer + classified
        read = (loss.item(), out.loss.item(), regularizer.item(), classified.item())
        if not math.isfinite(read[0]):
            raise SystemExit(f"the loss of the baseline is {read[0]}")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        synchronise(self.device)
        return {"recon_loss": read[1], "regularizer": read[2]}


class Ours:
    """The step that ``mmae pretrain`` takes."""

    def __init__(self, case: Case, device: torch.device, compile: bool = False) -> None:
        config = PretrainConfig(
            model=case.model,
            loss=LossConfig("m_mae", weight=WEIGHT, mu=MU),
            precision=case.precision,
            compile=compile,
        )
        world, model = World(device), make_model(case, device)
        self.patches = model.patch_embed.num_patches
        self.update = TrainingStep(model, build_objective(config.loss, world), config, world)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        self.update((images, torch.rand(len(images), self.patches, device=images.device)), LR)
        return {}

    def read(self) -> dict[str, float]:
        return self.update.read()


def compare(published: Published, ours: Ours, images: Tensor, labels: Tensor) -> None:
    """Raise SystemExit if the first step's losses differ by more than their precisions allow."""
    torch.manual_seed(1)
    theirs = published(images, labels)
    torch.manual_seed(1)
    ours(images, labels)
    limit = 1e-4 if ours.update.config.precision == "fp32" else 2e-2
    for name, value in theirs.items():
        if abs(ours.read()[name] - value) > limit * abs(value):
            raise SystemExit(f"{name}: {value} published, {ours.read()[name]} here: not comparable")


def peak_memory(make: Callable[[], Step], images: Tensor, labels: Tensor) -> float | None:
    """GiB at most allocated by a step alone, its weights included; none on a CPU."""
    if images.device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = make()
    for _ in range(3):
        step(images, labels)
    synchronise(images.device)
    return torch.cuda.max_memory_allocated() / 2**30


def run(case: Case, device: torch.device, rounds: int, steps: int, compile: bool) -> dict:
    rng = torch.Generator().manual_seed(0)
    shape = (case.batch, 3, case.img_size, case.img_size)
    images = torch.randn(shape, generator=rng).to(device)
    labels = torch.randint(case.classes, (case.batch,), generator=rng).to(device)
    makers: dict[str, Callable[[], Step]] = {
        "published": lambda: Published(case, device),
        "here": lambda: Ours(case, device),
    }
    if compile:
        makers["here, compiled"] = lambda: Ours(case, device, compile=True)
    memory = {name: peak_memory(make, images, labels) for name, make in makers.items()}
    made = {name: make() for name, make in makers.items()}
    compare(made["published"], made["here"], images, labels)
    for step in made.values():
        step(images, labels)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds):
        names = list(made)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            synchronise(device)
            began = time.perf_counter()
            for _ in range(steps):
                made[name](images, labels)
            synchronise(device)
            seconds[name].append((time.perf_counter() - began) / steps)
    return {
        "case": case.name,
        "precision": {"published": "fp16" if device.type == "cuda" else "fp32"}
        | {name: case.precision for name in makers if name != "published"},
        "steps": {
            name: {
                "seconds": statistics.median(times),
                "samples": times,
                "images_per_second": case.batch / statistics.median(times),
                "speed_up": statistics.median(
                    a / b for a, b in zip(seconds["published"], times, strict=True)
                ),
                "peak_gib": memory[name],
            }
            for name, times in seconds.items()
        },
        "environment": measure.environment(device.type),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=CASES, default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="per round; default: 1 on a CPU, 10 on a GPU")
    parser.add_argument("--compile", action="store_true", help="ours compiled as well")
    parser.add_argument("--quick", action="store_true", help="tiny; does it run? needs --out")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    if options.quick and options.out == OUT:
        parser.error("--quick needs an --out of its own: its numbers mean nothing")
    device = torch.device(options.device)
    case = QUICK if options.quick else CASES[options.device]
    steps = options.steps or (10 if device.type == "cuda" else 1)
    result = run(case, device, options.rounds, steps, options.compile)
    for name, row in result["steps"].items():
        memory = f", {row['peak_gib']:.2f} GiB" if row["peak_gib"] else ""
        print(
            f"{case.name}, {name}: {row['images_per_second']:,.0f} images/s, "
            f"{row['speed_up']:.2f}x{memory}"
        )
    for folder in filter(None, (options.out, os.environ.get("OUT"))):
        path = Path(folder) / f"train-step-{options.device}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
