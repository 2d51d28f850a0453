"""Exports: timm gives the same features; ViTMAE's names and arithmetic are as documented."""

import dataclasses
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from mmae_fast.evaluation.config import ExportConfig
from mmae_fast.evaluation.export import export, hf_names, hf_state, timm_model, timm_state
from mmae_fast.training.checkpoint import save_checkpoint
from mmae_fast.training.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    PretrainConfig,
    UserError,
    to_dict,
)
from mmae_fast.training.launch import World
from mmae_fast.training.models import MaskedAutoencoder, build_model

ALONE = World(torch.device("cpu"))
SMALL = ModelConfig(
    patch_size=4,
    embed_dim=32,
    depth=2,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=4,
    mask_ratio=0.5,
)
# Of a ViTMAEForPreTraining with one layer on either side, as transformers lists them.
LAYER = [
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
    "layernorm_before",
    "layernorm_after",
]
VIT_MAE_NAMES = {
    "vit.embeddings.cls_token",
    "vit.embeddings.position_embeddings",
    "vit.embeddings.patch_embeddings.projection.weight",
    "vit.embeddings.patch_embeddings.projection.bias",
    "vit.layernorm.weight",
    "vit.layernorm.bias",
    "decoder.mask_token",
    "decoder.decoder_pos_embed",
    "decoder.decoder_embed.weight",
    "decoder.decoder_embed.bias",
    "decoder.decoder_norm.weight",
    "decoder.decoder_norm.bias",
    "decoder.decoder_pred.weight",
    "decoder.decoder_pred.bias",
} | {
    f"{side}.0.{part}.{what}"
    for side in ("vit.encoder.layer", "decoder.decoder_layers")
    for part in LAYER
    for what in ("weight", "bias")
}


def checkpoint(folder, config=None, img_size=(16, 16), in_chans=3, noise=0.1):
    """A checkpoint of random weights, with noise none at their initial zeros and ones."""
    config = config or PretrainConfig(model=SMALL, data=DataConfig(img_size=img_size[0]))
    torch.manual_seed(0)
    model = build_model(config, img_size, in_chans)
    with torch.no_grad():
        for parameter in model.parameters() if noise else ():
            parameter.add_(noise * torch.randn_like(parameter))
    data = {"img_size": list(img_size), "in_chans": in_chans}
    data |= {"mean": [0.4] * in_chans, "std": [0.2] * in_chans}
    meta = {"config": to_dict(config), "data": data, "step": 7}
    save_checkpoint(folder, 7, {"model": model.state_dict()}, meta, 1, ALONE)
    return model.eval()


def run_lines(text):
    """What the printed lines define."""
    names = {}
    exec(text, names)
    return names


@pytest.mark.parametrize(
    "img_size, in_chans, changes",
    [((16, 16), 3, {}), ((8, 24), 5, {}), ((32, 32), 3, dict(embed_dim=192, num_heads=3))],
)
def test_timm_gives_the_same_features(tmp_path, img_size, in_chans, changes):
    config = PretrainConfig(model=dataclasses.replace(SMALL, **changes))
    model = checkpoint(tmp_path / "run", config, img_size, in_chans)
    lines = export(ExportConfig(tmp_path / "run", tmp_path / "out"))
    loaded = run_lines(lines)["model"].eval()
    images = torch.randn(3, in_chans, *img_size)
    with torch.no_grad():
        expected = model.forward_features(images)
        torch.testing.assert_close(loaded(images), expected, rtol=1e-5, atol=1e-5)
        means = loaded.forward_features(images)[:, 1:].mean(1)
        expected = model.forward_features(images, "mean")
        torch.testing.assert_close(means, expected, rtol=1e-5, atol=1e-5)


