"""Runs the compiled kernels under the compiler's sanitizers; any report is a failure.

    python tests/sanitize.py [threads] [cuda] [memory] [extension]        (all without arguments)

threads: tests/cpu_threads with ThreadSanitizer. cuda: the CUDA kernels on threads of the host
(tests/cuda_emulation/main.cpp) with ThreadSanitizer, then without each of their barriers. memory:
tests/cpu_threads with AddressSanitizer and UndefinedBehaviorSanitizer, every output of exactly its
size. extension: mmae_fast._C with the last two, built as setup.py says, under the tests of the
operations; torch's tensors are seen because libasan is loaded first. Each stage plants errors,
which have to be reported. Linux and g++.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "sanitize"
DRIVER = ROOT / "tests" / "cpu_threads" / "main.cpp"
CUDA_DRIVER = ROOT / "tests" / "cuda_emulation" / "main.cpp"
COMPILER = os.environ.get("CXX") or "g++"
THREAD = ["-fsanitize=thread"]
MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
# g++'s frames for use-after-return checks are not aligned to a vector of 64 bytes: off. Python and
# torch leave memory to the end of the process on purpose: no leaks.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
# What runs with the extension. Left out: torch.compile, which starts a compiler of its own.
TESTS = ["test_ops.py", "test_autograd.py", "test_accuracy.py", "test_fuzz.py"]
SELECT = "not compile and not opcheck and not torch"  # "torch": the backend that is not under test
FUZZ_CASES = "600"

# Which kernels of CUDA_DRIVER need every barrier of a file of csrc/cuda, each of them alone.
NEEDED_BY = {
    "device.cuh": ["spectral", "packed", "jacobi"],
    "jacobi.cuh": ["jacobi"],
    "products.cuh": ["packed"],
    "spectral.cuh": ["spectral"],
    "sweep.cuh": ["spectral", "packed"],
}
HANGS = 600  # seconds; a thread that waits at a barrier alone waits for ever

# A tensor that claims one more row than its memory has, given to a kernel.
PLANT = """
import numpy as np, torch, mmae_fast._C
assert "sanitize" in mmae_fast._C.__file__, mmae_fast._C.__file__
rows = np.zeros(63 * 64, dtype=np.float32)
z = torch.from_numpy(np.lib.stride_tricks.as_strided(rows, (64, 64), (256, 4)))
mmae_fast.fast_gram(z, backend="cpu")
"""


def run(command, quiet=False, timeout=None, **environment):
    if not quiet:
        print("+", shlex.join(map(str, command)), flush=True)
    return subprocess.run(
        [str(part) for part in command],
        env=os.environ | OPTIONS | environment,
        cwd=BUILD,  # Python looks there first
        capture_output=quiet,
        text=True,
        check=False,
        timeout=timeout,
    )


def compile_all(folder, sources, flags):
    """Object files of the sources, all compiled at once; remade when any input has changed."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs = [*(ROOT / "csrc").rglob("*.*"), *sources, Path(__file__)]
    inputs += [*DRIVER.parent.glob("*.*"), *CUDA_DRIVER.parent.glob("*.*")]
    newest = max(path.stat().st_mtime for path in inputs)
    running, objects = [], []
    for source in sources:
        objects.append(folder / f"{source.stem}.o")
        if objects[-1].exists() and objects[-1].stat().st_mtime > newest:
            continue
        command = [COMPILER, *flags, "-c", str(source), "-o", str(objects[-1])]
        running.append((objects[-1], subprocess.Popen(command)))
    for target, process in running:
        if process.wait():
            target.unlink(missing_ok=True)
            raise SystemExit(f"{COMPILER} failed, see above")
    return objects


def check_driver(name, sanitizer, plant, report):
    """The driver is clean, and with `plant` defined the sanitizer says `report`."""
    folder = BUILD / name
    flags = ["-std=c++17", "-O1", "-g", "-Wno-psabi", "-pthread", f"-I{ROOT / 'csrc'}", *sanitizer]
    kernels = compile_all(folder, sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), flags)
    for macro in ([f"-D{plant}"], []):
        (main,) = compile_all(folder / ("planted" if macro else "clean"), [DRIVER], flags + macro)
        program = main.with_suffix("")
        subprocess.run([COMPILER, *flags, main, *kernels, "-o", program], check=True)
        result = run([program], quiet=bool(macro))
        if macro:
            output = result.stdout + result.stderr
            if result.returncode == 0 or report not in output:
                raise SystemExit(
                    f"{name}: {plant} was not reported as {report!r}:\n{output[-3000:]}"
                )
            print(f"{name}: the planted error is reported ({report})", flush=True)
        elif result.returncode:
            raise SystemExit(f"{name}: failed, see above")


