"""The choice of backend and of instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmae_fast import fast_coding_rate
from mmae_fast.backends import dispatch
from mmae_fast.backends.dispatch import BACKENDS, UNMEASURED, module, refusal, select_backend

ACCURACY = Path(__file__).parent / "accuracy.py"


def test_auto_takes_the_first_backend_that_serves():
    assert select_backend("auto", "cpu") == "cpu"
    for device in ("cpu", "cuda", "meta", "mps"):
        chosen = select_backend("auto", device)
        assert refusal(chosen, device) is None
        earlier = BACKENDS[: BACKENDS.index(chosen)]
        assert all(refusal(name, device) or name in UNMEASURED for name in earlier)


def test_torch_serves_every_device():
    for device in ("cpu", "cuda", "meta", "mps"):
        assert refusal("torch", device) is None
        assert select_backend("torch", device) == "torch"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_named_backend_is_taken_or_refused_with_the_reason(backend):
    for device in ("cpu", "cuda", "meta"):
        reason = refusal(backend, device)
        if reason is None:
            assert select_backend(backend, device) == backend
        else:
            with pytest.raises(RuntimeError) as caught:
                select_backend(backend, device)
            assert str(caught.value) == f"backend {backend!r} is not available: {reason}"
            assert device in reason or "this version" in reason


@pytest.mark.parametrize("backend", ["", "CPU", "rocm", "Auto"])
def test_unknown_backend(backend):
    with pytest.raises(ValueError, match=rf"one of .*'cpu', 'torch'.*, got {backend!r}"):
        select_backend(backend, "cpu")


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_backends_have_one_interface(backend):
    functions = ["gram", "gram_bwd", "matrix_entropy_fwd", "coding_rate_fwd", "weight_bwd"]
    functions += ["rational_entropy_fwd", "joint_entropy_fwd", "samples_bwd", "gram_entropy_fwd"]
    functions += ["gram_rational_entropy_fwd", "gram_coding_rate_fwd"]
    functions += ["matrix_log_fwd", "matrix_log_bwd"]
    assert all(callable(getattr(module(backend), name)) for name in functions)


def test_meta_tensors_have_shapes_only():
    value = fast_coding_rate(torch.empty(2, 3, 4, device="meta"), 1.0)
    assert value.shape == (2,) and value.device.type == "meta"


WITHOUT_EXTENSION = """
import sys
sys.modules["mmae_fast._C"] = None  # makes the import fail, as in an installation without it
import torch, mmae_fast
z = torch.eye(3, 5)
assert abs(mmae_fast.fast_coding_rate(z, 1.0).item() - 2.0794415) < 1e-5
try:
    mmae_fast.fast_coding_rate(z, 1.0, backend="cpu")
except RuntimeError as error:
    print(error)
"""


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_without_the_extension_pytorch_serves():
    result = python("-c", WITHOUT_EXTENSION)
    assert result.returncode == 0, result.stderr
    assert "backend 'cpu' is not available: the compiled extension did not load" in result.stdout
    assert "pip install" in result.stdout


def test_loaded_extension_has_no_error():
    assert dispatch.EXTENSION_ERROR is None


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_accuracy_of_every_instruction_set(isa):
    result = python(str(ACCURACY), MMAE_FAST_ISA=isa, OMP_NUM_THREADS="1")
    if "MMAE_FAST_ISA" in result.stderr and "RuntimeError" in result.stderr:
        assert isa != "baseline", "the baseline runs everywhere"
        pytest.skip(f"this machine or build has no {isa}: {result.stderr.splitlines()[-1]}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split()[-1] == isa


def test_unknown_instruction_set():
    code = "import torch, mmae_fast; mmae_fast.fast_gram(torch.eye(3))"
    result = python("-c", code, MMAE_FAST_ISA="mmx")
    assert result.returncode != 0
    assert "RuntimeError" in result.stderr and "MMAE_FAST_ISA=mmx" in result.stderr


def test_the_widest_instruction_set_is_the_default():
    assert "MMAE_FAST_ISA" not in os.environ, "the suite tests the default: unset MMAE_FAST_ISA"
    chosen = torch.ops.mmae_fast.cpu_isa()
    capability = torch.backends.cpu.get_cpu_capability()
    assert chosen in ("baseline", "avx2", "avx512")
    if capability in ("AVX2", "AVX512"):
        assert chosen == capability.lower()
