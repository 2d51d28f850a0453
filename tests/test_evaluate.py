"""Probes against independent implementations; reconstructions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmae_fast import effective_rank
from mmae_fast.data import ImageData
from mmae_fast.evaluate import (
    Features,
    extract,
    knn,
    linear_probe,
    raw_pixels,
    reconstructions,
)
from mmae_fast.measures import spectrum
from mmae_fast.models import MaskedAutoencoder


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
    accuracy, protocol = linear_probe(blobs(0.05))
    assert accuracy == 1.0
    assert "100 iterations" in protocol and "L2 0.0001" in protocol


def test_linear_probe_is_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    features = blobs(1.0)
    l2, count = 1e-2, len(features.train)
    accuracy, _ = linear_probe(features, l2=l2)
    mean, std = features.train.mean(0), features.train.std(0)
    train, test = (((x - mean) / std).double() for x in (features.train, features.test))
    # scikit-learn's objective is C · sum of losses + ½‖w‖².
    reference = LogisticRegression(C=1 / (l2 * count), max_iter=1000, tol=1e-8)
    reference.fit(train, features.train_labels)
    assert 0.5 < accuracy < 1
    assert accuracy == pytest.approx(reference.score(test, features.test_labels), abs=0.5 / 150)


def test_linear_probe_ignores_scale_shift_and_constants():
    features = blobs(1.0)
    constant = torch.full((1,), 3.0)

    def moved(x):
        return torch.cat([x * 50 - 7, constant.expand(len(x), 1)], dim=1)

    other = Features(
        moved(features.train), features.train_labels, moved(features.test), features.test_labels
    )
    assert linear_probe(other)[0] == pytest.approx(linear_probe(features)[0], abs=0.01)


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
