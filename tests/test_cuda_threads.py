"""The CUDA kernels on threads of the host, judged by ThreadSanitizer: a few cases of what
`python tests/sanitize.py cuda` runs in full.
"""

import subprocess
import sys

import pytest

from . import sanitize


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thread_sanitizer")
    source, probe = folder / "probe.cpp", folder / "probe"
    source.write_text("int main() {}\n")
    if not sys.platform.startswith("linux"):
        pytest.skip("ThreadSanitizer's annotations are used on Linux only")
    commands = [[sanitize.COMPILER, *sanitize.THREAD, str(source), "-o", str(probe)], [str(probe)]]
    for (
        command
    ) in commands:  # the second fails where memory is laid out more randomly than it knows
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            pytest.skip(f"ThreadSanitizer does not work here: {reason.strip()[-300:]}")
    return sanitize.cuda_program()


def test_no_races(program):
    result = sanitize.run([program, "quick"], quiet=True, timeout=sanitize.HANGS)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


def test_planted_races_are_reported(program):
    for planted in ("shuffle", "blocks"):
        sanitize.expect_race(program, planted)
    barriers = dict(reversed(list(sanitize.cuda_barriers())))  # the first of each file
    for kernel, file in (("spectral", "sweep"), ("packed", "sweep"), ("jacobi", "jacobi")):
        where = barriers[f"{file}.cuh"]
        sanitize.expect_race(program, "quick", kernel, f"without={where}")
