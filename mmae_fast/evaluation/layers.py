"""The layers of a representation: what checkpoints, timm models and files of features give.

A model is run as it is; nothing in it changes but for hooks, which are removed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmae_fast.evaluation.config import AnalyzeConfig
from mmae_fast.evaluation.published import open_model
from mmae_fast.measures import ORDERS, token_entropy
from mmae_fast.training.augment import VIEWS, generator, normalise, two_views
from mmae_fast.training.checkpoint import pick_device
from mmae_fast.training.config import DataConfig, PretrainConfig, UserError, from_dict
from mmae_fast.training.data import decoded_now, load_data
from mmae_fast.training.models import TwoBranch

FEATURE_FILES = (".npy", ".npz", ".pt")
BATCH = 64  # images at a time: the tokens of all layers are held


@dataclass
class Layer:
    """What was seen of one layer. N images, T patch tokens, D features, h heads."""

    name: str
    pools: dict[str, Tensor]  # "cls" (where there is a class token), "mean": (N, D)
    token_entropies: dict[int, Tensor]  # order -> (N,); empty for features without tokens
    heads: Tensor | None = None  # (h, N, D / h): each head's output, class token or mean


@dataclass
class Subject:
    """A model to look at, and the images that it takes."""

    model: nn.Module
    run: Callable[[Tensor], Any]
    mean: Tensor
    std: Tensor
    size: tuple[int, int, int]  # channels, height, width
    resize: bool  # whether other images are made to fit
    value_range: tuple[float, float] | None = None  # of images with more than 8 bits


# --- Sources -------------------------------------------------------------------------------------


def read_features(path: Path, count: int) -> list[Layer]:
    """Features of a file, one layer for each array.

    ``.npy``, ``.npz`` or ``.pt`` (a tensor, or a dictionary of tensors; loaded with
    ``weights_only=True``), of shape ``(n, d)``, or ``(n, tokens, d)``.

    Raises: UserError: missing or damaged file, other shapes or types, NaN or Inf.
    """
    try:
        if path.suffix == ".pt":
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        else:
            loaded = np.load(path, allow_pickle=False)
            loaded = dict(loaded) if path.suffix == ".npz" else loaded
    except FileNotFoundError:
        raise UserError(f"no file of features at {path}") from None
    except Exception as error:  # numpy, zipfile and pickle each have their own
        raise UserError(f"{path} cannot be read as features: {error}") from error
    arrays = loaded if isinstance(loaded, dict) else {path.stem: loaded}
    if not arrays:
        raise UserError(f"{path} holds no arrays")
    return [_feature_layer(f"{name} in {path}", str(name), a, count) for name, a in arrays.items()]


def _feature_layer(where: str, name: str, array: Any, count: int) -> Layer:
    try:
        z = torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where} is no array of numbers but {type(array).__name__}") from error
    if not z.is_floating_point() or z.ndim not in (2, 3) or 0 in z.shape or len(z) < 2:
        raise UserError(
            f"{where} must be floating-point features (n, d) or (n, tokens, d) with n >= 2, got "
            f"{z.dtype} of shape {tuple(z.shape)}"
        )
    z = z[:count].float() if z.dtype != torch.float64 else z[:count]
    if not z.isfinite().all():
        raise UserError(f"{where} holds NaN or Inf")
    if z.ndim == 2:
        return Layer(name, {"mean": z}, {})
    return Layer(name, {"mean": z.mean(dim=1)}, {a: token_entropy(z, a) for a in ORDERS})


def look_at(source: str, config: AnalyzeConfig) -> tuple[list[Layer], tuple[list[Layer], ...]]:
    """Layers of a model on whole images, and on each of two augmented views of them."""
    if config.data is None:
        raise UserError(f"say which images {source} is to be run on: --data")
    device = pick_device(config.device)
    subject = open_checkpoint(source, config, device) or open_timm(source, config, device)
    images = load_images(subject, config).to(device)
    rng = generator(device, config.seed, VIEWS)
    views = two_views(images, subject.mean, subject.std, rng, PretrainConfig())
    whole = normalise(images, subject.mean, subject.std)
    return capture(subject, whole), tuple(capture(subject, view) for view in views)


def open_checkpoint(source: str, config: AnalyzeConfig, device: torch.device) -> Subject | None:
    """Encoder of a run, a checkpoint or a weights file; none if there is nothing of that name."""
    if not Path(source).exists():
        return None
    if config.weights or config.pretrained:
        raise UserError(f"--weights and --pretrained are for timm models; {source} has its own")
    model, meta = open_model(Path(source), device, config.published)
    encoder = model.backbone if isinstance(model, TwoBranch) else model
    mean, std = (torch.tensor(meta["data"][key], device=device) for key in ("mean", "std"))
    size = (meta["data"]["in_chans"], *meta["data"]["img_size"])
    data = from_dict(DataConfig, meta["config"]["data"])
    run = encoder.forward_features
    return Subject(encoder, run, mean, std, size, False, data.value_range)


def open_timm(source: str, config: AnalyzeConfig, device: torch.device) -> Subject:
    """A model of timm, with random, published or local weights."""
    import timm
    from timm.data import resolve_model_data_config

    if not timm.is_model(source):
        raise UserError(
            f"{source!r} is no run, no checkpoint, no file of features and no model of timm"
        )
    try:
        model = timm.create_model(source, pretrained=config.pretrained, num_classes=0)
        if config.weights:
            loaded = timm.models.load_checkpoint(
                model, str(config.weights), strict=False, weights_only=True
            )
            if loaded.missing_keys:
                raise UserError(
                    f"{config.weights} lacks {len(loaded.missing_keys)} of the weights of "
                    f"{source}, e.g. {loaded.missing_keys[0]}"
                )
    except UserError:
        raise
    except Exception as error:  # whatever the hub, the file or the constructor raise
        raise UserError(f"{source} cannot be loaded: {error}") from error
    expected = resolve_model_data_config(model)
    mean, std = (torch.tensor(expected[key], device=device) for key in ("mean", "std"))
    model = model.to(device).eval()
    run = model.forward_features
    return Subject(model, run, mean, std, tuple(expected["input_size"]), resize=True)


def load_images(subject: Subject, config: AnalyzeConfig) -> Tensor:
    """uint8 ``(N, C, H, W)``: evenly spaced ones of the test part, where there is one.

    For models of timm they are resized (bilinear, antialiased), grey ones repeated over channels.
    """
    channels, height, width = subject.size
    images = DataConfig(config.data, None, config.img_size, config.cache)
    if decoded_now(config.data):  # files, which can be made what the model takes
        size = config.img_size or (height, width)
        images = dataclasses.replace(
            images, img_size=size, in_chans=channels, value_range=subject.value_range
        )
    train, test = load_data(images)
    part = test or train
    chosen = torch.linspace(0, len(part) - 1, min(config.count, len(part))).long()
    images = part.images[chosen]
    if len(images) < 2:
        raise UserError(f"{part.origin} has {len(images)} images, at least 2 are needed")
    if subject.resize:
        if images.shape[1] == 1:
            images = images.expand(-1, channels, -1, -1)
        if images.shape[2:] != (height, width):
            resized = F.interpolate(
                images.float(), (height, width), mode="bilinear", antialias=True
            )
            images = resized.round().clamp(0, 255).to(torch.uint8)
    if images.shape[1:] != subject.size:
        raise UserError(
            f"the model takes images of shape {subject.size}, those of {part.origin} have "
            f"{tuple(images.shape[1:])}"
        )
    return images


# --- Layers --------------------------------------------------------------------------------------


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules whose outputs are the layers: transformer blocks and the norm after them, or the
    four stages of a ResNet; empty where neither is found."""
    if hasattr(model, "blocks"):
        found = {f"block {i}": block for i, block in enumerate(model.blocks, 1)}
        norm = getattr(model, "norm", None)
        return found | ({"norm": norm} if isinstance(norm, nn.LayerNorm) else {})
    model = getattr(model, "net", model)
    stages = {f"layer {i}": getattr(model, f"layer{i}", None) for i in range(1, 5)}
    return stages if all(isinstance(stage, nn.Module) for stage in stages.values()) else {}


