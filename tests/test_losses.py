"""The losses against the published code's values and gradients, and their own definitions."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmae_fast import effective_rank, fast_coding_rate, fast_matrix_entropy
from mmae_fast.losses import MatrixEntropyRegularizer, tcr_loss, uniformity_loss

from .accuracy import BACKENDS, features

GOLDEN = Path(__file__).parent / "golden"


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def value_and_grad(function, z):
    z = z.clone().requires_grad_()
    value = function(z)
    value.backward()
    return value.detach(), z.grad


REGULARISERS = load("mae_regularisers")
CASES = sorted({key.split("_")[0] for key in REGULARISERS})
assert len(CASES) == 12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("mu", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_published_tcr(case, mu, center, backend):
    key = f"{case}_tcr_mu{mu}_center{int(center)}"
    value, grad = value_and_grad(
        lambda z: tcr_loss(z, mu, center, backend=backend), REGULARISERS[f"{case}_z"]
    )
    torch.testing.assert_close(value, REGULARISERS[key], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, REGULARISERS[f"{key}_grad"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_published_uniformity(case, backend):
    value, grad = value_and_grad(
        lambda z: uniformity_loss(z, backend=backend), REGULARISERS[f"{case}_z"]
    )
    torch.testing.assert_close(value, REGULARISERS[f"{case}_umae"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, REGULARISERS[f"{case}_umae_grad"], rtol=1e-5, atol=1e-5)


RANKS = load("effective_rank")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_published_effective_rank(case, backend):
    """The published code centres before it normalises rows: the input is centred here."""
    z = RANKS[f"{case}_z"]
    z = z - z.mean(0)
    entropy = fast_matrix_entropy(z, backend=backend)
    torch.testing.assert_close(entropy, RANKS[f"{case}_entropy"], rtol=1e-9, atol=1e-9)
    rank = effective_rank(z, backend=backend)
    torch.testing.assert_close(rank, RANKS[f"{case}_erank"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(9, 20), (20, 9), (3, 9, 20), (2, 2, 20, 9)])
@pytest.mark.parametrize("kind", ["gaussian", "collapsed", "zero rows", "zeros"])
def test_uniformity_is_the_mean_squared_cosine(kind, shape, backend):
    z = features(kind, *shape, dtype=torch.float64)
    x = F.normalize(z, dim=-1)  # leaves zero rows zero: their cosine counts as 0
    expected = (x @ x.mT).square().mean((-2, -1))
    torch.testing.assert_close(uniformity_loss(z, backend=backend), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("mu", [0.5, 3.0])
def test_tcr_is_the_negative_log_determinant(mu, center):
    z = features("gaussian", 12, 7, dtype=torch.float64)
    x = F.normalize(z, dim=-1)
    x = x - x.mean(0) if center else x
    expected = -torch.logdet(torch.eye(7, dtype=z.dtype) + mu / 7 * x.mT @ x)
    torch.testing.assert_close(tcr_loss(z, mu, center), expected)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_regularizer_kinds(backend):
    z = features("gaussian", 2, 9, 14)
    weight = 0.25

    def term(kind, **kwargs):
        return MatrixEntropyRegularizer(kind, weight, backend=backend, **kwargs)(z)

    torch.testing.assert_close(term("none"), torch.zeros(2))
    torch.testing.assert_close(term("uniformity"), weight * uniformity_loss(z, backend=backend))
    for center in (False, True):
        rate = fast_coding_rate(z, 3 / 14, center=center, backend=backend)
        torch.testing.assert_close(term("tcr", mu=3.0, center=center), -weight * rate)
        h = fast_matrix_entropy(z, center=center, backend=backend)
        torch.testing.assert_close(term("von_neumann", center=center), -weight * h)
        h = fast_matrix_entropy(z, 3.0, center=center, backend=backend)
        torch.testing.assert_close(term("renyi", alpha=3.0, center=center), -weight * h)


def test_regularizer_defaults():
    assert set(MatrixEntropyRegularizer.KINDS) == {
        "none",
        "uniformity",
        "tcr",
        "von_neumann",
        "renyi",
    }
    z = features("gaussian", 9, 14)
    module = MatrixEntropyRegularizer()
    assert module(z).item() == 0 and not list(module.parameters())
    torch.testing.assert_close(MatrixEntropyRegularizer("tcr")(z), 0.01 * tcr_loss(z))
    assert repr(MatrixEntropyRegularizer("tcr", 0.5, mu=3.0)) == (
        "MatrixEntropyRegularizer(kind='tcr', weight=0.5, mu=3.0, alpha=2.0, center=False)"
    )


@pytest.mark.parametrize("kind", MatrixEntropyRegularizer.KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_are_at_least_float32(kind, dtype):
    z = features("gaussian", 9, 14, dtype=dtype)
    expected = MatrixEntropyRegularizer(kind, 1.0)(z)
    assert expected.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = MatrixEntropyRegularizer(kind, 1.0)(z)
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("kind", ["uniformity", "tcr", "von_neumann", "renyi"])
def test_a_descent_step_spreads_collapsed_features(kind):
    """All kinds point the same way: minimising the term raises the entropy."""
    z = features("collapsed", 16, 24, dtype=torch.float64)
    _, grad = value_and_grad(MatrixEntropyRegularizer(kind, 1.0), z)
    step = 1e-6 / grad.norm()
    assert fast_matrix_entropy(z - step * grad) > fast_matrix_entropy(z)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "tcl"}, "kind must be one of .*'renyi'.*got 'tcl'"),
        ({"kind": "tcr", "weight": -0.5}, "weight must be >= 0, got -0.5"),
        ({"kind": "tcr", "weight": float("nan")}, "weight must be >= 0, got nan"),
        ({"kind": "uniformity", "center": True}, "center=True is not defined for .*'uniformity'"),
    ],
)
def test_regularizer_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        MatrixEntropyRegularizer(**arguments)


def test_errors_of_the_operators_come_through():
    z = features("gaussian", 4, 6)
    with pytest.raises(ValueError, match=r"scale must be > 0 and finite, got -0\.5"):
        tcr_loss(z, mu=-3.0)
    with pytest.raises(ValueError, match=r"alpha must be > 0, got -1\.0"):
        MatrixEntropyRegularizer("renyi", alpha=-1.0)(z)
    with pytest.raises(ValueError, match=r"shape \(\.\.\., n, d\), got \(6,\)"):
        uniformity_loss(z[0])
    with pytest.raises(ValueError, match="got 'gpu'"):
        uniformity_loss(z, backend="gpu")
