"""Builds the compiled extensions. Metadata is in pyproject.toml.

The CPU one is always built. The CUDA one follows MMAE_FAST_CUDA: ``auto`` (default) builds it when
the CUDA toolkit is found, ``0`` never, ``1`` always. CUDA_HOME names the toolkit, the list
TORCH_CUDA_ARCH_LIST the GPUs (as in ``8.0;9.0a+PTX``); no GPU is needed to build.
Both use PyTorch's stable ABI, so that one abi3 wheel serves every torch >= 2.11.
"""

import glob
import os
import re
import shutil
import subprocess
import sys

from setuptools import setup

# The oldest torch (2.11.0, as torch/headeronly/version.h encodes it) and Python of the binary.
TARGET = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"]
# Machine code for A100 and its relatives, H100, B200, RTX 50; PTX of the oldest for all others.
ARCHITECTURES = ("80+PTX", "90a", "100", "120")
NVCC_FLAGS = "-O3 -std=c++17 --expt-relaxed-constexpr -Icsrc -Xcompiler -fPIC,-fvisibility=hidden"
NINJA = """builddir = {folder}
rule nvcc
  command = {command} --threads 4 -MD -MF $out.d -c $in -o $out
  depfile = $out.d
"""


def find_toolkit():
    """(nvcc, folder of the static runtime), or (None, why there is no toolkit)."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)][:1]
    if not homes:
        nvcc = shutil.which("nvcc")  # may be a wrapper script that lies outside of its toolkit
        homes = [os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))] if nvcc else []
        homes += ["/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True)]
    parts = ("bin/nvcc", "include/cuda_runtime.h", "include/cuda_bf16.h", "lib*/libcudart_static.a")
    for home in homes:
        found = [glob.glob(f"{home}/{p}") + glob.glob(f"{home}/targets/*/{p}") for p in parts]
        if all(found):
            return found[0][0], os.path.dirname(found[3][0])
    return None, f"no CUDA toolkit ({', '.join(parts)}) in {' or '.join(homes)}"


def architecture_flags(nvcc):
    """-gencode flags for TORCH_CUDA_ARCH_LIST, or for the part of ARCHITECTURES nvcc knows."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    names = re.findall(r"[^;,\s]+", wanted)
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True)
    flags = []
    for name in names or ARCHITECTURES:
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", name)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must read like 8.0;9.0a+PTX, got {wanted!r}")
        number, ptx = match[1] + match[2], match[4]
        if names or f"compute_{number}" in known.stdout.split():
            arch = number + match[3]
            flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
            flags += [f"-gencode=arch=compute_{arch},code=compute_{arch}"] if ptx else []
    return flags


def compile_cuda(nvcc, folder="build/cuda"):
    """Object files of csrc/cuda/*.cu; ninja remakes those whose sources or flags have changed."""
    objects = {f"{folder}/{os.path.basename(s)}.o": s for s in sorted(glob.glob("csrc/cuda/*.cu"))}
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/build.ninja", "w") as file:
        command = " ".join([nvcc, NVCC_FLAGS, *architecture_flags(nvcc)])
        file.write(NINJA.format(folder=folder, command=command))
        file.writelines(f"build {target}: nvcc {source}\n" for target, source in objects.items())
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    if subprocess.run([sys.executable, "-m", "ninja", "-f", file.name, *jobs]).returncode:
        raise SystemExit("nvcc failed, see above; MMAE_FAST_CUDA=0 installs without CUDA kernels")
    return list(objects)


def extension(name, sources, **arguments):
    from torch.utils.cpp_extension import CppExtension

    flags = ["-O3", "-std=c++17", "-Wno-psabi", "-fvisibility=hidden", *TARGET]
    flags += ["-fno-math-errno", "-fno-trapping-math"]  # let square roots and selects be vectors
    flags += ["-Wno-unused-command-line-argument"] * (sys.platform == "darwin")
    arguments |= {"include_dirs": [os.path.abspath("csrc")], "py_limited_api": True}
    return CppExtension(name, sources, extra_compile_args={"cxx": flags}, **arguments)


def extensions():
    mode = os.environ.get("MMAE_FAST_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"MMAE_FAST_CUDA must be auto, 0 or 1, got {mode!r}")
    found = [extension("mmae_fast._C", sorted(["csrc/ops.cpp", *glob.glob("csrc/cpu/*.cpp")]))]
    nvcc, runtime = find_toolkit() if mode != "0" else (None, None)
    if mode == "1" and not nvcc:
        raise SystemExit(f"MMAE_FAST_CUDA=1: {runtime}")
    if nvcc:
        link = {"library_dirs": [runtime], "libraries": ["cudart_static", "rt", "pthread", "dl"]}
        found.append(extension("mmae_fast._C_cuda", ["csrc/cuda_ops.cpp"], **link))
        found[-1].nvcc = nvcc
    return found


def build_ext():
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, extension):
            if hasattr(extension, "nvcc"):
                extension.extra_objects = compile_cuda(extension.nvcc)
            super().build_extension(extension)

    return Build.with_options(use_ninja=True)


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": build_ext()},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
