"""Published weights: read as data, refused where they are code, and the same model afterwards."""

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mmae_fast import cli
from mmae_fast.evaluation.config import PublishedConfig
from mmae_fast.evaluation.published import open_model, read_pickle
from mmae_fast.training.checkpoint import save_checkpoint
from mmae_fast.training.config import UserError
from mmae_fast.training.launch import World
from mmae_fast.training.models import MaskedAutoencoder, VisionTransformer

ALONE = World(torch.device("cpu"))
GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")
HEADS = PublishedConfig(num_heads=4, decoder_num_heads=4)


@pytest.fixture(scope="module")
def golden():
    """State dict, inputs and outputs of the published M-MAE code; it has a classifier too."""
    with np.load(GOLDEN / "mae_model_normpix.npz") as file:
        values = {key: torch.from_numpy(np.asarray(file[key])) for key in file if key != "cfg"}
    state = {key[6:]: value for key, value in values.items() if key.startswith("state/")}
    assert "fc.weight" in state and "decoder_pred.weight" in state
    return state, values


def write(path, state, **args):
    """A file as the published training programs write it."""
    content = {"model": state, "epoch": 199, "optimizer": {"lr": 0.1}}
    if args:
        content["args"] = argparse.Namespace(model="mae_vit_base_patch16", lr=None, **args)
    torch.save(content, path)
    return path


def test_published_model_is_the_same_model(golden, tmp_path):
    state, values = golden
    path = write(tmp_path / "m_mae.pth", state, norm_pix_loss=True, mask_ratio=0.75)
    model, meta = open_model(path, CPU, HEADS)
    assert isinstance(model, MaskedAutoencoder) and not model.training
    assert meta["norm_pix_known"] and model.norm_pix_loss and model.mask_ratio == 0.75
    assert meta["data"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    out = model(values["imgs"], values["noise"])
    for key in ("pred", "latent", "loss"):
        torch.testing.assert_close(getattr(out, key), values[key], rtol=1e-5, atol=1e-5)


def test_state_of_several_processes_and_bare_state(golden, tmp_path):
    state, values = golden
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "bare.pth")
    model, meta = open_model(tmp_path / "bare.pth", CPU, HEADS)
    out = model(values["imgs"], values["noise"])
    torch.testing.assert_close(out.pred, values["pred"], rtol=1e-5, atol=1e-5)
    assert not meta["norm_pix_known"]


def test_norm_pix_is_what_the_file_or_the_user_says(golden, tmp_path):
    path = write(tmp_path / "a.pth", golden[0], norm_pix_loss=False)
    assert not open_model(path, CPU, HEADS)[0].norm_pix_loss
    told = PublishedConfig(norm_pix=True, num_heads=4, decoder_num_heads=4)
    model, meta = open_model(path, CPU, told)
    assert model.norm_pix_loss and meta["norm_pix_known"]


def test_encoder_without_decoder(golden, tmp_path):
    state, values = golden
    encoder = {key: v for key, v in state.items() if "decoder" not in key and key != "mask_token"}
    model, _ = open_model(write(tmp_path / "encoder.pth", encoder), CPU, HEADS)
    assert type(model) is VisionTransformer
    whole, _ = open_model(write(tmp_path / "whole.pth", state), CPU, HEADS)
    with torch.no_grad():
        expected = whole.forward_features(values["imgs"])
        assert torch.equal(model.forward_features(values["imgs"]), expected)


