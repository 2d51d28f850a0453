"""``make gpu``: build, test, sanitise and measure on the GPU at hand, offline, in eight minutes.

    python3 -m benchmarks.gpu

Needs a CUDA build of PyTorch, a C++ compiler, pytest; and whatever is missing is said. Each step
runs in a process of its own with a time limit, is reported as PASS or FAIL, and a failed one does
not stop the others. Results go to benchmarks/results/, and to the folder $OUT if that is set.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TOTAL_S = 470.0
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
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
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
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=self.environment | environment, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        except OSError as error:
            return str(error)
        return None if done.returncode == 0 else f"exit status {done.returncode}"

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


def build(steps: Steps) -> bool:
    """Editable install, so that every package is found; else in place, on PYTHONPATH."""
    print("=== build", flush=True)
    began = time.monotonic()
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    problem = steps.execute(python("-m", "pip", "install", *offline, "-e", "."), 180)
    note = "pip install -e ."
    if problem:
        print(f"pip could not install ({problem}); building in place", flush=True)
        problem = steps.execute(python("setup.py", "build_ext", "--inplace"), 180)
        note = "setup.py build_ext --inplace"
    if not problem:
        see = "import mmae_fast.backends.dispatch as d, sys; sys.exit(d.EXTENSION_ERROR)"
        problem = steps.execute(python("-c", see), 60)
    return steps.record("build", began, problem, note)


def gpu_tests() -> list[str]:
    """Files with tests for the GPU. The others may need packages that this machine lacks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if "mark.gpu" in f.read_text()]


def own_backends() -> list[str]:
    """Backends with CUDA kernels of our own, asked in a fresh process: the build may be new."""
    ask = (
        "from mmae_fast import dispatch as d;"
        "print(*(b for b in ('cuda', 'triton') if d.refusal(b, 'cuda') is None))"
    )
    done = subprocess.run(
        python("-c", ask),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout.split()


def find_sanitizer() -> str | None:
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = os.pathsep.join(str(Path(root) / "bin") for root in roots if root)
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=places)


def sanitise(steps: Steps) -> None:
    backends = own_backends()
    if "cuda" not in backends:
        return steps.skip("compute-sanitizer", "no CUDA kernels to sanitise yet")
    tool = find_sanitizer()
    if tool is None:
        print("=== compute-sanitizer", flush=True)
        steps.record("compute-sanitizer", time.monotonic(), "compute-sanitizer is not installed")
        return None
    small = python("-m", "benchmarks.gpu", "--small-cases")
    steps.step("small cases", small, 60)  # fills Triton's cache of compiled kernels
    for name in ("memcheck", "racecheck"):
        command = [tool, "--tool", name, "--error-exitcode", "1", *small]
        # Without the caching allocator every tensor is an allocation whose bounds are checked.
        steps.step(name, command, 70, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return None


def small_cases() -> None:
    """Every quantity, value and gradient, on ragged little inputs: what the sanitizer watches."""
    import torch

    from . import cases

    backends = own_backends()
    for batch, n, d in SMALL:
        for dtype in ("float32", "bfloat16"):
            shape = cases.Shape(batch, n, d, dtype)
            z = cases.make_inputs(shape, "cuda", 1)[0]
            for name, quantity in cases.QUANTITIES.items():
                grad = cases.cotangent(name, z).float()
                for backend in backends:
                    if backend == "triton" and (batch, n, d) not in SMALL_TRITON:
                        continue
                    function = lambda x, q=quantity, b=backend: q.fast(x, b)  # noqa: E731
                    cases.run(function, z, "fwd+bwd", grad)
    torch.cuda.synchronize()


def benchmark(steps: Steps) -> None:
    before = {p: p.stat().st_mtime for p in RESULTS.rglob("*.json")}
    steps.step("symmetric products and a training step", python("-m", "benchmarks.symmetric"), 60)
    problem = steps.execute(python("-m", "benchmarks.vendor"), 60)
    if problem:
        steps.skip("cuSOLVER XsyevBatched", f"not compared with: {problem}")
    limit = max(30.0, steps.left() - 60)  # what is left when the last case began late
    command = python("-m", "benchmarks.run", "--device", "cuda", "--budget", "0.7")
    command += ["--time-limit", f"{limit:.0f}"]
    steps.step("benchmark", command + ([] if problem else ["--vendor"]), 420)
    written = [p for p in RESULTS.rglob("*.json") if before.get(p) != p.stat().st_mtime]
    for path in written:
        print(f"results: {path.relative_to(ROOT)}")
        if os.environ.get("OUT"):
            name = "-".join(path.relative_to(RESULTS).parts)
            shutil.copy(path, Path(os.environ["OUT"]) / name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--small-cases", action="store_true", help="only what is sanitised")
    options = parser.parse_args(argv)
    reason = missing_gpu()
    if reason:
        print(f"make gpu: there is no GPU to measure on: {reason}", file=sys.stderr)
        return 2
    if options.small_cases:
        small_cases()
        return 0
    steps = Steps()
    if build(steps):
        files = gpu_tests()
        tests = python("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files)
        if files:
            steps.step("tests", tests, 150)
        else:
            steps.skip("tests", "no test is marked gpu")
        sanitise(steps)
        steps.step("training step", python("-m", "benchmarks.train_step", "--device", "cuda"), 120)
        benchmark(steps)
    for name, outcome, seconds, note in steps.reports:
        print(f"{outcome}  {seconds:6.1f} s  {name}  {note}")
    return int(any(report.outcome == "FAIL" for report in steps.reports))


if __name__ == "__main__":
    sys.exit(main())
