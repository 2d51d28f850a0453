"""Probes against independent implementations; reconstructions."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmae_fast import effective_rank
from mmae_fast.evaluation.config import ProbeConfig
from mmae_fast.evaluation.evaluate import extract, raw_pixels
from mmae_fast.evaluation.probes import Features, knn, lars, lars_probe, lbfgs_probe
from mmae_fast.measures import spectrum
from mmae_fast.training.config import UserError
from mmae_fast.training.data import ImageData
from mmae_fast.training.models import MaskedAutoencoder
from mmae_fast.training.reconstruct import reconstructions

GOLDEN = Path(__file__).parent / "golden"


def blobs(spread, count=300, dim=8, classes=4, seed=0):
    """Gaussian clusters around the same centres, to learn from and to score on."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=rng)

    def draw(size):
        labels = torch.randint(0, classes, (size,), generator=rng)
        return centres[labels] + spread * torch.randn(size, dim, generator=rng), labels

    return Features(*draw(count), *draw(count // 2))


def tiny_model(**kwargs):
    torch.manual_seed(0)
    sizes = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=1, num_heads=2)
    decoder = dict(decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)
    return MaskedAutoencoder(**(sizes | decoder | kwargs)).eval()


def test_linear_probe_separates_what_is_separable():
    accuracy, protocol = lbfgs_probe(blobs(0.05))
    assert accuracy == 1.0
    assert "100 iterations" in protocol and "L2 0.0001" in protocol


def test_linear_probe_is_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    features = blobs(1.0)
    l2, count = 1e-2, len(features.train)
    accuracy, _ = lbfgs_probe(features, l2=l2)
    mean, std = features.train.mean(0), features.train.std(0)
    train, test = (((x - mean) / std).double() for x in (features.train, features.test))
    # scikit-learn's objective is C · sum of losses + ½‖w‖².
    reference = LogisticRegression(C=1 / (l2 * count), max_iter=1000, tol=1e-8)
    reference.fit(train, features.train_labels)
    assert 0.5 < accuracy < 1
    assert accuracy == pytest.approx(reference.score(test, features.test_labels), abs=0.5 / 150)


def test_lbfgs_probe_ignores_scale_shift_and_constants():
    features = blobs(1.0)
    constant = torch.full((1,), 3.0)

    def moved(x):
        return torch.cat([x * 50 - 7, constant.expand(len(x), 1)], dim=1)

    other = Features(
        moved(features.train), features.train_labels, moved(features.test), features.test_labels
    )
    assert lbfgs_probe(other)[0] == pytest.approx(lbfgs_probe(features)[0], abs=0.01)


def test_lars_is_the_published_one():
    """Four steps of the published optimiser: lr 0.3, weight decay 1e-3 of the weight."""
    golden = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "lars.npz").items()}
    head = torch.nn.Linear(5, 7)
    head.load_state_dict({"weight": golden["w0"], "bias": golden["b0"]})
    optimizer = lars(head, 0.3)
    for i in range(4):
        # The probe has no weight decay; there it is added to the gradient before all else.
        head.weight.grad = golden[f"gw{i}"] + 1e-3 * head.weight.detach()
        head.bias.grad = golden[f"gb{i}"].clone()
        optimizer.step()
        torch.testing.assert_close(head.weight.detach(), golden[f"w{i + 1}"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(head.bias.detach(), golden[f"b{i + 1}"], rtol=1e-6, atol=1e-7)


def lars_config(**changes):
    settings = dict(epochs=20, warmup_epochs=2, batch_size=64)
    return ProbeConfig(Path(), **(settings | changes))


def test_lars_probe_separates_what_is_separable():
    accuracy, protocol = lars_probe(blobs(0.05), lars_config(epochs=60), base_lr=40.0)
    assert accuracy == 1.0
    assert "LARS, lr 40 x 64/256" in protocol and "60 epochs, 2 of warm-up" in protocol
    assert "whole images" in protocol and "too few images" not in protocol


def test_lars_probe_is_a_function_of_the_seed():
    features = blobs(2.0)
    first, again = (lars_probe(features, lars_config(), 20.0) for _ in range(2))
    assert first == again
    others = {lars_probe(features, lars_config(seed=seed), 20.0)[0] for seed in range(6)}
    assert len(others) > 1


def test_lars_probe_says_when_it_cannot_have_learned():
    _, protocol = lars_probe(blobs(0.05), lars_config(batch_size=16384), base_lr=0.1)
    # 20 epochs of one step, lr 0.1 x 300/256, trust 0.001, momentum 0.9, cosine.
    assert "lr 0.1 x 300/256" in protocol
    assert "too few images: it can move the weights by 0.01 of their norm only" in protocol


def test_lars_probe_of_augmented_images():
    """``view`` is asked for each image of every epoch once, with generators of their own."""
    features, seen, drawn = blobs(0.05), [], []

    def view(chosen, rng):
        seen.append(chosen)
        drawn.append(torch.rand((), generator=rng).item())
        return features.train[chosen]

    config = lars_config(batch_size=100)
    accuracy, protocol = lars_probe(features, config, 20.0, view)
    assert accuracy == lars_probe(features, config, 20.0)[0]
    assert "random crops" in protocol
    assert len(seen) == len(set(drawn)) == 60
    for epoch in range(20):
        assert torch.cat(seen[3 * epoch : 3 * epoch + 3]).sort().values.tolist() == list(range(300))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(epochs=0), "epochs must be >= 1, got 0"),
        (dict(batch_size=0), "batch_size must be >= 1, got 0"),
        (dict(warmup_epochs=20), r"warmup_epochs must be in \[0, 20\), got 20"),
    ],
)
def test_lars_settings_that_cannot_be_meant(changes, words):
    with pytest.raises(UserError, match=words):
        lars_probe(blobs(1.0), lars_config(**changes), 1.0)


