"""The vendor's batched eigensolver, cusolverDnXsyevBatched (CUDA 12.6.2 or newer), by ctypes.

PyTorch does not offer it by name, and it is the strongest baseline for von Neumann entropies of
many small matrices. ``python -m benchmarks.vendor`` checks it against ``torch.linalg.eigh``; a
wrong call can end the process, so benchmarks/gpu.py runs that in a process of its own first.
"""

import ctypes
import functools
import glob
import os
import sys

import torch
from torch import Tensor

_VECTORS, _LOWER, _FLOAT32, _FLOAT64 = 1, 0, 0, 1  # of cusolver_common.h and library_types.h
_int, _long, _size, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p
_COMMON = [_pointer, _pointer, _int, _int, _long, _int, _pointer, _long, _int, _pointer, _int]


@functools.cache
def library() -> ctypes.CDLL:
    """libcusolver, the one that PyTorch brought or the toolkit's. Needs no GPU.

    Raises:
        OSError: there is none, or it is too old.
    """
    roots = [os.path.join(path, "nvidia", "*", "lib") for path in sys.path if path]
    roots += [os.path.join(os.path.dirname(torch.__file__), "lib"), "/usr/local/cuda/lib64"]
    names = [name for root in roots for name in sorted(glob.glob(f"{root}/libcusolver.so.*"))]
    for name in [*names, "libcusolver.so.12", "libcusolver.so.11"]:
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        if hasattr(found, "cusolverDnXsyevBatched"):
            found.cusolverDnXsyevBatched_bufferSize.argtypes = [
                *_COMMON, ctypes.POINTER(_size), ctypes.POINTER(_size), _long
            ]  # fmt: skip
            found.cusolverDnXsyevBatched.argtypes = [
                *_COMMON, _pointer, _size, _pointer, _size, _pointer, _long
            ]  # fmt: skip
            found.cusolverDnSetStream.argtypes = [_pointer, _pointer]
            return found
    raise OSError("no libcusolver with cusolverDnXsyevBatched (CUDA 12.6.2 or newer)")


def _check(status: int, call: str) -> None:
    if status:
        raise RuntimeError(f"{call} returned cusolverStatus {status}")


@functools.cache
def _handle() -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    handle, params = _pointer(), _pointer()
    _check(library().cusolverDnCreate(ctypes.byref(handle)), "cusolverDnCreate")
    _check(library().cusolverDnCreateParams(ctypes.byref(params)), "cusolverDnCreateParams")
    return handle, params


def eigh_batched(a: Tensor, vectors: bool = True) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues ``(batch, k)`` and eigenvectors ``(batch, k, k)``, one per row.

    a: symmetric, ``(batch, k, k)``, float32 or float64, CUDA. Without vectors the second is junk.
    """
    a = a.contiguous().clone()  # overwritten
    batch, k, _ = a.shape
    lam = a.new_empty(batch, k)
    info = torch.empty(batch, dtype=torch.int32, device=a.device)
    handle, params = _handle()
    dtype = _FLOAT32 if a.dtype == torch.float32 else _FLOAT64
    stream = torch.cuda.current_stream(a.device).cuda_stream
    _check(library().cusolverDnSetStream(handle, stream), "cusolverDnSetStream")
    common = (handle, params, int(vectors) * _VECTORS, _LOWER, k, dtype, a.data_ptr(), k)
    common += (dtype, lam.data_ptr(), dtype)
    device_bytes, host_bytes = _size(), _size()
    status = library().cusolverDnXsyevBatched_bufferSize(
        *common, ctypes.byref(device_bytes), ctypes.byref(host_bytes), batch
    )
    _check(status, "cusolverDnXsyevBatched_bufferSize")
    work = torch.empty(max(device_bytes.value, 1), dtype=torch.uint8, device=a.device)
    host = ctypes.create_string_buffer(max(host_bytes.value, 1))
    status = library().cusolverDnXsyevBatched(
        *common, work.data_ptr(), device_bytes, host, host_bytes, info.data_ptr(), batch
    )
    _check(status, "cusolverDnXsyevBatched")
    return lam, a  # column-major vectors: rows of the row-major tensor


class _VonNeumann(torch.autograd.Function):
    """Entropy of a density matrix with the derivative -(log rho + I), as one would write it."""

    @staticmethod
    def forward(ctx, rho):
        flat = rho.detach().reshape(-1, *rho.shape[-2:])
        lam, rows = eigh_batched(flat, ctx.needs_input_grad[0])
        lam = lam.clamp(min=1e-12)
        ctx.save_for_backward(lam, rows)
        return -torch.special.xlogy(lam, lam).sum(-1).reshape(rho.shape[:-2])

    @staticmethod
    def backward(ctx, grad):
        lam, rows = ctx.saved_tensors
        f = -(lam.log() + 1) * grad.reshape(-1, 1)
        out = rows.mT @ (f.unsqueeze(-1) * rows)
        return out.reshape(*grad.shape, *rows.shape[-2:])


def batched_von_neumann(rho: Tensor) -> Tensor:
    return _VonNeumann.apply(rho)


def _self_check() -> None:
    for k in (5, 33, 64, 100):
        a = torch.randn(7, k, k, device="cuda", dtype=torch.float64)
        a = a @ a.mT
        lam, rows = eigh_batched(a)
        torch.testing.assert_close(lam, torch.linalg.eigvalsh(a))
        torch.testing.assert_close(rows.mT @ (lam.unsqueeze(-1) * rows), a)
        values, _ = eigh_batched(a.float(), vectors=False)
        torch.testing.assert_close(values.double(), lam, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    _self_check()
    print("cusolverDnXsyevBatched agrees with torch.linalg.eigh")
