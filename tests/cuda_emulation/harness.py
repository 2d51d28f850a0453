"""Builds the emulator on first use; the operators of csrc/cuda_ops.cpp, on CPU tensors."""

import functools
import hashlib
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch

from mmae_fast import reference
from mmae_fast.backends import cuda_backend

from ..accuracy import by_operator, check_operator

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COMPILER = os.environ.get("CXX") or "g++"
CANARY = -12345.0
GUARD = 8  # elements before and after every output

needs_emulator = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which(COMPILER) is None,
    reason=f"the emulator needs Linux and a C++ compiler ({COMPILER})",
)


@functools.cache
def emulator():
    """The compiled binding, rebuilt when a source changes."""
    pybind11 = pytest.importorskip("pybind11")
    sources = [*(ROOT / "csrc" / "cuda").glob("*.*h"), ROOT / "csrc" / "cpu" / "api.h"]
    sources += [*HERE.glob("*.h"), HERE / "binding.cpp"]
    text = b"".join(path.read_bytes() for path in sorted(sources)) + sys.version.encode()
    name = f"cuda_emulation_{hashlib.sha256(text).hexdigest()[:16]}"
    folder = ROOT / "build" / "cuda_emulation"
    library = folder / f"{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        building = library.with_suffix(f".{os.getpid()}")  # other test processes may build it too
        includes = [ROOT / "csrc", HERE, pybind11.get_include()]
        includes.append(sysconfig.get_paths()["include"])
        command = [COMPILER, "-O1", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-w"]
        command += [f"-DMODULE_NAME={name}", *(f"-I{path}" for path in includes)]
        command += [str(HERE / "binding.cpp"), "-o", str(building)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        building.rename(library)
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Output:
    """An output between guards, full of a value that no kernel computes."""

    def __init__(self, shape, dtype):
        count = math.prod(shape)
        self.memory = torch.full((count + 2 * GUARD,), CANARY, dtype=dtype)
        self.tensor = self.memory[GUARD : GUARD + count].view(shape)

    def address(self):
        return self.tensor.data_ptr() if self.tensor.numel() else 0

    def finished(self, written=True):
        outside = torch.cat([self.memory[:GUARD], self.memory[-GUARD:]])
        assert (outside == self.memory.new_tensor(CANARY)).all(), "written outside of an output"
        if written:
            untouched = self.tensor == self.memory.new_tensor(CANARY)
            assert not untouched.any(), "part of an output was not written"
        return self.tensor.clone()


class Ops:
    """The operators of csrc/cuda_ops.cpp on CPU tensors."""

    def __init__(self, seed=0):
        self.seed = seed
        self.solver = True  # whether the vendor's batched eigensolver is there
        self.fused = True  # False: by way of the Gram matrix also where one kernel would do
        self.shared = 227 * 1024  # bytes that a block of the GPU in mind may have
        self.launches = []  # (blocks, threads, shared bytes) of every kernel

    def describe(self, z, mask, normalize, center):
        code = (torch.float32, torch.float64, torch.bfloat16, torch.float16).index(z.dtype)
        address, strides = (0, []) if mask is None else (mask.data_ptr(), mask.stride())
        return emulator().Features(
            z.data_ptr(), code, z.shape, z.stride(), address, strides, normalize, center
        )

    def output(self, z, *shape, dtype=None):
        dtype = dtype or reference.accumulation_dtype(z.dtype)
        return Output(z.shape[:-2] + shape, dtype)

    def measure(self, is_rate, scale, alpha, z, mask, normalize, center, need_weight, tf32):
        n, d = z.shape[-2:]
        k = min(n, d)
        value, weight = self.output(z), self.output(z, k, k)
        parts = ((k, k), (n,), (d,), (n,), (1,))
        is_double = z.dtype == torch.float64
        if self.fused and not emulator().needs_scratch(is_rate, alpha, k, is_double):
            parts = ()
        scratch = [self.output(z, *part) for part in parts]
        self.launches += emulator().measure(
            self.describe(z, mask, normalize, center),
            is_rate,
            scale,
            alpha,
            tf32,
            value.address(),
            # A batch of 0 x 0 weights has no address; any but null says that it is wanted.
            (weight.address() or 1) if need_weight else 0,
            [part.address() for part in scratch] or [0] * 5,
            self.seed,
        )
        for part in scratch:
            part.finished(written=False)
        return value.finished(), weight.finished() if need_weight else z.new_empty(0)

    def cuda_coding_rate(self, z, mask, scale, *options):
        return self.measure(True, scale, 0.0, z, mask, *options)

    def cuda_entropy(self, z, mask, alpha, *options):
        return self.measure(False, 0.0, alpha, z, mask, *options)

    def cuda_gram_entropy(self, g, alpha, need_weight):
        assert g.is_contiguous()
        k = g.shape[-1]
        value, weight = self.output(g), self.output(g, k, k)
        f = self.describe(g, None, False, False)
        wanted = (weight.address() or 1) if need_weight else 0
        self.launches += emulator().gram_entropy(f, alpha, value.address(), wanted, self.seed)
        return value.finished(), weight.finished() if need_weight else g.new_empty(0)

    def cuda_gram(self, z, mask, samples, normalize, center, tf32):
        n, d = z.shape[-2:]
        k = n if samples else d
        outputs = self.output(z, k, k), self.output(z, n), self.output(z, d)
        addresses = [output.address() for output in outputs]
        f = self.describe(z, mask, normalize, center)
        self.launches += emulator().gram(f, samples, tf32, *addresses, self.seed)
        return tuple(output.finished() for output in outputs)

    def cuda_weight_bwd(self, grad, z, mask, weight, normalize, center):
        assert grad.is_contiguous() and weight.is_contiguous()
        n, d = z.shape[-2:]
        scale, mean = self.output(z, n), self.output(z, d)
        grad_z = self.output(z, n, d, dtype=z.dtype)
        self.launches += emulator().weight_bwd(
            self.describe(z, mask, normalize, center),
            *(t.data_ptr() for t in (grad, weight)),
            *(output.address() for output in (scale, mean, grad_z)),
            self.seed,
        )
        scale.finished(written=False), mean.finished(written=False)
        return grad_z.finished()

    def cuda_eigh_(self, a, vectors):
        lam, columns = torch.linalg.eigh(a)
        if vectors:
            a.copy_(columns.mT)
        self.launches.append("eigh")
        return lam, torch.zeros(a.shape[:-2], dtype=torch.int32)

    def cuda_has_solver(self):
        return self.solver

    def cuda_max_order(self, is_rate, alpha, is_double, device):
        return emulator().max_order(is_rate, alpha, is_double, self.shared)


@pytest.fixture(name="ops", autouse=True)
def emulated(monkeypatch):
    """The Python backend on top of the emulated operators."""
    operators_of_host = Ops()
    monkeypatch.setattr(cuda_backend, "_ops", operators_of_host)
    return operators_of_host


fast = partial(by_operator, backend="cuda")
check = partial(check_operator, backend="cuda")
