"""The masked autoencoder against the published model, and its own properties."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmae_fast.training.models import MaskedAutoencoder, random_masking, sincos_2d

GOLDEN = Path(__file__).parent / "golden"


def load_golden(name):
    with np.load(GOLDEN / f"mae_model_{name}.npz") as file:
        golden = {key: file[key] for key in file.files}
    cfg = json.loads(str(golden.pop("cfg")))
    assert cfg.pop("norm_eps") == 1e-6
    golden = {key: torch.from_numpy(np.asarray(value)) for key, value in golden.items()}
    state = {key[6:]: value for key, value in golden.items() if key.startswith("state/")}
    grads = {key[5:]: value for key, value in golden.items() if key.startswith("grad/")}
    return cfg, golden, state, grads


def tiny(**kwargs):
    defaults = dict(
        img_size=8,
        patch_size=2,
        in_chans=1,
        embed_dim=16,
        depth=1,
        num_heads=2,
        decoder_embed_dim=8,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    torch.manual_seed(0)
    return MaskedAutoencoder(**(defaults | kwargs))


@pytest.mark.parametrize("name", ["normpix", "rawpix"])
def test_published_model(name):
    cfg, golden, state, grads = load_golden(name)
    model = MaskedAutoencoder(**cfg, double_norm=True)
    model.load_published(state)
    out = model(golden["imgs"], golden["noise"])
    assert torch.equal(out.mask, golden["mask"])
    for key, actual in {"latent": out.latent, "pred": out.pred, "loss": out.loss}.items():
        torch.testing.assert_close(actual, golden[key], rtol=1e-5, atol=1e-5, msg=key)
    torch.testing.assert_close(out.features, golden["cls_feats"], rtol=1e-5, atol=1e-5)
    out.loss.backward()
    actual = {key: p.grad for key, p in model.named_parameters()}
    assert actual.keys() == grads.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(actual[key], grad, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("key", ["pos_embed", "decoder_pos_embed"])
def test_position_embedding_is_the_published_one(key):
    _, _, state, _ = load_golden("normpix")
    expected = state[key]
    torch.testing.assert_close(sincos_2d(expected.shape[-1], (8, 8)), expected, rtol=0, atol=1e-6)


def test_position_embedding_of_oblong_grid():
    table = sincos_2d(8, (2, 3))[0]
    assert table.shape == (7, 8)
    assert (table[0] == 0).all()
    # Patch (row 1, column 2) is the last one: column in the first half, row in the second.
    expected = [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)]
    expected += [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)]
    torch.testing.assert_close(table[-1].double(), torch.tensor(expected), rtol=0, atol=1e-7)


def test_load_published_is_strict():
    cfg, _, state, _ = load_golden("normpix")
    model = MaskedAutoencoder(**cfg)
    with pytest.raises(RuntimeError, match=r"decoder_pred\.weight"):
        model.load_published({k: v for k, v in state.items() if k != "decoder_pred.weight"})
    with pytest.raises(RuntimeError, match="surprise"):
        model.load_published(state | {"surprise": torch.zeros(1)})


def test_random_masking_keeps_smallest_noise():
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    tokens = torch.arange(4.0).reshape(1, 4, 1)
    visible, mask, ids_restore = random_masking(tokens, noise, 0.5)
    assert visible.flatten().tolist() == [1.0, 3.0]
    assert mask.tolist() == [[1.0, 0.0, 1.0, 0.0]]
    padded = torch.cat([visible, torch.full((1, 2, 1), -1.0)], dim=1).flatten()
    assert padded[ids_restore[0]].tolist() == [-1.0, 1.0, -1.0, 3.0]


def test_hidden_patches_do_not_reach_the_encoder():
    model = tiny()
    imgs, noise = torch.randn(2, 1, 8, 8), torch.rand(2, 16)
    out = model(imgs, noise)
    hidden = model.unpatchify(out.mask.unsqueeze(-1).expand(-1, -1, 4))
    changed = model(torch.where(hidden.bool(), torch.randn_like(imgs), imgs), noise)
    assert torch.equal(out.latent, changed.latent)
    assert torch.equal(out.pred, changed.pred)
    assert not torch.equal(out.loss, changed.loss)


@pytest.mark.parametrize("ratio, visible", [(0.0, 16), (0.5, 8), (0.75, 4), (0.9, 1)])
def test_mask_ratio(ratio, visible):
    out = tiny(mask_ratio=ratio)(torch.randn(3, 1, 8, 8))
    assert out.latent.shape == (3, 1 + visible, 16)
    assert (out.mask.sum(dim=1) == 16 - visible).all()


def test_oblong_image_with_many_channels():
    model = tiny(img_size=(8, 12), in_chans=5, patch_size=4)
    imgs = torch.randn(2, 5, 8, 12)
    assert torch.equal(model.unpatchify(model.patchify(imgs)), imgs)
    out = model(imgs)
    assert out.pred.shape == (2, 6, 80)
    assert model.forward_features(imgs, "mean").shape == (2, 16)


def test_patchify_runs_channels_fastest():
    model = tiny(img_size=4, in_chans=3)
    imgs = torch.randn(1, 3, 4, 4)
    expected = imgs[0, :, 2:4, 0:2].permute(1, 2, 0).flatten()
    assert torch.equal(model.patchify(imgs)[0, 2], expected)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruct_inverts_the_target(norm_pix):
    model = tiny(norm_pix_loss=norm_pix)
    imgs, mask = torch.randn(2, 1, 8, 8), (torch.rand(2, 16) > 0.5).float()
    target = model.patchify(imgs)
    if norm_pix:
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (var + 1e-6).sqrt()
    torch.testing.assert_close(model.reconstruct(imgs, target, mask), imgs)
    wrong = model.patchify(model.reconstruct(imgs, target + 1, mask))
    changed = (wrong - model.patchify(imgs)).abs().amax(-1) > 1e-3
    assert torch.equal(changed, mask.bool())


def test_double_norm_is_the_norm_once_more():
    once, twice = tiny(), tiny(double_norm=True)
    with torch.no_grad():
        for model in (once, twice):
            model.norm.weight.fill_(2.0)
    imgs, noise = torch.randn(2, 1, 8, 8), torch.rand(2, 16)
    a, b = once(imgs, noise), twice(imgs, noise)
    assert torch.equal(a.features, a.latent[:, 0])
    torch.testing.assert_close(b.features, once.norm(a.features))
    assert torch.equal(a.pred, b.pred)


def test_unmasked_features_match_the_encoder_without_mask():
    model = tiny(mask_ratio=0.0)
    imgs = torch.randn(2, 1, 8, 8)
    out = model(imgs)
    torch.testing.assert_close(model.forward_features(imgs), out.latent[:, 0])
    torch.testing.assert_close(model.forward_features(imgs, "mean"), out.latent[:, 1:].mean(1))


def test_loss_is_float32_under_autocast():
    model = tiny()
    imgs, noise = torch.randn(4, 1, 8, 8), torch.rand(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(imgs, noise)
    assert out.loss.dtype == torch.float32
    assert out.pred.dtype == torch.bfloat16
    torch.testing.assert_close(out.loss, model(imgs, noise).loss, rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(patch_size=3), "patch_size must divide the image size, got 3 for 8x8"),
        (dict(mask_ratio=1.0), r"mask_ratio must be in \[0, 1\), got 1.0"),
        (dict(num_heads=3), "embed_dim must be a multiple of its heads and of 4, got 16 with 3"),
        (dict(decoder_embed_dim=6), "decoder_embed_dim must be a multiple"),
    ],
)
def test_sizes_that_do_not_fit(kwargs, match):
    with pytest.raises(ValueError, match=match):
        tiny(**kwargs)


def test_nothing_visible():
    with pytest.raises(ValueError, match="leaves none of 16 patches visible"):
        tiny(mask_ratio=0.99)(torch.zeros(1, 1, 8, 8))


def test_unknown_pool():
    with pytest.raises(ValueError, match="pool must be 'cls' or 'mean', got 'max'"):
        tiny().forward_features(torch.zeros(1, 1, 8, 8), "max")
