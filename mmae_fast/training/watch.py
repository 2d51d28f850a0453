"""What a training shows of itself: held-out features, reconstructions, where the time goes."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mmae_fast import fast_matrix_entropy
from mmae_fast.measures import shared_information
from mmae_fast.training.augment import VIEWS, generator, normalise, two_views
from mmae_fast.training.config import METHODS, PretrainConfig
from mmae_fast.training.launch import synchronise
from mmae_fast.training.models import MaskedAutoencoder, TwoBranch
from mmae_fast.training.reconstruct import reconstructions, save_reconstructions

HELD_OUT = 512  # test images whose features the entropy curves describe
MONITORED = 256  # test images whose two views the information curves describe
PICTURED = 10  # test images that are reconstructed
AT_A_TIME = 128  # images: to look on should not take more memory than to train


class Watch:
    """Measurements on fixed held-out images. All processes take part where weights are sharded.

    Args:
        images: uint8 ``(N, C, H, W)``; the first ``HELD_OUT`` are used.
        mean, std: of each channel, on the device of the model.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, mean: Tensor, std: Tensor, config: PretrainConfig
    ) -> None:
        self.model, self.mean, self.std, self.config = model, mean, std, config
        images = images[:HELD_OUT].to(mean.device)
        self.pictured = images[:PICTURED]
        rng = generator(mean.device, config.seed, VIEWS)
        self.views = two_views(images[:MONITORED], mean, std, rng, config)
        self.held_out = images
        self._seconds: list[float] = []

    def features(self) -> dict[str, float]:
        with self._eagerly():
            images = normalise(self.held_out, self.mean, self.std)
            return feature_metrics(self.model, images)

    def information(self) -> dict[str, float]:
        began = time.perf_counter()
        with self._eagerly():
            metrics = view_metrics(self.model, self.views)
        self._seconds.append(time.perf_counter() - began)
        return metrics

    def _eagerly(self) -> AbstractContextManager[None]:
        """Other shapes than those of training are not worth compiling for."""
        return torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()

    def information_share(self, step_seconds: float) -> float:
        """Part of the training time that ``information`` costs."""
        spent = statistics.median(self._seconds) / self.config.monitor_every
        return spent / (spent + step_seconds)

    def reconstruct(self, path: Path, step: int, write: bool) -> None:
        """A picture of test images, masked and restored; all processes compute, one writes."""
        with self._eagerly():
            original, masked, restored = reconstructions(
                self.model, self.pictured, self.mean, self.std
            )
        if write:
            rows = {f"reconstructed\n(step {step:,})": restored}
            save_reconstructions(path, original, masked, rows, self.config.model.mask_ratio)


@torch.no_grad()
def feature_metrics(model: MaskedAutoencoder | TwoBranch, images: Tensor) -> dict[str, float]:
    """Matrix entropy H_1 (nats) and effective rank of the encoder's features of whole images.

    Of ``ρ = ẐᵀẐ / n``, Ẑ the features (class tokens) scaled to unit norm and not centred: the
    matrix that the regulariser sees, here without masks.
    """
    model.eval()
    entropy = fast_matrix_entropy(_features(model, images)).item()
    model.train()
    return {"matrix_entropy": entropy, "effective_rank": math.exp(entropy)}


@torch.no_grad()
def view_metrics(
    model: MaskedAutoencoder | TwoBranch, views: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Entropies and mutual information of two fixed views of held-out images, see ``measures``.

    ``backbone_…`` are of the encoder's features, ``projector_…`` of the projections, where there
    is a projector. In evaluation mode: BatchNorm with its running statistics.
    """
    model.eval()
    features = {"backbone": [_features(model, view) for view in views]}
    if isinstance(model, TwoBranch):
        features["projector"] = [model.projector(h) for h in features["backbone"]]
    model.train()
    return {
        f"{part}_{name}": value
        for part, (z1, z2) in features.items()
        for name, value in shared_information(z1, z2).items()
    }


def _features(model: MaskedAutoencoder | TwoBranch, images: Tensor) -> Tensor:
    return torch.cat([model.forward_features(part) for part in images.split(AT_A_TIME)])


def progress_note(record: dict[str, float]) -> str:
    """The gist of a line of metrics.jsonl, beside the bar."""
    note = (
        f"loss {record['loss']:.3f}, effective rank {record['effective_rank']:.1f}, "
        f"{record['images_per_second']:,.0f} img/s, waited for data {record['data_wait_share']:.1%}"
    )
    if record["skipped_steps"]:
        note += f", {record['skipped_steps']} steps skipped"
    if "monitor_share" in record:
        part = "projector" if "projector_entropy_1" in record else "backbone"
        mutual = record[f"{part}_mutual_information_1"]
        note += f", mutual information {mutual:.2f}, monitoring {record['monitor_share']:.2%}"
    return note


def epoch_note(epoch: float, config: PretrainConfig, epoch_data_wait_share: float) -> str:
    """A line at the end of an epoch, or of what there is of it after a resumption."""
    name = METHODS[config.loss.method][1]
    return (
        f"{name}, epoch {epoch:.4g} of {config.epochs:g}: waited for data "
        f"{epoch_data_wait_share:.1%} of the time"
    )


class Phases:
    """Time of the parts of a step; idle, and free, outside of ``trace``."""

    FIRST, COUNT = 5, 10  # the steps that are traced, counted from the first of this start

    def __init__(self, device: torch.device) -> None:
        self.device, self._tracing = device, False
        self._spans: dict[str, list[Callable[[], float]]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if not self._tracing:
            yield
            return
        with torch.profiler.record_function(name):
            began = self._now()
            yield
            ended = self._now()
        self._spans[name].append(lambda: self._seconds(began, ended))

    def trace(self, path: Path, steps: int) -> Iterator[None]:
        """Generator to be advanced before each of ``steps``: traces some, then writes and tells."""
        needed = self.FIRST + self.COUNT + 1
        if steps < needed:
            print(f"--profile needs {needed} steps, this run has {steps}", file=sys.stderr)
            yield from itertools.repeat(None)
        for _ in range(self.FIRST):
            yield
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._tracing = True
        with torch.profiler.profile(activities=activities) as profiler:
            began = self._now()
            for _ in range(self.COUNT):
                yield
            ended = self._now()
            synchronise(self.device)
        self._tracing = False
        profiler.export_chrome_trace(str(path))
        Console().print(self.table(self._seconds(began, ended), path))
        yield from itertools.repeat(None)

    def table(self, whole: float, path: Path) -> Table:
        """Milliseconds and share of each part; ``whole`` seconds for all traced steps."""
        place = "device" if self.device.type == "cuda" else "host"
        table = Table(title=f"A step, {place} time, mean of {self.COUNT}; trace: {path}")
        for heading in ("part", "ms", "share"):
            table.add_column(heading, justify="left" if heading == "part" else "right")
        parts = {name: sum(span() for span in spans) for name, spans in self._spans.items()}
        parts["rest"] = whole - sum(parts.values())
        for name, seconds in (*parts.items(), ("whole", whole)):
            table.add_row(name, f"{1000 * seconds / self.COUNT:.2f}", f"{seconds / whole:.1%}")
        return table

    def _now(self) -> torch.cuda.Event | float:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, began: torch.cuda.Event | float, ended: torch.cuda.Event | float) -> float:
        if self.device.type != "cuda":
            return ended - began
        return began.elapsed_time(ended) / 1000
