"""Weights under the names of timm and of Hugging Face's ViTMAE.

Both get a folder with ``model.safetensors`` and ``config.json``. Names and layout of the latter:
timm's and transformers' documentation of their model hubs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmae_fast.evaluation.config import ExportConfig
from mmae_fast.evaluation.published import SUFFIXES, Model, check_norm_pix, open_model, read_meta
from mmae_fast.training.checkpoint import find_weights
from mmae_fast.training.config import UserError
from mmae_fast.training.models import MaskedAutoencoder, TwoBranch, VisionTransformer

# Width, depth, heads, patch -> timm's model; any other is its base model with arguments.
TIMM_MODELS = {
    (192, 12, 3, 16): "vit_tiny_patch16_224",
    (384, 12, 6, 16): "vit_small_patch16_224",
    (768, 12, 12, 16): "vit_base_patch16_224.mae",
    (1024, 24, 16, 16): "vit_large_patch16_224.mae",
    (1280, 32, 16, 14): "vit_huge_patch14_224.mae",
}
# Official name -> ViTMAE's, outside the blocks.
HF_NAMES = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
HF_BLOCKS = {"blocks": "vit.encoder.layer", "decoder_blocks": "decoder.decoder_layers"}
HF_PARTS = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
HF_QKV = ("query", "key", "value")


def export(config: ExportConfig) -> str:
    """Write the folder and return the lines of Python that load it.

    Raises: UserError: nothing to export, sizes that the format cannot express, a folder in use.
    """
    if (config.out / "model.safetensors").exists():
        raise UserError(f"{config.out} already holds a model; choose another folder")
    files: dict[str, dict[str, Any]] = {}
    classifier = find_classifier(config.checkpoint)
    if classifier is not None:
        if config.format == "hf":
            raise UserError(
                f"{config.checkpoint} is a classifier; ViTMAE has no place for its head"
            )
        tensors, meta = classifier
        options = dict(meta["classifier"])
        classes, pool = options.pop("num_classes"), options.pop("global_pool")
    else:
        model, meta = open_model(config.checkpoint, torch.device("cpu"), config.published)
        tensors, options, classes, pool = timm_state(model), encoder_options(model), 0, "token"
    if config.format == "hf":
        model = _decoding(model)
        check_norm_pix(meta, config.checkpoint)
        tensors = hf_state(model)
        files = {"config": hf_config(model), "preprocessor_config": hf_processor(meta)}
        loading = (
            "from transformers import ViTMAEForPreTraining\n"
            f"model = ViTMAEForPreTraining.from_pretrained({str(config.out)!r})"
        )
    else:
        name, given = timm_model(options)
        files = {"config": timm_config(name, given, classes, pool, meta)}
        given = {"num_classes": classes, "global_pool": pool} | given
        given = "".join(f", {key}={value!r}" for key, value in given.items())
        path = str(config.out / "model.safetensors")
        loading = (
            f"import timm\nmodel = timm.create_model({name!r}, checkpoint_path={path!r}{given})"
        )
    config.out.mkdir(parents=True, exist_ok=True)
    source = {"checkpoint": str(config.checkpoint), "step": meta["step"], "data": meta["data"]}
    metadata = {"format": "pt", "mmae_fast_export": json.dumps(source)}
    save_file(tensors, config.out / "model.safetensors", metadata=metadata)
    for file, content in files.items():
        (config.out / f"{file}.json").write_text(json.dumps(content, indent=2) + "\n")
    mean, std = ([round(x, 4) for x in meta["data"][key]] for key in ("mean", "std"))
    return f"{loading}\n# images normalised by mean {mean} and standard deviation {std}"


def _encoder(model: Model) -> VisionTransformer:
    encoder = model.backbone if isinstance(model, TwoBranch) else model
    if not isinstance(encoder, VisionTransformer):
        raise UserError(f"only vision transformers can be exported, got {type(encoder).__name__}")
    return encoder


def _decoding(model: Model) -> MaskedAutoencoder:
    if not isinstance(model, MaskedAutoencoder):
        raise UserError("ViTMAE has a decoder, this checkpoint has none; --format timm has not")
    return model


# --- timm ----------------------------------------------------------------------------------------


def timm_state(model: Model) -> dict[str, Tensor]:
    """Weights of the encoder under timm's names, which are the official ones."""
    state = _encoder(model).state_dict()
    decoder = ("decoder_", "mask_token")
    return {name: v.contiguous() for name, v in state.items() if not name.startswith(decoder)}


