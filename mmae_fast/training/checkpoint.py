"""Checkpoints: folders of safetensors files with their checksums.

``checkpoints/step-000480`` holds ``model.safetensors`` (the weights, and what they need to be used
alone), ``training.safetensors`` (optimizer and counters), ``ema.safetensors`` where the weights are
averaged, and ``manifest.json``. It is written under another name, flushed to disk and renamed: a
killed process leaves the previous checkpoint whole. Nothing in it can carry code.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mmae_fast.training.config import PretrainConfig, UserError, from_dict
from mmae_fast.training.launch import World
from mmae_fast.training.launch import (
    pick_device as pick_device,  # for those who load a model onto it
)
from mmae_fast.training.manifest import Damaged, check_manifest, whole_folder
from mmae_fast.training.models import MaskedAutoencoder, TwoBranch, build_model

WEIGHTS = "model.safetensors"

Files = dict[str, dict[str, Tensor]]  # name of a file without its ending -> name -> tensor


# --- Writing -------------------------------------------------------------------------------------


def save_checkpoint(
    run: Path, step: int, files: Files, meta: dict[str, Any], keep: int, world: World
) -> None:
    """Write the checkpoint of a step and remove all but the newest ``keep``.

    To be called by all processes; the main one writes, the others give their shards.

    Args:
        files: what is saved; "model" is there.
        meta: what the weights need to be used alone: see ``load_model``.
    Raises: UserError, in all processes: it cannot be written; no part of it is left.
    """
    whole = {name: _gather(tensors, world) for name, tensors in files.items()}
    error = None
    if world.main:
        try:
            _write(run, step, whole, meta | {"step": step}, keep)
        except (OSError, SafetensorError) as caught:
            error = UserError(
                f"the checkpoint of step {step} cannot be written to {run}: {caught}. The last "
                f"good one is {latest_checkpoint(run)}; --resume continues from it"
            )
    world.agree(error)


def _gather(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    whole = {}
    for name, value in tensors.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if world.main:
            whole[name] = full.detach().cpu().contiguous()
    return whole


def _write(run: Path, step: int, files: Files, meta: dict[str, Any], keep: int) -> None:
    folder = run / "checkpoints" / f"step-{step:06d}"
    if folder.exists() and damage(folder) is None:
        return
    with whole_folder(folder) as partial:
        for name, tensors in files.items():
            save_file(tensors, partial / f"{name}.safetensors", {"mmae_fast": json.dumps(meta)})
    for old in checkpoints(run)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


# --- Finding -------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, the newest first, damaged ones included."""
    folders = (run / "checkpoints").glob("step-*[0-9]")
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")), reverse=True)


def latest_checkpoint(run: Path) -> Path | None:
    """Checkpoint folder of the highest step of a run, whatever its state."""
    return next(iter(checkpoints(run)), None)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or none."""
    try:
        check_manifest(folder)
    except Damaged as error:
        return str(error)
    return None


def intact_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that is as it was written; none if the run has no checkpoints.

    Those passed over are named on stderr. Raises: UserError: all are damaged.
    """
    folders = checkpoints(run)
    for folder in folders:
        problem = damage(folder)
        if problem is None:
            return folder
        print(f"Checkpoint {folder.name} is damaged and not used: {problem}", file=sys.stderr)
    if folders:
        raise UserError(f"no checkpoint in {run} is intact: {problem}")
    return None


# --- Reading -------------------------------------------------------------------------------------


def restore(run: Path, files: Files, world: World) -> int:
    """Load the newest intact checkpoint of a run into the tensors; return its step, 0 for none.

    To be called by all processes; the main one reads, and tells the others.
    """
    loaded, step, error = None, 0, None
    if world.main:
        try:
            loaded, step = _read_checkpoint(run, files)
        except UserError as caught:
            error = caught
    world.agree(error)
    if world.size > 1:
        told = torch.tensor(step)
        dist.broadcast(told, 0)
        step = int(told)
    if step:
        for file, tensors in files.items():
            for name, value in tensors.items():
                _fill(value, loaded[file][name] if world.main else None, world)
    return step


def _read_checkpoint(run: Path, files: Files) -> tuple[Files | None, int]:
    folder = intact_checkpoint(run)
    if folder is None:
        return None, 0
    loaded, meta = {}, None
    for file, tensors in files.items():
        path = folder / f"{file}.safetensors"
        loaded[file], meta = _read(path)
        expected = {name: value.shape for name, value in tensors.items()}
        if {name: value.shape for name, value in loaded[file].items()} != expected:
            raise UserError(f"{path} holds other tensors than this training has")
    return loaded, meta["step"]


@torch.no_grad()
def _fill(into: Tensor, value: Tensor | None, world: World) -> None:
    if isinstance(into, DTensor):
        full = torch.empty(into.shape, dtype=into.dtype) if value is None else value
        full = full.to(world.device)
        into.copy_(distribute_tensor(full, into.device_mesh, into.placements))
        return
    if value is not None:
        into.copy_(value)
    if world.size > 1:
        dist.broadcast(into, 0)


def load_model(
    path: Path, device: torch.device
) -> tuple[MaskedAutoencoder | TwoBranch, dict[str, Any]]:
    """Model in evaluation mode and its ``meta``, from a run, a checkpoint or a weights file.

    ``meta`` holds ``config`` (of the pretraining), ``data`` (image size, channels, mean and
    standard deviation) and ``step``. Raises: UserError: nothing there, or damaged, with the path.
    """
    weights = find_weights(path)
    tensors, meta = _read(weights)
    if meta is None:
        raise UserError(f"{weights} was not written by mmae: it does not say what model it holds")
    config = from_dict(PretrainConfig, meta["config"])
    model = build_model(config, tuple(meta["data"]["img_size"]), meta["data"]["in_chans"])
    model.load_state_dict(tensors)
    return model.to(device).eval(), meta


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("mmae_fast", "null"))
        return load_file(path), meta
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def find_weights(path: Path) -> Path:
    """Weights file of a run folder, a checkpoint folder or itself.

    Of a run it is that of the newest intact checkpoint; a checkpoint named and damaged is refused.
    """
    if not path.exists():
        raise UserError(f"no checkpoint at {path}")
    if path.is_file():
        return path
    if (path / WEIGHTS).exists():
        problem = damage(path)
        if problem is not None:
            raise UserError(
                f"{path} is damaged: {problem}. Its weights may be opened by the name of the file"
            )
        return path / WEIGHTS
    intact = intact_checkpoint(path)
    if intact is None:
        raise UserError(f"no checkpoint in {path}: neither {WEIGHTS} nor checkpoints/step-*")
    return intact / WEIGHTS
