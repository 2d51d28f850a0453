"""Properties of two views that hold for every input. Why is in docs/theory.md, section 0."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mmae_fast import fast_matrix_entropy
from mmae_fast.information import (
    conditional_entropy,
    joint_entropy,
    matrix_cross_entropy,
    matrix_kl,
    mutual_information,
    rbf_gram,
)

from .accuracy import features
from .pairs import ALPHAS, views
from .test_properties import KINDS, SEEDS, cases


@st.composite
def two_views(draw, kinds=KINDS):
    n, d1, d2 = (draw(st.integers(1, 16)) for _ in range(3))
    kind, kind2 = draw(st.sampled_from(kinds)), draw(st.sampled_from(kinds))
    z1, z2 = views(n, d1, d2=d2, kind=kind, kind2=kind2, seed=draw(st.integers(0, 2**30)))
    relation = draw(st.sampled_from(("none", "none", "equal", "opposite", "permuted")))
    if relation == "equal":
        z2 = z1.clone()
    elif relation == "opposite":
        z2 = -z1
    elif relation == "permuted":
        z2 = z1[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    return z1, z2


# Zero rows have a zero on the diagonal, and a decaying spectrum in one dimension has them too.
UNIT = tuple(kind for kind in KINDS if kind != "zero rows")
ORDERS = st.sampled_from((0.5, 1.0, 1.5, 2.0, 3.0, math.inf))


@cases(150)
@given(two_views(UNIT), ORDERS)
def test_joint_entropy_is_at_least_either_and_at_most_log_n(z, alpha):
    """Unit diagonals: spectra of K1 ⊙ K2 are majorised by those of K1 and K2."""
    slack = 1e-6 if alpha < 1 else 1e-11  # sqrt of the rounding of zero eigenvalues
    joint = joint_entropy(*z, alpha)
    for view in z:
        assert joint >= fast_matrix_entropy(view, alpha) - slack
    assert joint <= math.log(z[0].shape[0]) + slack
    k1, k2 = (rbf_gram(view) for view in z)
    joint = joint_entropy(k1, k2, alpha, from_gram=True)
    for k in (k1, k2):
        one = torch.ones_like(k)
        assert joint >= joint_entropy(k, one, alpha, from_gram=True) - slack


@cases(150)
@given(two_views(UNIT))
def test_mutual_information_is_not_negative_at_alpha_1(z):
    """Unit diagonals: it is the quantum mutual information of a separable state."""
    assert mutual_information(*z, 1.0) >= -1e-11
    k1, k2 = (rbf_gram(view) for view in z)
    assert mutual_information(k1, k2, 1.0, from_gram=True) >= -1e-11


def test_mutual_information_may_be_negative_elsewhere():
    """The example of docs/theory.md: edges of two stars, at alpha = 2; and unequal diagonals."""
    left = torch.tensor([0] * 10 + list(range(1, 11)))
    right = torch.tensor(list(range(1, 11)) + [0] * 10)
    z1, z2 = (F.one_hot(index, 11).double() for index in (left, right))
    expected = math.log(20**3 / 110**2)
    assert mutual_information(z1, z2, 2.0).item() == pytest.approx(expected, abs=1e-12)
    assert expected < -0.4 < 0 < mutual_information(z1, z2, 1.0)
    z1, z2 = torch.diag(torch.tensor([1.0, 1e-3])), torch.diag(torch.tensor([1e-3, 1.0]))
    raw = partial(mutual_information, z1, z2, normalize=False)
    assert raw(1.0) == pytest.approx(-math.log(2), abs=1e-4)
    assert raw(2.0) == pytest.approx(-math.log(2), abs=1e-4)


@cases(60)
@given(two_views(), ORDERS, st.booleans())
def test_symmetry(z, alpha, normalize):
    slack = 1e-6 if alpha < 1 else 1e-11
    for function in (joint_entropy, mutual_information):
        one, two = (
            function(*z, alpha, normalize=normalize),
            function(*z[::-1], alpha, normalize=normalize),
        )
        torch.testing.assert_close(one, two, rtol=0, atol=slack)


@cases(60)
@given(two_views(), ORDERS)
def test_identities(z, alpha):
    """I = H1 + H2 - H12, H(1|2) = H12 - H2, and a view that says nothing (all rows equal)."""
    slack = 1e-6 if alpha < 1 else 1e-10
    joint = joint_entropy(*z, alpha)
    h1, h2 = (fast_matrix_entropy(view, alpha) for view in z)
    close = partial(torch.testing.assert_close, rtol=0, atol=slack)
    close(mutual_information(*z, alpha), h1 + h2 - joint)
    close(conditional_entropy(*z, alpha), joint - h2)
    silent = torch.ones(len(z[0]), 3).double()
    close(joint_entropy(z[0], silent, alpha), h1)
    close(mutual_information(z[0], silent, alpha), torch.zeros(()).double())


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_one_hot_features(n, alpha):
    z = torch.eye(n).double()
    for function in (joint_entropy, mutual_information):
        assert function(z, z, alpha).item() == pytest.approx(math.log(n), abs=1e-12)
    assert conditional_entropy(z, z, alpha).item() == pytest.approx(0, abs=1e-12)
    # One-hot classes: K ⊙ K = K, so that I(K, K) = H(K).
    labels = F.one_hot(torch.arange(12) % 4).double()
    expected = fast_matrix_entropy(labels, alpha)
    torch.testing.assert_close(mutual_information(labels, labels, alpha), expected)


@cases(40)
@given(two_views(), ORDERS, SEEDS)
def test_rotations_and_common_permutations_change_nothing(z, alpha, seed):
    slack = 1e-5 if alpha < 1 else 1e-9
    joint = joint_entropy(*z, alpha)
    order = torch.randperm(len(z[0]), generator=torch.Generator().manual_seed(seed))
    moved = joint_entropy(z[0][order], z[1][order], alpha)
    torch.testing.assert_close(moved, joint, rtol=0, atol=slack)
    d = z[0].shape[-1]
    turned = z[0] @ features("orthonormal", d, d, dtype=torch.float64, seed=seed)
    torch.testing.assert_close(joint_entropy(turned, z[1], alpha), joint, rtol=0, atol=slack)


@cases(60)
@given(two_views(("gaussian", "decaying", "rank3", "collapsed", "duplicates")))
def test_kl_is_not_negative_and_zero_at_equality(z):
    p, q = (z[i] @ z[i].mT for i in range(2))
    p, q = (x / x.diagonal().sum() + 1e-3 * torch.eye(len(x)) for x in (p, q))
    kl = matrix_kl(p, q)
    assert kl >= -1e-12
    assert matrix_kl(p, p).abs() <= 1e-12
    difference = matrix_cross_entropy(p, q) - matrix_cross_entropy(p, p)
    torch.testing.assert_close(kl, difference, rtol=0, atol=1e-12)