def test_timm_loads_the_folder_as_from_its_hub(tmp_path):
    from timm.models._factory import parse_model_name

    if parse_model_name("local-dir:/x")[0] != "local-dir":
        pytest.skip("this timm has no local-dir: models")
    model = checkpoint(tmp_path / "run")
    export(ExportConfig(tmp_path / "run", tmp_path / "out"))
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(images), model.forward_features(images), rtol=1e-5, atol=1e-5
        )
    assert loaded.pretrained_cfg["mean"] == [0.4] * 3


def test_vit_base_is_the_mae_model_of_timm(tmp_path):
    """The published size under its name in timm, without further arguments."""
    sizes = ModelConfig(decoder_embed_dim=16, decoder_depth=1)
    model = checkpoint(tmp_path / "run", PretrainConfig(model=sizes), (224, 224), noise=0)
    export(ExportConfig(tmp_path / "run", tmp_path / "out"))
    path = str(tmp_path / "out" / "model.safetensors")
    loaded = timm.create_model("vit_base_patch16_224.mae", checkpoint_path=path).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = model.forward_features(images)
        torch.testing.assert_close(loaded(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "width, depth, heads, patch, name",
    [
        (192, 12, 3, 16, "vit_tiny_patch16_224"),
        (1024, 24, 16, 16, "vit_large_patch16_224.mae"),
        (1280, 32, 16, 14, "vit_huge_patch14_224.mae"),
    ],
)
def test_names_in_timm(width, depth, heads, patch, name):
    options = {"embed_dim": width, "depth": depth, "num_heads": heads, "patch_size": patch}
    options |= {"img_size": [224, 224], "in_chans": 3}
    assert timm_model(options) == (name, {})
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    assert (model.embed_dim, len(model.blocks)) == (width, depth)
    assert model.blocks[0].attn.num_heads == heads
    assert model.patch_embed.patch_size == (patch, patch)


def test_two_branch_encoder(tmp_path):
    config = PretrainConfig(model=SMALL, loss=LossConfig(method="barlow_twins"))
    model = checkpoint(tmp_path / "run", config)
    loaded = run_lines(export(ExportConfig(tmp_path / "run", tmp_path / "out")))["model"].eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model.forward_features(images)
        torch.testing.assert_close(loaded(images), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="this checkpoint has none"):
        export(ExportConfig(tmp_path / "run", tmp_path / "hf", "hf"))


def test_metadata_say_where_the_weights_come_from(tmp_path):
    checkpoint(tmp_path / "run")
    export(ExportConfig(tmp_path / "run", tmp_path / "out"))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        source = json.loads(file.metadata()["mmae_fast_export"])
    assert source["step"] == 7 and source["data"]["mean"] == [0.4] * 3
    with pytest.raises(UserError, match="already holds a model"):
        export(ExportConfig(tmp_path / "run", tmp_path / "out"))


# --- Hugging Face --------------------------------------------------------------------------------


def test_names_of_vit_mae():
    model = MaskedAutoencoder(16, 4, 3, 32, 1, 2, 16, 1, 4)
    state = hf_state(model)
    assert set(state) == VIT_MAE_NAMES
    # And back: every official weight is all of its parts, in order.
    for name, value in model.state_dict().items():
        torch.testing.assert_close(torch.cat([state[part] for part in hf_names(name)]), value)
    assert sum(value.numel() for value in state.values()) == sum(
        value.numel() for value in model.state_dict().values()
    )


def test_shapes_of_vit_mae(tmp_path):
    checkpoint(tmp_path / "run")
    export(ExportConfig(tmp_path / "run", tmp_path / "out", "hf"))
    state = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "vit_mae"
    assert config["architectures"] == ["ViTMAEForPreTraining"]
    assert config["norm_pix_loss"] is True and config["mask_ratio"] == 0.5
    width, hidden = config["hidden_size"], config["intermediate_size"]
    patches = (config["image_size"] // config["patch_size"]) ** 2
    for i in range(config["num_hidden_layers"]):
        layer = f"vit.encoder.layer.{i}"
        assert state[f"{layer}.attention.attention.key.weight"].shape == (width, width)
        assert state[f"{layer}.intermediate.dense.weight"].shape == (hidden, width)
        assert state[f"{layer}.output.dense.weight"].shape == (width, hidden)
    assert state["vit.embeddings.position_embeddings"].shape == (1, patches + 1, width)
    decoder = config["decoder_hidden_size"]
    assert state["decoder.decoder_pos_embed"].shape == (1, patches + 1, decoder)
    pixels = config["patch_size"] ** 2 * config["num_channels"]
    assert state["decoder.decoder_pred.weight"].shape == (pixels, decoder)
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.4] * 3


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def vit_mae_layer(state, name, x, heads, eps):
    """A layer of ViTMAE, written from its documentation and with its names."""
    y = norm(state, f"{name}.layernorm_before", x, eps)
    q, k, v = (
        linear(state, f"{name}.attention.attention.{part}", y)
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for part in ("query", "key", "value")
    )
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + linear(state, f"{name}.attention.output.dense", y)
    y = norm(state, f"{name}.layernorm_after", x, eps)
    y = F.gelu(linear(state, f"{name}.intermediate.dense", y))
    return x + linear(state, f"{name}.output.dense", y)


def test_arithmetic_of_vit_mae(tmp_path):
    """The exported weights, run by ViTMAE's own order of operations, give our predictions."""
    model = checkpoint(tmp_path / "run")
    export(ExportConfig(tmp_path / "run", tmp_path / "out", "hf"))
    state = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    eps, images = config["layer_norm_eps"], torch.randn(2, 3, 16, 16)
    noise = torch.rand(2, 16)

    projection = "vit.embeddings.patch_embeddings.projection"
    x = F.conv2d(images, state[f"{projection}.weight"], state[f"{projection}.bias"], stride=4)
    positions = state["vit.embeddings.position_embeddings"]
    x = x.flatten(2).transpose(1, 2) + positions[:, 1:]
    order = noise.argsort(dim=1)
    keep = order[:, :8]
    x = torch.stack([row[index] for row, index in zip(x, keep, strict=True)])
    first = state["vit.embeddings.cls_token"] + positions[:, :1]
    x = torch.cat([first.expand(2, -1, -1), x], dim=1)
    for i in range(config["num_hidden_layers"]):
        x = vit_mae_layer(state, f"vit.encoder.layer.{i}", x, config["num_attention_heads"], eps)
    x = norm(state, "vit.layernorm", x, eps)

    x = linear(state, "decoder.decoder_embed", x)
    patches = torch.empty(2, 16, x.shape[-1])
    for row, index, out in zip(x, order, patches, strict=True):
        out[index] = torch.cat([row[1:], state["decoder.mask_token"][0].expand(8, -1)])
    x = torch.cat([x[:, :1], patches], dim=1) + state["decoder.decoder_pos_embed"]
    heads = config["decoder_num_attention_heads"]
    for i in range(config["decoder_num_hidden_layers"]):
        x = vit_mae_layer(state, f"decoder.decoder_layers.{i}", x, heads, eps)
    x = linear(state, "decoder.decoder_pred", norm(state, "decoder.decoder_norm", x, eps))

    with torch.no_grad():
        torch.testing.assert_close(x[:, 1:], model(images, noise).pred, rtol=1e-5, atol=1e-5)


def test_vit_mae_takes_squares_only(tmp_path):
    checkpoint(tmp_path / "run", img_size=(8, 16))
    with pytest.raises(UserError, match="takes square images, the model takes 8x16"):
        export(ExportConfig(tmp_path / "run", tmp_path / "out", "hf"))


def test_state_for_timm_has_no_decoder():
    model = MaskedAutoencoder(16, 4, 3, 32, 1, 2, 16, 1, 4)
    assert not [name for name in timm_state(model) if "decoder" in name or "mask" in name]
