"""Measures against their definitions; layers of our checkpoints, of timm and of files; errors."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import save_file

from mmae_fast import reference
from mmae_fast.evaluation.analyze import run_analysis
from mmae_fast.evaluation.config import AnalyzeConfig
from mmae_fast.evaluation.layers import Subject, capture, find_layers
from mmae_fast.measures import power_law, rankme, shared_information, spectral_measures, spectrum
from mmae_fast.training.augment import normalise
from mmae_fast.training.config import (
    LossConfig,
    ModelConfig,
    PackConfig,
    PretrainConfig,
    TwoBranchConfig,
    UserError,
)
from mmae_fast.training.data.packed import write_pack
from mmae_fast.training.models import build_model
from mmae_fast.training.train import pretrain

TIMM_VIT = "test_vit"
PNG = b"\x89PNG\r\n\x1a\n"


def z(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- Measures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
@pytest.mark.parametrize("center", [False, True])
def test_spectral_measures_are_their_definitions(shape, center):
    x = z(*shape) + 1
    found = spectral_measures(x, center)
    for alpha in (1, 2):
        truth = reference.matrix_entropy(x.double(), alpha, center=center).item()
        assert found[f"entropy_{alpha}"] == pytest.approx(truth, rel=1e-5)
    assert found["effective_rank"] == pytest.approx(math.exp(found["entropy_1"]))
    sigma = torch.linalg.svdvals(x.double())
    p = sigma / sigma.sum()
    assert found["rankme"] == pytest.approx(math.exp(-(p * p.log()).sum().item()))
    values = torch.tensor(found["spectrum"], dtype=torch.float64)
    assert len(values) == 12 and values.sum() == pytest.approx(1)
    entropy = torch.special.entr(values).sum().item()
    assert entropy == pytest.approx(found["entropy_1"], rel=1e-5)


def test_rankme_is_not_the_effective_rank():
    x = torch.diag(torch.tensor([2.0, 1.0, 1.0]))
    assert rankme(x) == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    assert spectral_measures(x)["effective_rank"] == pytest.approx(3.0)  # rows are normalised


def test_power_law_finds_its_exponent_in_its_range():
    values = torch.arange(1, 101, dtype=torch.float64) ** -1.3
    values[:3] = 50.0  # the first ones are left out, and so are the last
    values[60:] = 0.0
    slope, first, last = power_law(values)
    assert (first, last) == (5, 50)
    assert slope == pytest.approx(1.3)
    assert math.isnan(power_law(values[:8])[0])
    rank_one = spectrum(torch.ones(50, 20))
    assert math.isnan(power_law(rank_one)[0])


def test_spectrum_of_zero_rows_is_zero():
    assert spectrum(torch.zeros(5, 3)).tolist() == [0, 0, 0]


def test_shared_information_is_its_definition():
    x, y = z(30, 8), z(30, 5, seed=1)
    found = shared_information(x, y)
    for alpha in (1, 2):
        h1, h2 = (reference.matrix_entropy(v.double(), alpha).item() for v in (x, y))
        joint = reference.joint_entropy(x.double(), y.double(), alpha).item()
        assert found[f"entropy_{alpha}"] == pytest.approx((h1 + h2) / 2, rel=1e-5)
        assert found[f"joint_entropy_{alpha}"] == pytest.approx(joint, rel=1e-5)
        mutual = found[f"mutual_information_{alpha}"]
        assert mutual == pytest.approx(h1 + h2 - joint, rel=1e-4, abs=1e-5)
    assert found["effective_rank"] == pytest.approx(math.exp(found["entropy_1"]))


# --- Layers --------------------------------------------------------------------------------------


CONFIG = PretrainConfig(
    model=ModelConfig(
        patch_size=2,
        embed_dim=16,
        depth=2,
        num_heads=2,
        decoder_embed_dim=8,
        decoder_depth=1,
        decoder_num_heads=2,
    ),
    two_branch=TwoBranchConfig(projector_hidden=16, projector_dim=8),
    loss=LossConfig("mae"),
    epochs=0.05,
    warmup_epochs=0,
    batch_size=64,
    monitor_every=1,
    device="cpu",
)


def subject(model, size):
    one = torch.ones(size[0])
    return Subject(model.eval(), model.forward_features, 0 * one, one, size, False)


def test_captured_layers_are_the_outputs_of_the_blocks():
    torch.manual_seed(0)
    model = build_model(CONFIG, (8, 8), 1)
    images = z(70, 1, 8, 8)  # more than one batch
    layers = capture(subject(model, (1, 8, 8)), images)
    assert [layer.name for layer in layers] == ["block 1", "block 2", "norm"]
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        for pool in ("cls", "mean"):
            torch.testing.assert_close(layers[-1].pools[pool], model.forward_features(images, pool))
        x = torch.cat([model.cls_token.expand(70, -1, -1), model._embed(images)], 1)
        tokens = model.blocks[0](x)
        torch.testing.assert_close(layers[0].pools["cls"], tokens[:, 0])
        for alpha in (1, 2):
            truth = reference.matrix_entropy(tokens[:, 1:].double(), alpha)
            torch.testing.assert_close(
                layers[0].token_entropies[alpha].double(), truth, rtol=1e-5, atol=1e-6
            )
        # The heads, through the projection, are what attention adds.
        assert layers[0].heads.shape == (2, 70, 8) and layers[-1].heads is None
        block = model.blocks[0]
        joined = layers[0].heads.transpose(0, 1).reshape(70, 16)
        expected = block.attn(block.norm1(x))[:, 0]
        torch.testing.assert_close(block.attn.proj(joined), expected)


@pytest.mark.parametrize(
    "name, count, heads",
    [("test_vit", 6, True), ("test_resnet", 4, False), ("test_convnext", 4, False)],
)
def test_timm_models(name, count, heads):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0)
    layers = capture(subject(model, (3, 160, 160)), z(3, 3, 160, 160))
    blocks = len(getattr(model, "blocks", ())) or 4
    assert len(layers) == blocks + heads  # the norm after the blocks
    assert all((layer.heads is not None) == (heads and layer.name != "norm") for layer in layers)
    assert all(layer.pools["mean"].shape[0] == 3 for layer in layers)
    assert ("cls" in layers[0].pools) == heads


def test_resnet_of_ours():
    config = dataclasses.replace(
        CONFIG, loss=LossConfig("simclr"), two_branch=TwoBranchConfig("resnet18", 8, 8)
    )
    model = build_model(config, (8, 8), 1).backbone
    assert list(find_layers(model)) == ["layer 1", "layer 2", "layer 3", "layer 4"]
    layers = capture(subject(model, (1, 8, 8)), z(4, 1, 8, 8))
    assert [layer.pools["mean"].shape[1] for layer in layers] == [64, 128, 256, 512]
    with torch.no_grad():
        torch.testing.assert_close(layers[-1].pools["mean"], model.forward_features(z(4, 1, 8, 8)))


# --- The command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    paths = []
    for method in ("mae", "simclr"):
        config = dataclasses.replace(CONFIG, loss=LossConfig(method), out=folder / method)
        pretrain(dataclasses.replace(config, data=dataclasses.replace(config.data, train="digits")))
        paths.append(str(config.out))
    return paths


def analyse(tmp_path, *sources, **options):
    console = Console(record=True, width=100, file=io.StringIO())
    config = AnalyzeConfig(sources, out=tmp_path / "out", device="cpu", **options)
    path = run_analysis(config, console)
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    return content["sources"], console.export_text(), path.parent


def test_checkpoints_layer_by_layer(runs, tmp_path):
    found, text, out = analyse(tmp_path, *runs, data="digits", count=30)
    assert list(found) == ["mae", "simclr"]
    for name, source in found.items():
        assert source["samples"] == 30
        assert [layer["layer"] for layer in source["layers"]] == ["block 1", "block 2", "norm"]
        first, _, last = source["layers"]
        for pool in ("cls", "mean"):
            assert first[pool]["views_mutual_information_1"] >= -1e-6
            assert first[pool]["next_mutual_information_1"] > 0
            assert "next_mutual_information_1" not in last[pool]
            assert 1 <= first[pool]["effective_rank"] <= 16
            figures = (f"{name}-{pool}.png", f"{name}-{pool}-spectra.png")
            assert all((out / figure).read_bytes().startswith(PNG) for figure in figures)
        assert len(first["heads"]) == 2 and last["heads"] == []
        assert first["heads"][0]["views_mutual_information_2"] is not None
        assert 0 < first["tokens"]["token_entropy_1_mean"] < math.log(16)
        assert (out / f"{name}-heads.png").exists()
        assert f"{name}, class token" in text and "block 2" in text


def test_curves_of_runs(runs, tmp_path):
    found, text, out = analyse(tmp_path, *runs)
    assert list(found) == ["mae (training)", "simclr (training)"]
    assert len(found["mae (training)"]["curves"]) == 2
    assert "projector" in text and "→" in text
    assert (out / "curves.png").read_bytes().startswith(PNG)


def test_timm_model_with_local_weights(tmp_path):
    torch.manual_seed(3)
    weights = tmp_path / "w.safetensors"
    model = timm.create_model(TIMM_VIT, num_classes=0)
    save_file(model.state_dict(), weights)
    found, _, _ = analyse(tmp_path, TIMM_VIT, data="digits", count=4, weights=weights)
    subject_ = Subject(model.eval(), model.forward_features, None, None, (3, 160, 160), True)
    from mmae_fast.evaluation.layers import load_images

    images = load_images(subject_, AnalyzeConfig((TIMM_VIT,), data="digits", count=4))
    assert images.shape == (4, 3, 160, 160)
    config = timm.data.resolve_model_data_config(model)
    x = normalise(images, torch.tensor(config["mean"]), torch.tensor(config["std"]))
    with torch.no_grad():
        cls = model.forward_features(x)[:, 0]
    truth = reference.matrix_entropy(cls.double(), 1.0).item()
    assert found[TIMM_VIT]["layers"][-1]["cls"]["entropy_1"] == pytest.approx(truth, rel=1e-4)


def test_files_of_features(tmp_path):
    tokens = z(20, 5, 6)
    np.save(tmp_path / "a.npy", z(20, 6).numpy())
    np.savez(tmp_path / "b.npz", one=z(20, 6).numpy(), two=z(20, 4).numpy())
    torch.save({"x": tokens.bfloat16()}, tmp_path / "c.pt")
    paths = [str(tmp_path / name) for name in ("a.npy", "b.npz", "c.pt")]
    found, _, _ = analyse(tmp_path, *paths, count=15)
    a, b, c = found["a"], found["b"], found["c"]
    truth = reference.matrix_entropy(z(20, 6)[:15].double(), 2.0).item()
    assert a["layers"][0]["mean"]["entropy_2"] == pytest.approx(truth, rel=1e-5)
    assert a["samples"] == 15 and "views_mutual_information_1" not in a["layers"][0]["mean"]
    assert [layer["layer"] for layer in b["layers"]] == ["one", "two"]
    assert b["layers"][0]["mean"]["next_mutual_information_1"] > 0
    entropies = reference.matrix_entropy(tokens[:15].bfloat16().double(), 1.0)
    assert c["layers"][0]["tokens"]["token_entropy_1_mean"] == pytest.approx(
        entropies.mean().item(), rel=1e-5
    )
    assert c["layers"][0]["tokens"]["token_entropy_1_std"] == pytest.approx(
        entropies.std().item(), rel=1e-4
    )


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a pickle was run')",))


def test_bad_sources(tmp_path, runs):
    np.save(tmp_path / "ints.npy", np.arange(6).reshape(3, 2))
    np.save(tmp_path / "nan.npy", np.array([[1.0, np.nan], [0.0, 1.0]]))
    np.save(tmp_path / "flat.npy", np.ones(4))
    (tmp_path / "damaged.npz").write_bytes(b"nothing")
    torch.save(Trap(), tmp_path / "trap.pt")
    torch.save({"a": "text"}, tmp_path / "text.pt")
    (tmp_path / "unmonitored").mkdir()
    (tmp_path / "unmonitored" / "metrics.jsonl").write_text('{"step": 0, "epoch": 0}\n')
    cases = [
        ([], {}, "nothing to analyse"),
        (["no_such_thing"], {}, "say which images no_such_thing is to be run on: --data"),
        (["no_such_thing"], {"data": "digits"}, "'no_such_thing' is no run, no checkpoint"),
        ([tmp_path / "none.npy"], {}, "no file of features at .*none.npy"),
        ([tmp_path / "ints.npy"], {}, r"ints.npy must be floating-point .* got torch.int64"),
        ([tmp_path / "flat.npy"], {}, r"got torch.float64 of shape \(4,\)"),
        ([tmp_path / "nan.npy"], {}, "holds NaN or Inf"),
        ([tmp_path / "damaged.npz"], {}, "damaged.npz cannot be read as features"),
        ([tmp_path / "trap.pt"], {}, "trap.pt cannot be read as features"),
        ([tmp_path / "text.pt"], {}, "a in .*text.pt is no array of numbers but str"),
        ([tmp_path / "unmonitored"], {}, "was not monitored"),
        ([runs[0]], {"data": "digits", "count": 1}, "count must be >= 2, got 1"),
        ([runs[0]], {"data": "digits", "weights": tmp_path / "w"}, "are for timm models"),
        (
            [TIMM_VIT],
            {"data": "digits", "weights": tmp_path / "w.pth"},
            "test_vit cannot be loaded",
        ),
    ]
    for sources, options, match in cases:
        with pytest.raises(UserError, match=match):
            analyse(tmp_path, *map(str, sources), **options)


def test_images_that_do_not_fit(runs, tmp_path):
    from torchvision.io import write_png

    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = torch.full((3, 9, 9), 40 * i, dtype=torch.uint8)
        write_png(pixels, str(tmp_path / "images" / f"{i}.png"))
    pack = write_pack(PackConfig(str(tmp_path / "images"), tmp_path / "pack", img_size=8))
    with pytest.raises(UserError, match=r"takes images of shape \(1, 8, 8\), .* \(3, 8, 8\)"):
        analyse(tmp_path, runs[0], data=str(pack))
    analyse(tmp_path, runs[0], data=str(tmp_path / "images"))  # files are made what is taken
