"""Memory of large results: kept for the next call, bounded, and safe to hold (csrc/cpu/pages.h)."""

import copy
import io
import subprocess
import sys

import pytest
import torch

from mmae_fast import fast_gram, fast_matrix_entropy

LARGE = (40, 128, 128)  # 2.5 MiB a Gram matrix or gradient; below 1 MiB the allocator is PyTorch's


def features(seed=0):
    return torch.randn(LARGE, generator=torch.Generator().manual_seed(seed))


def gradient(z):
    z = z.detach().requires_grad_()
    return torch.autograd.grad(fast_matrix_entropy(z, alpha=2.0, backend="cpu").sum(), z)[0]


def test_memory_that_is_given_back_is_used_again():
    z = features()
    places = set()
    for _ in range(10):
        grad = gradient(z)
        places.add(grad.data_ptr())
        del grad
    assert len(places) <= 2


def test_results_that_are_held_stay_as_they_are():
    z = [features(seed) for seed in range(6)]
    held = [gradient(x) for x in z]
    assert len({grad.data_ptr() for grad in held}) == len(held)
    expected = [grad.clone() for grad in held]
    for x in z:
        fast_gram(x, backend="cpu")
        gradient(x)
    for grad, wanted in zip(held, expected, strict=True):
        assert torch.equal(grad, wanted)


def test_views_outlive_the_result():
    row = fast_gram(features(), backend="cpu")[3, 5]
    expected = row.clone()
    for seed in range(4):
        fast_gram(features(seed), backend="cpu")
    assert torch.equal(row, expected)


def test_results_are_ordinary_tensors():
    g = fast_gram(features(), backend="cpu")
    file = io.BytesIO()
    torch.save(g, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), g)
    assert torch.equal(copy.deepcopy(g), g)
    assert torch.equal(torch.from_numpy(g.numpy()), g)
    assert g.is_contiguous() and g.data_ptr() % 64 == 0
    expected = g.clone()
    assert torch.equal(g.share_memory_(), expected)


def test_gradients_of_parameters_accumulate():
    z = torch.nn.Parameter(features())
    for _ in range(2):
        fast_matrix_entropy(z, alpha=2.0, backend="cpu").sum().backward()
    torch.testing.assert_close(z.grad, 2 * gradient(z))
    z.grad = None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_kept_is_bounded():
    """Many results at once, then none: 64 MiB may stay, and another call's noise."""
    script = """
import re, torch
from mmae_fast import fast_gram
def resident():
    with open("/proc/self/status") as file:
        return int(re.search(r"VmRSS:\\s+(\\d+)", file.read())[1]) / 1024
z = torch.randn(100, 256, 16)
fast_gram(z[:1], side="samples", backend="cpu")
before = resident()
held = [fast_gram(z, side="samples", backend="cpu") for _ in range(12)]  # 25 MiB each
most = resident()
del held
print(most - before, resident() - before)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    most, kept = map(float, out.stdout.split())
    assert most > 250
    assert kept < 64 + 40


def test_threads_share_it():
    """Results are freed by whichever thread drops them last."""
    script = """
import threading, torch
from mmae_fast import fast_gram
torch.set_num_threads(1)
z = [torch.randn(40, 128, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
expected = [x @ x.mT for x in z]
wrong = []
def work(i):
    for _ in range(50):
        if not torch.allclose(fast_gram(z[i], side="samples", normalize=False, backend="cpu"),
                              expected[i], atol=1e-3):
            wrong.append(i)
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
print(len(wrong))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "0"