@torch.no_grad()
def capture(subject: Subject, images: Tensor) -> list[Layer]:
    """Run normalised images ``(N, C, H, W)`` and collect what every layer gives."""
    model, modules = subject.model, find_layers(subject.model)
    seen: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_hook(_keeper(seen, name)))
        attention = getattr(module, "attn", None)
        if isinstance(getattr(attention, "proj", None), nn.Linear):
            keeper = _head_keeper(heads, name, attention.num_heads)
            handles.append(attention.proj.register_forward_pre_hook(keeper))
    parts: dict[str, list[Layer]] = {}
    try:
        for batch in images.split(BATCH):
            seen.clear()
            heads.clear()
            if modules:
                subject.run(batch)
            elif hasattr(model, "forward_intermediates"):
                maps = model.forward_intermediates(batch, intermediates_only=True)
                seen.update({f"stage {i}": m for i, m in enumerate(maps, 1)})
            else:
                raise UserError(
                    f"{type(model).__name__} has neither blocks nor stages that could be analysed"
                )
            for name, output in seen.items():
                layer = _summarise(model, name, output, heads.get(name))
                parts.setdefault(name, []).append(layer)
    finally:
        for handle in handles:
            handle.remove()
    return [_join(name, layers) for name, layers in parts.items()]


def _keeper(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen[name] = output[0] if isinstance(output, tuple) else output

    return keep


def _head_keeper(heads: dict[str, Tensor], name: str, count: int) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: tuple[Tensor]) -> None:
        heads[name] = inputs[0].unflatten(-1, (count, -1))  # (B, T, h, D / h)

    return keep


def _summarise(model: nn.Module, name: str, output: Tensor, heads: Tensor | None) -> Layer:
    """Pools and token entropies of tokens ``(B, T, D)`` or maps ``(B, C, H, W)``."""
    prefix, has_class = 0, False
    if output.ndim == 4:
        output = output.flatten(2).mT
    else:
        prefix = getattr(model, "num_prefix_tokens", 0)
        has_class = prefix > 0 and getattr(model, "cls_token", None) is not None
    tokens = output[:, prefix:].float()
    pools = {"cls": output[:, 0].float()} if has_class else {}
    pools["mean"] = tokens.mean(dim=1)
    if heads is not None and heads.ndim == 4:
        heads = (heads[:, 0] if has_class else heads[:, prefix:].mean(1)).float().transpose(0, 1)
    else:
        heads = None
    return Layer(name, pools, {a: token_entropy(tokens, a) for a in ORDERS}, heads)


def _join(name: str, layers: list[Layer]) -> Layer:
    first = layers[0]
    return Layer(
        name,
        {pool: torch.cat([layer.pools[pool] for layer in layers]) for pool in first.pools},
        {a: torch.cat([layer.token_entropies[a] for layer in layers]) for a in ORDERS},
        None if first.heads is None else torch.cat([layer.heads for layer in layers], dim=1),
    )
