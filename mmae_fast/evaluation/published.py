"""Models to evaluate: this program's checkpoints, and the published ``.pth`` files.

MAE, U-MAE and M-MAE publish PyTorch pickles. They are read as data: a file that asks for code to be
run is refused.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from mmae_fast.evaluation.config import PublishedConfig
from mmae_fast.training.checkpoint import find_weights, load_model
from mmae_fast.training.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    PretrainConfig,
    UserError,
    to_dict,
)
from mmae_fast.training.models import MaskedAutoencoder, TwoBranch, VisionTransformer

SUFFIXES = (".pth", ".pt")
# Width of a ViT -> attention heads: T, S, B, L, H. The weights do not tell.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
DECODER_HEADS = {512: 16}

Model = MaskedAutoencoder | TwoBranch | VisionTransformer


def open_model(
    path: Path, device: torch.device, published: PublishedConfig | None = None
) -> tuple[Model, dict[str, Any]]:
    """Model in evaluation mode and its ``meta``, as ``checkpoint.load_model``; a ``.pth`` too.

    ``meta`` of a published file has ``step`` None and says by ``norm_pix_known`` whether what its
    pixels are is known. A file without decoder gives a ``VisionTransformer``.

    Raises: UserError: nothing there, damaged, unsafe, or not such a model, with the path.
    """
    if path.suffix not in SUFFIXES or path.is_dir():
        weights = find_weights(path)
        if "classifier" in read_meta(weights):
            raise UserError(
                f"{weights} holds a fine-tuned classifier, no pretrained encoder; "
                "mmae export says how timm loads it"
            )
        return load_model(path, device)
    state, args = read_pickle(path)
    try:
        model, meta = _build(state, args, published or PublishedConfig())
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is no masked autoencoder of the published form: {error}") from None
    meta["data"]["train"] = str(path)
    return model.to(device).eval(), meta


def read_meta(weights: Path) -> dict[str, Any]:
    """What this program wrote into a safetensors file beside the weights; empty if nothing."""
    try:
        with safe_open(weights, "pt") as file:
            return json.loads((file.metadata() or {}).get("mmae_fast", "{}"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights} cannot be read: {error}") from error


def read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and training arguments of a ``.pth``, without running code from it.

    Raises: UserError: missing or damaged file, other content, a pickle that asks for code.
    """
    try:
        # The arguments of the published programs; a namespace holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        asked = re.search(r"GLOBAL (\S+)|function (\S+)", str(error))
        if isinstance(error, UnpicklingError) and asked:
            raise UserError(
                f"{path} holds more than tensors and settings ({asked[1] or asked[2]}). Loading it "
                "could run code, so it was not loaded"
            ) from None
        raise UserError(f"{path} cannot be read as a PyTorch file; is it damaged?") from error
    args = loaded.get("args") if isinstance(loaded, dict) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict, neither under 'model' nor at the top")
    state = {name.removeprefix("module."): value.float() for name, value in state.items()}
    return state, args if isinstance(args, dict) else {}


def _build(
    state: dict[str, Tensor], args: dict[str, Any], published: PublishedConfig
) -> tuple[Model, dict[str, Any]]:
    if "norm.weight" not in state and "fc_norm.weight" in state:
        raise ValueError("it was fine-tuned, its final norm is gone")
    width, patches = state["cls_token"].shape[-1], state["pos_embed"].shape[1] - 1
    channels, patch_size = state["patch_embed.proj.weight"].shape[1:3]
    grid = math.isqrt(patches)
    if grid**2 != patches or channels != len(IMAGENET_DEFAULT_MEAN):
        raise ValueError(f"{patches} patches of {channels} channels are no square RGB image")
    encoder = {
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": _depth(state, "blocks"),
        "num_heads": published.num_heads or _heads(HEADS, width, "num-heads"),
    }
    img_size, has_decoder = grid * patch_size, "decoder_pred.weight" in state
    norm_pix = args.get("norm_pix_loss") if published.norm_pix is None else published.norm_pix
    if has_decoder:
        decoder = state["decoder_embed.weight"].shape[0]
        sizes = ModelConfig(
            **encoder,
            decoder_embed_dim=decoder,
            decoder_depth=_depth(state, "decoder_blocks"),
            decoder_num_heads=published.decoder_num_heads
            or _heads(DECODER_HEADS, decoder, "decoder-num-heads"),
            mask_ratio=args.get("mask_ratio", 0.75),
            norm_pix_loss=bool(norm_pix),
        )
        model = MaskedAutoencoder(img_size, in_chans=channels, **vars(sizes))
    else:
        sizes = ModelConfig(**encoder)
        model = VisionTransformer(img_size, in_chans=channels, **encoder)
    model.load_published(state)
    config = PretrainConfig(DataConfig(img_size=img_size), sizes, loss=LossConfig("mae"))
    data = {
        "img_size": [img_size, img_size],
        "in_chans": channels,
        "mean": list(IMAGENET_DEFAULT_MEAN),
        "std": list(IMAGENET_DEFAULT_STD),
    }
    meta = {"config": to_dict(config), "data": data, "step": None, "published": True}
    return model, meta | {"norm_pix_known": norm_pix is not None}


def _depth(state: dict[str, Tensor], blocks: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{blocks}.")})


def _heads(known: dict[int, int], width: int, option: str) -> int:
    if width not in known:
        raise ValueError(f"the heads of a width of {width} are not known; --published.{option}")
    return known[width]


def check_norm_pix(meta: dict[str, Any], path: Path) -> None:
    """Raise UserError where it is not known whether a model predicts normalised pixels."""
    if not meta.get("norm_pix_known", True):
        raise UserError(
            f"{path} does not say whether it predicts normalised pixels; --published.norm-pix does"
        )
