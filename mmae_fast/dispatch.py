"""Which backend serves a call: one readable ladder, which can say why it refused a step.

A backend is a module with the functions ``gram``, ``gram_bwd``, ``matrix_entropy_fwd``,
``rational_entropy_fwd``, ``coding_rate_fwd``, ``weight_bwd``, ``joint_entropy_fwd``,
``samples_bwd``, ``gram_entropy_fwd``, ``gram_rational_entropy_fwd``, ``gram_coding_rate_fwd``,
``matrix_log_fwd`` and ``matrix_log_bwd`` (torch_backend.py documents them).
"""

import functools
import importlib
from types import ModuleType

# In order of preference; "auto" takes the first that serves the call, of those measured to be the
# right choice: the CUDA kernels have not run on a GPU yet, and are taken by name only.
BACKENDS = ("cuda", "triton", "cpu", "torch")
UNMEASURED = ("cuda",)


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
    if backend == "cuda":
        return importlib.import_module("mmae_fast.cuda_backend").EXTENSION_ERROR
    return 'this version has no kernels for it yet; use backend="auto" (PyTorch\'s CUDA libraries)'


def select_backend(backend: str, device_type: str) -> str:
    """The backend that serves a call. Pure: depends on its arguments and the installation alone.

    Raises:
        ValueError: unknown name.
        RuntimeError: the named backend cannot serve this device, with the reason.
    """
    if backend == "auto":
        return next(
            name
            for name in BACKENDS
            if name not in UNMEASURED and refusal(name, device_type) is None
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")
    reason = refusal(backend, device_type)
    if reason:
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    return backend


@functools.cache
def module(backend: str) -> ModuleType:
    return importlib.import_module(f"mmae_fast.{backend}_backend")
