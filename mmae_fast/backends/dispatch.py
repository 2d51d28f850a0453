"""Which backend serves a call: one readable ladder, which can say why it refused a step.

A backend is a module with the functions ``gram``, ``gram_bwd``, ``matrix_entropy_fwd``,
``rational_entropy_fwd``, ``coding_rate_fwd``, ``weight_bwd``, ``joint_entropy_fwd``,
``samples_bwd``, ``gram_entropy_fwd``, ``gram_rational_entropy_fwd``, ``gram_coding_rate_fwd``,
``matrix_log_fwd`` and ``matrix_log_bwd`` (torch_backend.py documents them).
"""

import functools
import importlib
from types import ModuleType

import torch

# In order of preference; "auto" takes the first that serves the call, of those measured to be the
# right choice: the CUDA and Triton kernels have not run on a GPU yet, and are taken by name only.
BACKENDS = ("cuda", "triton", "cpu", "torch")
UNMEASURED = ("cuda", "triton")
# Those that compute faster where float32 products may be less precise.
LOWER_PRECISION = ("cuda", "triton")


try:
    importlib.import_module("mmae_fast._C")
    EXTENSION_ERROR = None
except (ImportError, OSError) as error:
    EXTENSION_ERROR = (
        f"the compiled extension did not load ({error}); reinstall with"
        " `pip install --no-build-isolation .` (a C++ compiler is needed)"
    )


def refusal(backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot serve tensors on this device type, or None if it can."""
    if backend == "torch":
        return None
    if backend == "cpu":
        if device_type != "cpu":
            return f"it serves CPU tensors, and z is on {device_type!r}"
        return EXTENSION_ERROR
    if device_type != "cuda":
        return f"it serves CUDA tensors, and z is on {device_type!r}"
    answer = _cuda_refusal if backend == "cuda" else _triton_refusal
    if torch.compiler.is_compiling():
        from ..eager import constant

        return constant(answer)
    return answer()


def _cuda_refusal() -> str | None:
    return importlib.import_module("mmae_fast.backends.cuda_backend").EXTENSION_ERROR


def _triton_refusal() -> str | None:
    try:
        importlib.import_module("triton")
    except (ImportError, OSError) as error:
        return f"triton cannot be imported ({error}); builds of PyTorch for cuda on Linux bring it"
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        if major < 8:
            return (
                f"its kernels need compute capability 8.0, and cuda:{i} has {major}.{minor}"
                " (CUDA_VISIBLE_DEVICES chooses among several)"
            )
    return None


def select_backend(backend: str, device_type: str, precision: str = "highest") -> str:
    """What serves a call: a backend's name, with ``:precision`` if it has a use for another one.

    Pure: depends on its arguments and the installation alone.

    Raises:
        ValueError: unknown name.
        RuntimeError: the named backend cannot serve this device, with the reason.
    """
    if backend == "auto":
        backend = next(
            name
            for name in BACKENDS
            if name not in UNMEASURED and refusal(name, device_type) is None
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")
    reason = refusal(backend, device_type)
    if reason:
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    lower = precision != "highest" and backend in LOWER_PRECISION
    return f"{backend}:{precision}" if lower else backend


@functools.cache
def module(selected: str) -> ModuleType:
    """The functions of what :func:`select_backend` returned."""
    backend, _, precision = selected.partition(":")
    found = importlib.import_module(f"mmae_fast.backends.{backend}_backend")
    return found.at(precision) if precision else found
