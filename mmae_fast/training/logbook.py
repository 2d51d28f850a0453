"""Where the numbers of a run go: metrics.jsonl, and TensorBoard and Weights & Biases if asked."""

from __future__ import annotations

import importlib.util
from typing import Any

from mmae_fast.training.config import PretrainConfig, UserError, to_dict
from mmae_fast.training.runs import MetricsFile, read_run


def check_packages(config: PretrainConfig) -> None:
    """Raise UserError, with what to install, where a package that was asked for is missing."""
    for name in ("tensorboard", "wandb"):
        if getattr(config, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"--{name} needs a package that is not here: pip install {name}")


class Logbook:
    """Writes a record to all of them.

    Args:
        start: steps done in an earlier part of the run; what was logged after them is dropped.
    """

    def __init__(self, config: PretrainConfig, start: int) -> None:
        self._file = MetricsFile(config.out / "metrics.jsonl", start)
        self._board = self._online = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purged = start + 1 if start else 0  # and what follows
            self._board = SummaryWriter(str(config.out / "tensorboard"), purge_step=purged)
        if config.wandb:
            import wandb

            self._online = wandb.init(
                project="mmae_fast",
                name=config.out.name,
                id=read_run(config.out)["id"],
                resume="allow",
                dir=str(config.out),
                config=to_dict(config),
            )

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(record)
        step = record["step"]
        if self._board:
            for name, value in record.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._online:
            self._online.log(record, step=step)

    def close(self) -> None:
        if self._board:
            self._board.close()
        if self._online:
            self._online.finish()
