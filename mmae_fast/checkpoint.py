"""Checkpoints: safetensors for the weights, a torch file for the state of training.

A checkpoint is a folder ``checkpoints/step-000480`` with ``model.safetensors`` and ``state.pt``.
It is written under another name, flushed to disk and renamed, so that weights and state always
belong together and a killed process leaves the previous checkpoint whole.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmae_fast.config import PretrainConfig, UserError, from_dict
from mmae_fast.models import MaskedAutoencoder, TwoBranch, build_model

WEIGHTS, STATE = "model.safetensors", "state.pt"


def save_checkpoint(
    run: Path, step: int, model: nn.Module, state: dict[str, Any], meta: dict[str, Any]
) -> Path:
    """Write the checkpoint of a step and remove the older ones.

    Args:
        state: what training needs to go on; tensors and plain values only.
        meta: what the weights need to be used alone: see ``load_model``.
    """
    folder = run / "checkpoints" / f"step-{step:06d}"
    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, partial / WEIGHTS, metadata={"mmae_fast": json.dumps(meta)})
    torch.save(state, partial / STATE)
    for path in (partial / WEIGHTS, partial / STATE, partial):
        _flush(path)
    partial.rename(folder)
    _flush(folder.parent)
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def pick_device(name: str) -> torch.device:
    """Device of a name; ``auto`` is cuda where there is one. Raises: UserError: unusable name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {error}") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def latest_checkpoint(run: Path) -> Path | None:
    """Checkpoint folder of the highest step of a run."""
    folders = sorted((run / "checkpoints").glob("step-*[0-9]"))
    return folders[-1] if folders else None


def load_state(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Load the weights of a checkpoint into the model and return the state of training."""
    model.load_state_dict(_read_weights(folder / WEIGHTS)[0])
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
        raise UserError(f"{folder / STATE} cannot be read; is it damaged?") from error


def load_model(
    path: Path, device: torch.device
) -> tuple[MaskedAutoencoder | TwoBranch, dict[str, Any]]:
    """Model in evaluation mode and its ``meta``, from a run, a checkpoint or a weights file.

    ``meta`` holds ``config`` (of the pretraining), ``data`` (image size, channels, mean and
    standard deviation) and ``step``. Raises: UserError: nothing there, or damaged, with the path.
    """
    weights = find_weights(path)
    tensors, meta = _read_weights(weights)
    if meta is None:
        raise UserError(f"{weights} was not written by mmae: it does not say what model it holds")
    config = from_dict(PretrainConfig, meta["config"])
    model = build_model(config, tuple(meta["data"]["img_size"]), meta["data"]["in_chans"])
    model.load_state_dict(tensors)
    return model.to(device).eval(), meta


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("mmae_fast", "null"))
        return load_file(path), meta
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def find_weights(path: Path) -> Path:
    """Weights file of a run folder, a checkpoint folder or itself."""
    if not path.exists():
        raise UserError(f"no checkpoint at {path}")
    if path.is_file():
        return path
    if (path / WEIGHTS).exists():
        return path / WEIGHTS
    latest = latest_checkpoint(path)
    if latest is None:
        raise UserError(f"no checkpoint in {path}: neither {WEIGHTS} nor checkpoints/step-*")
    return latest / WEIGHTS
