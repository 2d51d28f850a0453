"""``make gpu``: build, test, measure and sanitise on the GPU at hand, offline, in eight minutes.

    python3 -m benchmarks.gpu                      all steps
    python3 -m benchmarks.gpu build tests          some of them; they share the same eight minutes

Needs a CUDA build of PyTorch, a C++ compiler, pytest; and whatever is missing is said. Each step
runs in processes of its own with a time limit, is reported as PASS or FAIL, and a failed one does
not stop the others. Results go to benchmarks/results/, and to the folder $OUT if that is set.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TOTAL_S = 470.0
# What the steps after the benchmark are left with, of the time that it could use up alone.
RESERVED_S = {"training": 45, "symmetric": 55, "sanitise": 90}
SMALL = ((3, 5, 7), (2, 33, 16), (4, 64, 64), (1, 130, 70), (2, 197, 48), (1, 150, 160))
SMALL_TRITON = SMALL[1:5:2]  # each is a compilation of every kernel


class Report(NamedTuple):
    name: str
    outcome: str  # PASS, FAIL or SKIP
    seconds: float
    note: str


class Steps:
    """Runs the steps and remembers how they went."""

    def __init__(self, total_s: float = TOTAL_S):
        self.start = time.monotonic()
        self.total_s = total_s
        self.reports: list[Report] = []
        # The checkout comes first: an installed copy must not be measured in its place.
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        tools = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]  # ninja is there
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PATH": os.pathsep.join(filter(None, tools)),
            "PYTHONUNBUFFERED": "1",
        }

    def left(self) -> float:
        return self.total_s - (time.monotonic() - self.start)

    def execute(self, command: list[str], limit_s: float, **environment: str) -> str | None:
        """None if the command succeeded, else what went wrong. Output is passed on."""
        limit = min(limit_s, self.left())
        if limit < 5:
            return "no time left"
        print(f"$ {' '.join(command)}", flush=True)
        environment = self.environment | environment
        try:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=os.setpgrp)
        except OSError as error:
            return str(error)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # pytest says what failed so far
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            return f"stopped after {limit:.0f} s"
        finally:  # its children too: a GPU that they hold is not free for the next step
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return None if status == 0 else f"exit status {status}"

    def record(self, name: str, began: float, problem: str | None, note: str = "") -> bool:
        outcome = "FAIL" if problem else "PASS"
        self.reports.append(Report(name, outcome, time.monotonic() - began, problem or note))
        print(f"--- {name}: {outcome} {problem or note}\n", flush=True)
        return problem is None

    def skip(self, name: str, note: str) -> None:
        self.reports.append(Report(name, "SKIP", 0.0, note))
        print(f"--- {name}: SKIP {note}\n", flush=True)

    def step(self, name: str, command: list[str], limit_s: float, **environment: str) -> bool:
        print(f"=== {name}", flush=True)
        began = time.monotonic()
        return self.record(name, began, self.execute(command, limit_s, **environment))


def missing_gpu() -> str | None:
    """Why nothing can be measured here, or None."""
    try:
        import torch
    except ImportError as error:
        return f"PyTorch cannot be imported ({error})"
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        return f"torch.cuda.is_available() is False (PyTorch {torch.__version__}, {built})"
    return None


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def architecture() -> str:
    """Of the GPU at hand, as TORCH_CUDA_ARCH_LIST names it."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' if major == 9 else ''}"


def build(steps: Steps) -> None:
    """Editable install, for this GPU alone; without csrc/cuda if that fails, for Triton's sake."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    install = python("-m", "pip", "install", *options, "-e", ".")
    for name, module, cuda in (("build", "cuda_backend", "1"), ("CPU build", "dispatch", "0")):
        print(f"=== {name}", flush=True)
        began = time.monotonic()
        arch = architecture()
        problem = steps.execute(install, 200, MMAE_FAST_CUDA=cuda, TORCH_CUDA_ARCH_LIST=arch)
        see = f"import sys, mmae_fast.backends.{module} as m; sys.exit(m.EXTENSION_ERROR)"
        problem = problem or steps.execute(python("-c", see), 60)
        if steps.record(name, began, problem, f"sm_{arch.replace('.', '')}" if cuda == "1" else ""):
            return


def tests(steps: Steps) -> None:
    """In several processes where pytest has the plugin; none of them waits for a hanging kernel."""
    command = python("-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider")
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout=100", "--timeout-method=thread"]
    steps.step("tests", command + gpu_tests(), 170)


def gpu_tests() -> list[str]:
    """Files with tests for the GPU. The others may need packages that this machine lacks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if "mark.gpu" in f.read_text()]


def own_backends() -> list[str]:
    """Backends with CUDA kernels of our own."""
    from mmae_fast.backends import dispatch

    return [b for b in ("cuda", "triton") if dispatch.refusal(b, "cuda") is None]


def find_sanitizer() -> str | None:
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = os.pathsep.join(str(Path(root) / "bin") for root in roots if root)
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=places)


