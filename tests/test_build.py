"""The build: what MMAE_FAST_CUDA means, which toolkit and GPUs, what ships, what nvcc makes."""

import importlib.util
import re
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mmae_fast.backends import cuda_backend

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def setup():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("mmae_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("MMAE_FAST_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)


def fake_toolkit(folder, nvcc="echo compute_80; echo compute_90; echo compute_110", leave_out=""):
    """A folder that looks like a toolkit; its nvcc is a shell script."""
    files = [
        "bin/nvcc",
        "include/cuda_runtime.h",
        "include/cuda_bf16.h",
        "lib64/libcudart_static.a",
    ]
    for name in files:
        if name != leave_out:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#!/bin/sh\n{nvcc}\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(folder)


@pytest.mark.parametrize("value", ["", "yes", "2", "AUTO"])
def test_mode_is_checked(setup, monkeypatch, value):
    monkeypatch.setenv("MMAE_FAST_CUDA", value)
    with pytest.raises(SystemExit, match=f"must be auto, 0 or 1, got {value!r}"):
        setup.extensions()


def test_mode_decides_what_is_built(setup, monkeypatch, tmp_path):
    pytest.importorskip("torch.utils.cpp_extension")
    monkeypatch.setenv("CUDA_HOME", fake_toolkit(tmp_path / "whole"))
    cpu, cuda = ["mmae_fast._C"], ["mmae_fast._C", "mmae_fast._C_cuda"]
    for mode, names in (("0", cpu), ("1", cuda), ("auto", cuda)):
        monkeypatch.setenv("MMAE_FAST_CUDA", mode)
        assert [extension.name for extension in setup.extensions()] == names
    assert "cudart_static" in setup.extensions()[1].libraries
    assert not {"cudart", "torch_cuda", "c10_cuda"} & set(setup.extensions()[1].libraries)

    monkeypatch.setenv(
        "CUDA_HOME", fake_toolkit(tmp_path / "part", leave_out="include/cuda_bf16.h")
    )
    assert [extension.name for extension in setup.extensions()] == cpu
    monkeypatch.setenv("MMAE_FAST_CUDA", "1")
    with pytest.raises(
        SystemExit, match=r"MMAE_FAST_CUDA=1: no CUDA toolkit \(.*cuda_bf16.h.*part"
    ):
        setup.extensions()


def test_wrapper_on_the_path(setup, monkeypatch, tmp_path):
    """An nvcc outside of its toolkit is not taken for one; a link into a toolkit is followed."""
    home = fake_toolkit(tmp_path / "toolkit")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(
        setup.glob,
        "glob",
        lambda pattern, glob=setup.glob.glob: [] if pattern.startswith("/usr") else glob(pattern),
    )
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    nvcc, reason = setup.find_toolkit()
    assert nvcc is None and str(tmp_path) in reason and "/usr/local/cuda" in reason
    wrapper.unlink()
    wrapper.symlink_to(f"{home}/bin/nvcc")
    assert setup.find_toolkit() == (f"{home}/bin/nvcc", f"{home}/lib64")


def test_architectures(setup, monkeypatch, tmp_path):
    nvcc = fake_toolkit(tmp_path) + "/bin/nvcc"
    default = [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]  # and neither 100 nor 120, which this nvcc does not know
    assert setup.architecture_flags(nvcc) == default
    for value, flags in (
        ("", default),
        (" ; ", default),
        ("9.0a", default[2:]),
        ("8.0+PTX;9.0a", default),
        ("8.0+PTX 9.0a;", default),
        ("12.0f", ["-gencode=arch=compute_120f,code=sm_120f"]),
    ):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
        assert setup.architecture_flags(nvcc) == flags
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match=r"must read like 8\.0;9\.0a\+PTX, got 'Hopper'"):
        setup.architecture_flags(nvcc)


def test_failed_compilation_stops_the_build(setup, monkeypatch, tmp_path, capfd):
    pytest.importorskip("ninja")
    nvcc = fake_toolkit(
        tmp_path, "echo compute_80; echo no such luck >&2; test $1 = --list-gpu-arch"
    )
    with pytest.raises(SystemExit, match="MMAE_FAST_CUDA=0 installs without"):
        setup.compile_cuda(f"{nvcc}/bin/nvcc", str(tmp_path / "objects"))
    assert "no such luck" in "".join(capfd.readouterr())


def test_setup_is_short_and_imports_no_torch():
    text = (ROOT / "setup.py").read_text()
    assert len(text.splitlines()) < 120
    assert not re.search(r"^(import|from) torch", text, re.MULTILINE)


def test_kernels_include_neither_torch_nor_launches():
    for path in (ROOT / "csrc" / "cuda").iterdir():
        text = path.read_text()
        if path.name not in ("launcher.cuh",):
            assert "<<<" not in text, path
        if path.name != "tensors.h":
            assert "torch/" not in text and "ATen" not in text, path
    assert "ATen/cuda" not in (ROOT / "csrc" / "cuda_ops.cpp").read_text()


def test_sdist_has_every_source(monkeypatch, tmp_path):
    monkeypatch.setenv("MMAE_FAST_CUDA", "0")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist"]
    subprocess.run([*command, "-d", str(tmp_path)], check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {member.name.partition("/")[2] for member in archive}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    sources += (ROOT / "mmae_fast").rglob("*.py")  # pyproject.toml lists the packages
    assert {str(path.relative_to(ROOT)) for path in sources} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "kernels/__init__.py"} <= names


def test_missing_extension_is_explained():
    """Importing the backend never fails: a machine without CUDA gets a reason."""
    error = cuda_backend.EXTENSION_ERROR
    assert error is None or "MMAE_FAST_CUDA=1" in error