@pytest.mark.parametrize("k", [1, 20, 10_000])
def test_knn_against_a_loop(k):
    features = blobs(1.5)
    accuracy, protocol = knn(features, k=k)
    similarity = F.normalize(features.test, dim=1) @ F.normalize(features.train, dim=1).T
    correct = 0
    for row, label in zip(similarity, features.test_labels, strict=True):
        votes = np.zeros(4)
        for i in row.argsort(descending=True)[:k]:
            votes[features.train_labels[i]] += math.exp(row[i] / 0.07)
        correct += int(votes.argmax()) == int(label)
    assert accuracy == pytest.approx(correct / len(features.test), abs=1e-9)
    assert f"k = {min(k, 300)}" in protocol


def test_spectrum():
    features = torch.randn(60, 12)
    values = spectrum(features)
    assert values.sum() == pytest.approx(1)
    assert (values[:-1] >= values[1:]).all()
    rank = torch.special.entr(values).sum().exp()
    torch.testing.assert_close(rank.float(), effective_rank(features), rtol=1e-4, atol=0)
    assert spectrum(torch.ones(5, 3)).tolist() == pytest.approx([1, 0, 0], abs=1e-12)


def test_extract_does_not_depend_on_the_batches():
    model = tiny_model()
    images = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([0.4]), torch.tensor([0.3])
    whole = extract(model, images, mean, std, batch_size=7)
    assert whole.shape == (7, 16) and whole.dtype == torch.float32
    torch.testing.assert_close(extract(model, images, mean, std, batch_size=2), whole)
    expected = model.forward_features((images / 255 - 0.4) / 0.3, "mean")
    torch.testing.assert_close(extract(model, images, mean, std, "mean"), expected)


def test_raw_pixels():
    images = torch.randint(0, 256, (4, 1, 3, 3), dtype=torch.uint8)
    data = ImageData(images, torch.arange(4), (), "")
    features = raw_pixels(data, data, max_train=3)
    assert features.train.shape == (3, 9) and features.test.shape == (4, 9)
    assert features.test.max() <= 1


def test_reconstructions_show_visible_patches_as_they_are():
    model = tiny_model()
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([0.4]), torch.tensor([0.3])
    original, masked, restored = reconstructions(model, images, mean, std, seed=1)
    torch.testing.assert_close(original, images / 255)
    hidden = masked.isnan()
    assert hidden.float().mean() == 0.75
    patches = hidden.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).float().mean(-1)
    assert set(patches.unique().tolist()) == {0.0, 1.0}  # whole patches
    torch.testing.assert_close(masked[~hidden], original[~hidden])
    torch.testing.assert_close(restored[~hidden], original[~hidden])
    assert not torch.allclose(restored[hidden], original[hidden])
    assert torch.equal(masked.isnan(), reconstructions(model, images, mean, std, 1)[1].isnan())
    assert not torch.equal(hidden, reconstructions(model, images, mean, std, 2)[1].isnan())