class Code:
    """What a hostile file does: its unpickling calls a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("place", ["model", "args", "epoch"])
def test_a_pickle_with_code_is_refused(golden, tmp_path, place):
    mark = tmp_path / "ran"
    content = {"model": golden[0], "args": argparse.Namespace(), "epoch": 1}
    torch.save(content | {place: Code(str(mark))}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth holds more than .*mkdir.* not loaded"):
        read_pickle(tmp_path / "evil.pth")
    assert not mark.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert mark.exists()  # the test file does hold code


def test_a_namespace_with_code_in_it_is_refused(golden, tmp_path):
    mark = tmp_path / "ran"
    args = argparse.Namespace(lr=Code(str(mark)))
    torch.save({"model": golden[0], "args": args}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="not loaded"):
        read_pickle(tmp_path / "evil.pth")
    assert not mark.exists()


def test_other_classes_stay_forbidden_afterwards(golden, tmp_path):
    """Namespaces are allowed while the file is read, not from then on."""
    path = write(tmp_path / "a.pth", golden[0], norm_pix_loss=True)
    open_model(path, CPU, HEADS)
    with pytest.raises(Exception, match="Namespace"):
        torch.load(path, weights_only=True)


def test_files_that_are_no_model(golden, tmp_path):
    state = golden[0]
    (tmp_path / "garbage.pth").write_bytes(b"garbage garbage")
    whole = write(tmp_path / "cut.pth", state).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    tuned = {k: v for k, v in state.items() if not k.startswith("norm.")}
    torch.save({"model": tuned}, tmp_path / "tuned.pth")
    for name, words in {
        "nothing.pth": "no checkpoint at",
        "garbage.pth": "damaged",
        "cut.pth": "damaged",
        "list.pth": "holds no state dict",
        "other.pth": "no masked autoencoder of the published form: 'norm.weight'|'cls_token'",
        "tuned.pth": "fine-tuned",
    }.items():
        with pytest.raises(UserError, match=words):
            open_model(tmp_path / name, CPU, HEADS)


def test_unknown_heads_are_asked_for(golden, tmp_path):
    path = write(tmp_path / "a.pth", golden[0])
    with pytest.raises(UserError, match=r"width of 48 are not known; --published\.num-heads"):
        open_model(path, CPU)
    with pytest.raises(UserError, match=r"--published\.decoder-num-heads"):
        open_model(path, CPU, PublishedConfig(num_heads=4))


def test_missing_weight_is_named(golden, tmp_path):
    state = {key: v for key, v in golden[0].items() if key != "blocks.1.mlp.fc2.bias"}
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.fc2\.bias"):
        open_model(write(tmp_path / "a.pth", state), CPU, HEADS)


# --- Other image sizes ---------------------------------------------------------------------------


def test_positions_are_resampled_as_timm_does():
    from timm.models.vision_transformer import VisionTransformer as TimmViT
    from timm.models.vision_transformer import checkpoint_filter_fn

    torch.manual_seed(0)
    model = VisionTransformer(32, 4, 3, 16, 1, 2)
    model.initialise()
    timm_vit = TimmViT(48, 4, 3, embed_dim=16, depth=1, num_heads=2)
    expected = checkpoint_filter_fn(model.state_dict(), timm_vit)["pos_embed"]
    model.resize(48)
    torch.testing.assert_close(model.pos_embed, expected)
    assert model.patch_embed.num_patches == 144
    assert model.forward_features(torch.randn(2, 3, 48, 48)).shape == (2, 16)


def test_resized_autoencoder_reconstructs_oblong_images():
    torch.manual_seed(0)
    model = MaskedAutoencoder(16, 4, 2, 16, 1, 2, 8, 1, 2)
    table = model.decoder_pos_embed
    model.resize((8, 32))  # as many patches as before, in other places
    assert not torch.equal(model.decoder_pos_embed, table)
    imgs = torch.randn(2, 2, 8, 32)
    out = model(imgs)
    assert model.reconstruct(imgs, out.pred, out.mask).shape == imgs.shape
    before = model.pos_embed
    model.resize((8, 32))
    assert model.pos_embed is before
    with pytest.raises(ValueError, match="patch_size must divide the image size, got 4 for 8x30"):
        model.resize((8, 30))


# --- The commands --------------------------------------------------------------------------------


def photos(folder, count=6, side=40):
    from torchvision.io import write_png

    rng = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=rng)
                write_png(pixels, str(folder / split / label / f"{i}.png"))
    return folder


def mmae(*arguments):
    cli.main([str(argument) for argument in arguments])


def test_commands_take_a_published_file(golden, tmp_path, capsys):
    path = write(tmp_path / "umae.pth", golden[0])
    heads = ["--published.num-heads", 4, "--published.decoder-num-heads", 4]
    with pytest.raises(SystemExit, match="say which images"):
        mmae("probe", path, *heads)
    data = photos(tmp_path / "photos")
    for command in ("probe", "knn"):
        for size in (32, 48):
            mmae(command, path, "--train", data, "--img-size", size, *heads)
            assert "%" in capsys.readouterr().out
    drawing = [
        "visualize",
        path,
        "--train",
        data,
        "--out",
        tmp_path / "r.png",
        "--count",
        2,
        *heads,
    ]
    with pytest.raises(SystemExit, match=r"does not say whether .* --published\.norm-pix"):
        mmae(*drawing)
    mmae(*drawing, "--published.norm-pix", "True", "--img-size", 48)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_fine_tuning_analysis_and_export_of_a_published_file(golden, tmp_path, capsys):
    path = write(tmp_path / "umae.pth", golden[0])
    data = photos(tmp_path / "photos")
    heads = ["--published.num-heads", 4, "--published.decoder-num-heads", 4]
    images = ["--train", data, "--img-size", 48, "--device", "cpu"]
    short = ["--epochs", 1, "--warmup-epochs", 0, "--batch-size", 4, "--out", tmp_path / "tuned"]
    mmae("finetune", path, *images, *short, *heads)
    assert (tmp_path / "tuned" / "finetune.json").exists()
    assert not (tmp_path / "finetune.json").exists()

    analysis = ["--out", tmp_path / "analysis", "--count", 4, "--device", "cpu"]
    mmae("analyze", path, "--data", data, *analysis, *heads)
    assert (tmp_path / "analysis" / "analysis.json").exists()

    capsys.readouterr()
    for source, options in ((path, heads), (tmp_path / "tuned", [])):
        mmae("export", source, tmp_path / f"of-{source.name}", *options)
    names = {}
    exec(capsys.readouterr().out, names)  # the last model: the classifier, at its own size
    with torch.no_grad():
        assert names["model"].eval()(torch.randn(2, 3, 48, 48)).shape == (2, 2)
    with pytest.raises(SystemExit, match=r"--published\.norm-pix"):
        mmae("export", path, tmp_path / "hf", "--format", "hf", *heads)
    mmae("export", path, tmp_path / "hf", "--format", "hf", *heads, "--published.norm-pix", "True")
    assert (tmp_path / "hf" / "preprocessor_config.json").exists()


def test_images_of_other_channels(golden, tmp_path):
    pytest.importorskip("sklearn")
    path = write(tmp_path / "a.pth", golden[0])
    with pytest.raises(SystemExit, match=r"takes images of 3 channels, those of .* have 1"):
        mmae("knn", path, "--train", "digits", "--published.num-heads", 4,
             "--published.decoder-num-heads", 4)  # fmt: skip


def test_a_classifier_is_no_encoder(tmp_path):
    meta = {"classifier": {"num_classes": 2}}
    model = torch.nn.Linear(2, 2)
    save_checkpoint(tmp_path, 1, {"model": model.state_dict()}, meta, 1, ALONE)
    with pytest.raises(UserError, match="holds a fine-tuned classifier"):
        open_model(tmp_path, CPU)