def encoder_options(model: Model) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer that describe the encoder."""
    encoder = _encoder(model)
    patches = encoder.patch_embed
    return {
        "img_size": list(patches.img_size),
        "patch_size": patches.patch_size[0],
        "in_chans": patches.proj.in_channels,
        "embed_dim": encoder.num_features,
        "depth": len(encoder.blocks),
        "num_heads": encoder.blocks[0].attn.num_heads,
    }


def timm_model(options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name of timm's model of this size, and the arguments in which the two differ."""
    keys = ("embed_dim", "depth", "num_heads", "patch_size")
    name = TIMM_MODELS.get(tuple(options[key] for key in keys))
    given = {} if name else {key: options[key] for key in keys}
    if options["img_size"] != [224, 224]:
        given["img_size"] = options["img_size"]
    if options["in_chans"] != 3:
        given["in_chans"] = options["in_chans"]
    return name or "vit_base_patch16_224", given


def timm_config(
    name: str, given: dict[str, Any], classes: int, pool: str, meta: dict[str, Any]
) -> dict[str, Any]:
    """``config.json`` of timm's hub: the architecture, and how images are prepared."""
    data = meta["data"]
    return {
        "architecture": name.split(".")[0],
        "num_classes": classes,
        "global_pool": pool,
        "model_args": given,
        "pretrained_cfg": {
            "input_size": [data["in_chans"], *data["img_size"]],
            "fixed_input_size": True,
            "mean": data["mean"],
            "std": data["std"],
            "num_classes": classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def find_classifier(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Weights and ``meta`` of a fine-tuned classifier; none if it is something else."""
    if path.suffix in SUFFIXES and not path.is_dir():
        return None
    weights = find_weights(path)
    meta = read_meta(weights)
    return (load_file(weights), meta) if "classifier" in meta else None


# --- Hugging Face --------------------------------------------------------------------------------


def hf_state(model: MaskedAutoencoder) -> dict[str, Tensor]:
    """All weights under ViTMAE's names; queries, keys and values apart."""
    state = {}
    for name, value in model.state_dict().items():
        names = hf_names(name)
        for new, part in zip(names, value.chunk(len(names)), strict=True):
            state[new] = part.contiguous()
    return state


def hf_names(name: str) -> tuple[str, ...]:
    """ViTMAE's names of a weight: one, or those of query, key and value, in the weight's order."""
    if block := re.fullmatch(r"((?:decoder_)?blocks)\.(\d+)\.(.+)\.(weight|bias)", name):
        kind, index, part, what = block.groups()
        prefix = f"{HF_BLOCKS[kind]}.{index}"
        if part == "attn.qkv":
            return tuple(f"{prefix}.attention.attention.{x}.{what}" for x in HF_QKV)
        return (f"{prefix}.{HF_PARTS[part]}.{what}",)
    stem, dot, what = name.rpartition(".")
    return (f"{HF_NAMES[stem]}.{what}" if dot else HF_NAMES[name],)


def hf_config(model: MaskedAutoencoder) -> dict[str, Any]:
    """``config.json`` of a ``ViTMAEForPreTraining``. Raises: UserError: an oblong image."""
    height, width = model.patch_embed.img_size
    if height != width:
        raise UserError(f"ViTMAE takes square images, the model takes {height}x{width}")
    decoder = model.decoder_blocks[0]
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "image_size": height,
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": model.patch_embed.proj.in_channels,
        "hidden_size": model.num_features,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.blocks[0].attn.num_heads,
        "intermediate_size": model.blocks[0].mlp.fc1.out_features,
        "decoder_hidden_size": model.decoder_embed.out_features,
        "decoder_num_hidden_layers": len(model.decoder_blocks),
        "decoder_num_attention_heads": decoder.attn.num_heads,
        "decoder_intermediate_size": decoder.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": True,
        "layer_norm_eps": model.norm.eps,
        "mask_ratio": model.mask_ratio,
        "norm_pix_loss": model.norm_pix_loss,
    }


def hf_processor(meta: dict[str, Any]) -> dict[str, Any]:
    """``preprocessor_config.json``: how images are prepared."""
    height, width = meta["data"]["img_size"]
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"height": height, "width": width},
        "image_mean": meta["data"]["mean"],
        "image_std": meta["data"]["std"],
    }