def sanitise(steps: Steps) -> None:
    """Our own kernels only: PyTorch's are many, and take the time. What a call of the CUDA runtime
    returned is not reported, as PyTorch and its libraries try calls that may fail."""
    tool = find_sanitizer()
    if tool is None:
        print("=== compute-sanitizer", flush=True)
        steps.record("compute-sanitizer", time.monotonic(), "compute-sanitizer is not installed")
        return
    small = python("-m", "benchmarks.gpu", "--small-cases")
    steps.step("small cases", small, 60)  # fills Triton's cache of compiled kernels
    compiled, triton = ["--kernel-name", "kns=mmae"], ["--kernel-name", "regex=^_[a-z_]+_kernel"]
    # racecheck knows nothing of the order that barriers of asynchronous copies make.
    for name, kernels in (("racecheck", compiled), ("memcheck", compiled + triton)):
        command = [tool, "--tool", name, "--report-api-errors", "no", "--error-exitcode", "1"]
        # Without the caching allocator every tensor is an allocation whose bounds are checked.
        steps.step(name, [*command, *kernels, *small], 90, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def small_cases() -> None:
    """Every quantity, value and gradient, on ragged little inputs: what the sanitizer watches."""
    import torch

    from mmae_fast import fast_coding_rate, fast_matrix_entropy

    from . import cases

    backends = own_backends()
    for batch, n, d in SMALL:
        keep = torch.arange(n, device="cuda") % 5 != 2
        rows = {"center": True, "mask": keep.expand(batch, n) if batch > 1 else keep}
        for dtype in ("float32", "bfloat16"):
            z = cases.make_inputs(cases.Shape(batch, n, d, dtype), "cuda", 1)[0]
            for backend in backends:
                if backend == "triton" and (batch, n, d) not in SMALL_TRITON:
                    continue
                for name, quantity in cases.QUANTITIES.items():
                    function = lambda x, q=quantity, b=backend: q.fast(x, b)  # noqa: E731
                    cases.run(function, z, "fwd+bwd", cases.cotangent(name, z).float())
                if backend == "triton":  # more of them would be compilations
                    continue
                for normalize in (True, False):
                    options = rows | {"normalize": normalize, "backend": backend}
                    fast_coding_rate(z, 0.1, **options)
                    for alpha in (1, 2):
                        function = partial(fast_matrix_entropy, alpha=alpha, **options)
                        cases.run(function, z, "fwd+bwd", cases.cotangent("", z).float())
    torch.cuda.synchronize()
    print(f"ran the kernels of {', '.join(backends) or 'nobody'}")


def training(steps: Steps) -> None:
    steps.step("training step", python("-m", "benchmarks.train_step", "--device", "cuda"), 90)


def symmetric(steps: Steps) -> None:
    steps.step("symmetric products and a training step", python("-m", "benchmarks.symmetric"), 90)


def benchmark(steps: Steps, reserved_s: float) -> None:
    problem = steps.execute(python("-m", "benchmarks.vendor"), 60)
    if problem:
        steps.skip("cuSOLVER XsyevBatched", f"not compared with: {problem}")
    # No case begins after `limit`; the last one may take a minute, of the steps to come if need be.
    limit = max(15.0, min(steps.left() - reserved_s, steps.left() - 60))
    command = python("-m", "benchmarks.run", "--device", "cuda", "--budget", "0.5")
    command += ["--time-limit", f"{limit:.0f}"]
    steps.step("benchmark", command + ([] if problem else ["--vendor"]), limit + 60)


def results() -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in RESULTS.rglob("*.json")}


def copy_results(before: dict[Path, float]) -> None:
    """What a step wrote, to $OUT."""
    for path in (p for p, changed in results().items() if before.get(p) != changed):
        print(f"results: {path}", flush=True)
        if os.environ.get("OUT"):
            name = "-".join(path.relative_to(RESULTS).parts)
            shutil.copy(path, Path(os.environ["OUT"]) / name)


STEPS = {
    "build": build,
    "tests": tests,
    "benchmark": benchmark,
    "training": training,
    "symmetric": symmetric,
    "sanitise": sanitise,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("steps", nargs="*", help=f"of {', '.join(STEPS)}; default: all")
    parser.add_argument("--small-cases", action="store_true", help="only what is sanitised")
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.steps) - set(STEPS)):
        parser.error(f"steps are {', '.join(STEPS)}, got {', '.join(unknown)}")
    reason = missing_gpu()
    if reason:
        print(f"make gpu: there is no GPU to measure on: {reason}", file=sys.stderr)
        return 2
    if options.small_cases:
        small_cases()
        return 0
    wanted = [name for name in STEPS if name in (options.steps or STEPS)]
    steps = Steps()
    for name in wanted:
        before = results()
        if name == "benchmark":
            benchmark(steps, sum(RESERVED_S.get(other, 0) for other in wanted))
        else:
            STEPS[name](steps)
        copy_results(before)
    for name, outcome, seconds, note in steps.reports:
        print(f"{outcome}  {seconds:6.1f} s  {name}  {note}")
    return int(any(report.outcome == "FAIL" for report in steps.reports))


if __name__ == "__main__":
    sys.exit(main())
