"""The files of a run beside its checkpoints: ``config.json`` and ``metrics.jsonl``."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import uuid
from pathlib import Path
from typing import Any

from mmae_fast.training.config import PretrainConfig, UserError, from_dict, to_dict
from mmae_fast.training.manifest import replace_file

# Not part of what a run is: where and on what it runs, how its work is cut, what is kept and shown.
PLACE = (
    "out",
    "resume",
    "device",
    "accumulate",
    "compile",
    "shard",
    "keep",
    "reconstruct_every",
    "tensorboard",
    "wandb",
    "profile",
)


def versions() -> dict[str, Any]:
    """What a result may depend on besides the configuration."""
    import torch  # here: what a run was can be read without

    packages = ("mmae_fast", "torch", "torchvision", "timm", "numpy")
    found = {name: _package_version(name) for name in packages}
    return found | {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def create_run(config: PretrainConfig, data: dict[str, Any]) -> None:
    """Start a run folder: configuration, description of the data, versions.

    Raises: UserError: the folder holds a run already.
    """
    path = config.out / "config.json"
    if path.exists():
        raise UserError(
            f"{config.out} already holds a run; continue it with --resume, or choose another --out"
        )
    config.out.mkdir(parents=True, exist_ok=True)
    content = {"config": to_dict(config), "data": data, "versions": versions()}
    replace_file(path, json.dumps(content | {"id": uuid.uuid4().hex}, indent=2) + "\n")


def read_run(run: Path) -> dict[str, Any]:
    """Content of ``config.json``. Raises: UserError: none there, or damaged."""
    path = run / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no run in {run}: {path} is missing") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def read_config(run: Path) -> PretrainConfig:
    """Configuration saved with a run."""
    return from_dict(PretrainConfig, read_run(run)["config"])


def check_same_run(config: PretrainConfig, data: dict[str, Any]) -> None:
    """Raise UserError, naming the fields, where a resumed run would not be the same run."""
    saved = read_run(config.out)
    before, now = flatten(saved["config"]), flatten(to_dict(config))
    changed = [key for key in now if before.get(key) != now[key] and key not in PLACE]
    changed += [
        f"data ({key})" for key in ("images", "mean", "std") if saved["data"][key] != data[key]
    ]
    if changed:
        raise UserError(
            f"the run in {config.out} cannot be resumed with other settings: {', '.join(changed)}"
        )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= (
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


class MetricsFile:
    """``metrics.jsonl``, one line per logged step, flushed at once.

    Lines after ``start`` are dropped: a killed run may have logged past its last checkpoint.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        kept = [record for record in read_metrics(path) if record["step"] <= start]
        replace_file(path, "".join(json.dumps(record) + "\n" for record in kept if start))

    def write(self, record: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a ``metrics.jsonl``, without a last line cut short by a kill."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
