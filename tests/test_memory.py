"""Work memory of one large matrix: a few k x k matrices, whatever the other dimension is.

The compiled kernels are held to the growth of the resident set, value and gradient together less
the gradient itself, in a fork of a small process; the PyTorch backend to what it allocates, since
the libraries behind it keep buffers of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mmae_fast import fast_coding_rate, fast_matrix_entropy

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import memory  # noqa: E402

D = 1024
SCALE = 1e-5  # small enough that no float64 is called for without normalisation
QUANTITIES = {
    "coding rate": lambda z, **o: fast_coding_rate(z, SCALE, **o),
    "alpha = 2": lambda z, **o: fast_matrix_entropy(z, 2, **o),
    "alpha = 3": lambda z, **o: fast_matrix_entropy(z, 3, **o),
    "eigen": lambda z, **o: fast_matrix_entropy(z, 1, **o),
    "rational": lambda z, **o: fast_matrix_entropy(z, 1, method="rational", **o),
}
# Matrices of k x k that a call may need; docs/algorithms.md says which they are.
CPU = {"coding rate": 3, "alpha = 2": 3, "alpha = 3": 5, "eigen": 6}
PYTORCH = {"coding rate": 3, "alpha = 2": 3, "eigen": 4.1, "rational": 4.1}


def rows(n):
    return {
        "plain": {},
        "centred, masked": {"center": True, "mask": torch.arange(n) % 5 != 2},
        "not normalised": {"normalize": False},
    }


def steps(quantity, z, **options):
    """The two halves of a training step: value, and then gradient."""
    z = z.detach().requires_grad_()
    value = QUANTITIES[quantity](z, **options)
    yield value
    yield torch.autograd.grad(value, z)


def growth(quantity, z, **options) -> int:
    """Bytes, over the value, and over both halves less the gradient: the larger."""
    before, grown = memory.resident(), []
    for result in steps(quantity, z, **options):
        grown.append(memory.peak_resident() - before)
        del result
    return max(grown[0], grown[1] - z.numel() * 4)


def growths(n: int, d: int, names: list[str]) -> dict:
    """In units of k x k, by quantity and row options; one fork each."""
    torch.set_num_threads(1)
    z, small, square = torch.randn(n, d), torch.randn(400, 300), torch.randn(2000, 2000)
    torch.mm(square, square)  # libraries keep buffers
    found = {}
    for quantity in names:
        for option, few in rows(len(small)).items():
            options = rows(n)[option]
            read, write = os.pipe()
            if not os.fork():
                list(steps(quantity, small, **few))  # code pages, buffers
                os.write(write, str(growth(quantity, z, **options)).encode())
                os._exit(0)
            os.close(write)
            with os.fdopen(read) as answer:
                found[f"{quantity}, {option}"] = int(answer.read()) / (4 * min(n, d) ** 2)
            os.wait()
    return found


@pytest.mark.skipif(not memory.SUPPORTED, reason="reads /proc")
@pytest.mark.parametrize(
    ("n", "names"),
    [
        pytest.param(8192, [*CPU], id="8192"),
        pytest.param(65536, ["coding rate", "alpha = 2"], id="65536", marks=pytest.mark.slow),
    ],
)
def test_resident_set_of_the_compiled_kernels(n, names):
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_memory", str(n), str(D), *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 3 * len(names)
    for case, matrices in found.items():
        allowed = CPU[case.split(",")[0]]
        # Nobody does without G and the weight: less means that the measurement sees nothing.
        assert 1.9 < matrices < allowed, (case, found)


def allocated(call) -> int:
    """Most bytes that PyTorch's allocator had given out during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del out
    return peak


@pytest.mark.parametrize("option", rows(1))
@pytest.mark.parametrize("quantity", PYTORCH)
def test_allocations_of_the_pytorch_backend(quantity, option):
    n = 4 * D
    z, options = torch.randn(n, D), rows(n)[option]
    call = steps(quantity, z, backend="torch", **options)
    forward = allocated(lambda: next(call))
    weight = 4 * D * D  # is there from the first half on
    backward = allocated(lambda: next(call)) + weight - z.numel() * 4
    assert 1.4 < max(forward, backward) / (4 * D * D) < PYTORCH[quantity]


if __name__ == "__main__":
    print(json.dumps(growths(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
