"""The Triton backend without a GPU: values in Triton's interpreter, machine code by its compiler.

The interpreter is chosen by an environment variable before Triton is imported, so its tests
(triton_interpreter.py) run in a process of their own.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from mmae_fast import fast_coding_rate
from mmae_fast.backends import dispatch

pytest.importorskip("triton", reason="triton is not installed: PyTorch's CPU-only builds lack it")

import triton
from mmae_fast.kernels import configs

from . import triton_compile

TESTS = Path(__file__).parent


def version(module):
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def interpret(*arguments):
    if version(triton) < (3, 7) and version(numpy) >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 turns arrays into numbers as numpy < 2.4 allows")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(
        [*command, str(TESTS / "triton_interpreter.py"), *arguments],
        cwd=TESTS.parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 0


def test_in_the_interpreter():
    interpret("-m", "not slow")


@pytest.mark.slow
def test_more_in_the_interpreter():
    interpret("-m", "slow")


def compiled(arch, names):
    budget = json.loads(triton_compile.BUDGET.read_text())
    wrong = []
    for name, case in triton_compile.cases(arch).items():
        if name in names:
            found = triton_compile.compile_case(case, arch)
            wrong += triton_compile.problems(name, arch, case, found, budget)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("arch", triton_compile.ARCHITECTURES)
def test_machine_code(arch):
    """No spills, shared memory that fits, tensor-core instructions, registers within the budget."""
    names = triton_compile.QUICK[arch]
    assert set(names) <= set(triton_compile.cases(arch))
    compiled(arch, names)


@pytest.mark.slow
@pytest.mark.parametrize("arch", triton_compile.ARCHITECTURES)
def test_all_machine_code(arch):
    compiled(arch, set(triton_compile.cases(arch)) - set(triton_compile.QUICK[arch]))


def test_the_gates_shut():
    name, case = next(iter(triton_compile.cases(90).items()))
    budget = json.loads(triton_compile.BUDGET.read_text())
    found = budget["sm"]["90"][name]
    check = lambda **changed: triton_compile.problems(  # noqa: E731
        name, 90, case, found | changed, budget | {"triton": triton_compile.triton.__version__}
    )
    assert not check()
    for changed in (
        {"stack": 8},
        {"spills": 1},
        {"shared": configs.SHARED_BYTES + 1},
        {"tensor_core": []},
        {"registers": found["registers"] + 1},
    ):
        assert len(check(**changed)) >= 1, changed
    assert triton_compile.problems("gram of fp4", 90, case, found, budget)


def test_the_page_has_the_budget():
    text = triton_compile.PAGE.read_text()
    assert triton_compile.table(json.loads(triton_compile.BUDGET.read_text())) in text


def test_refusals(monkeypatch):
    reason = dispatch.refusal("triton", "cpu")
    assert reason == "it serves CUDA tensors, and z is on 'cpu'"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    capabilities = {0: (8, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)
    assert "compute capability 8.0, and cuda:1 has 7.5" in dispatch.refusal("triton", "cuda")
    capabilities[1] = (12, 0)
    assert dispatch.refusal("triton", "cuda") is None
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton cannot be imported" in dispatch.refusal("triton", "cuda")
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: it serves CUDA"):
        fast_coding_rate(torch.eye(3), 1.0, backend="triton")


def test_precision_reaches_the_backend():
    assert dispatch.select_backend("triton", "cuda") == "triton"
    assert dispatch.select_backend("triton", "cuda", "high") == "triton:high"
    assert dispatch.select_backend("torch", "cuda", "high") == "torch"
    assert dispatch.select_backend("auto", "cpu", "medium") == "cpu"
    module = dispatch.module("triton:high")
    names = [n for n in vars(dispatch.module("torch")) if n.endswith(("_fwd", "_bwd"))]
    public = [n for n in names if not n.startswith("_")]
    assert len(public) >= 9 and all(callable(getattr(module, n)) for n in public)


def test_named_gpu_backends_under_compile():
    """Dynamo cannot look into imports, which the ladder makes."""

    @torch.compile(fullgraph=True, backend="eager")
    def ask(x):
        return x + sum(dispatch.refusal(b, "cuda") is None for b in ("cuda", "triton"))

    ask(torch.zeros(1))


def test_search(monkeypatch):
    """Only if asked for; the fastest candidate, once per key."""
    default = configs.SMALL[90]
    assert configs.choose("key", default, None) is default
    monkeypatch.setattr(configs, "AUTOTUNE", True)
    monkeypatch.setattr(configs, "_found", {})
    timed = []
    monkeypatch.setattr(configs, "seconds", lambda launch: launch())

    def launch(config):
        timed.append(config)
        return abs(config.block - 128) + config.depth + config.stages

    best = configs.choose("key", default, launch)
    assert best == min(configs.CANDIDATES, key=launch) and best.block == 128
    del timed[:]
    assert configs.choose("key", default, launch) == best and not timed


def test_tables_are_complete():
    for arch in triton_compile.ARCHITECTURES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for order in (1, 256, 257, 10**5):
                for samples, center in itertools.product((True, False), repeat=2):
                    configs.gram(dtype, order, samples, center, arch)
                configs.product(dtype, order, order, arch)
            largest = configs.largest_coding_rate(dtype, False, arch)
            for order in (1, 16, 17, 33, 64, 65, 128):
                assert order > largest or configs.coding_rate(order).block >= order