def cuda_program():
    """CUDA_DRIVER with ThreadSanitizer, compiled if need be."""
    tests = CUDA_DRIVER.parent.parent
    includes = [f"-I{path}" for path in (ROOT / "csrc", tests, CUDA_DRIVER.parent)]
    flags = ["-std=c++17", "-O1", "-g", "-Wno-psabi", "-pthread", *includes, *THREAD]
    (main,) = compile_all(BUILD / "cuda", [CUDA_DRIVER], flags)
    program = main.with_suffix("")
    subprocess.run([COMPILER, *THREAD, "-pthread", main, "-o", program], check=True)
    return program


def cuda_barriers():
    """Of every barrier of the CUDA kernels its file and file:line."""
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "__syncthreads();" in line:
                yield path.name, f"{path.name}:{number}"


def expect_race(*command):
    result = run(command, quiet=True, timeout=HANGS)
    output = result.stdout + result.stderr
    if result.returncode == 0 or "data race" not in output:
        raise SystemExit(f"no data race reported by {command}:\n{output[-3000:]}")


def check_cuda():
    program = cuda_program()
    for planted in ("shuffle", "blocks"):
        expect_race(program, planted)
    if run([program], timeout=HANGS).returncode:
        raise SystemExit("cuda: failed, see above")
    barriers = list(cuda_barriers())
    for file, where in barriers:
        for kernel in NEEDED_BY[file]:
            expect_race(program, kernel, f"without={where}")
    print(f"cuda: without any of {len(barriers)} barriers a data race is reported", flush=True)


def build_extension():
    """mmae_fast with an instrumented _C, in BUILD: the sources linked, the library compiled."""
    os.environ["MMAE_FAST_CUDA"] = "0"
    os.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("mmae_fast_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    (extension,) = setup.extensions()
    flags = [f"-I{path}" for path in [*extension.include_dirs, sysconfig.get_paths()["include"]]]
    flags += [*extension.extra_compile_args["cxx"], "-fPIC", "-O1", "-g", *MEMORY]
    sources = [ROOT / source for source in extension.sources]
    objects = compile_all(BUILD / "extension", sources, flags)
    package = BUILD / "mmae_fast"
    package.mkdir(exist_ok=True)
    for path in package.iterdir():
        path.unlink()
    for path in (*(ROOT / "mmae_fast").glob("*.py"), ROOT / "mmae_fast" / "backends"):
        (package / path.name).symlink_to(path)
    link = [f"-L{path}" for path in extension.library_dirs]
    link += [f"-Wl,-rpath,{path}" for path in extension.library_dirs]
    link += [f"-l{name}" for name in extension.libraries]
    output = package / "_C.abi3.so"
    command = [COMPILER, "-shared", *MEMORY, *objects, *link, "-o", output]
    subprocess.run(command, check=True)


def check_extension():
    build_extension()
    libraries = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    environment = {
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": str(BUILD),
        "MMAE_FAST_FUZZ_CASES": FUZZ_CASES,
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    planted = run([sys.executable, "-c", PLANT], quiet=True, **environment)
    output = planted.stdout + planted.stderr
    if planted.returncode == 0 or "heap-buffer-overflow" not in output or "mmae::" not in output:
        raise SystemExit(f"extension: a planted over-read was not reported:\n{output[-3000:]}")
    print("extension: the planted error is reported (heap-buffer-overflow in mmae::)", flush=True)
    tests = [ROOT / "tests" / name for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    # A fault is AddressSanitizer's to report, and its report goes to the terminal.
    command += ["-p", "no:faulthandler", "--capture=sys", "-k", SELECT]
    if run([*command, *tests], **environment).returncode:
        raise SystemExit("extension: failed, see above")


STAGES = {
    "threads": lambda: check_driver("threads", THREAD, "MMAE_PLANT_RACE", "data race"),
    "cuda": check_cuda,
    "memory": lambda: check_driver("memory", MEMORY, "MMAE_PLANT_OVERFLOW", "heap-buffer-overflow"),
    "extension": check_extension,
}


def main(names):
    unknown = set(names) - STAGES.keys()
    if unknown:
        raise SystemExit(f"stages are {', '.join(STAGES)}; got {', '.join(sorted(unknown))}")
    BUILD.mkdir(parents=True, exist_ok=True)
    for name in names or STAGES:
        STAGES[name]()
    print("sanitizers: clean")


if __name__ == "__main__":
    main(sys.argv[1:])
