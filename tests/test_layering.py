"""Who may import whom, and what an import may not do. Read from the sources, not from a promise."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mmae_fast"
KERNELS = ROOT / "kernels"

# From the bottom up; a module imports from the lines above its own only, at its top or inside of a
# function. Rooms follow one another: backends, the functions at the top of the package, training,
# evaluation, the commands. A new module takes its place here.
LAYERS = """
reference eager kernels _C
backends.factor
backends.rational backends.rows
backends.torch_backend
backends.cpu_backend backends.cuda_backend backends.triton_backend
backends.dispatch
backends.operators
backends.information_operators
distributed
ops
information
mmae_fast
two_branch coding_rates measures monitor accumulate
losses theory

training.config training.manifest training.progress training.batch_norm
training.recipes training.models training.augment training.launch training.runs
training.data.images training.data.decode
training.data.sources training.data.builtin
training.data.reading
training.data.packed
training.data
training.objective training.checkpoint training.logbook training.reconstruct
training.step training.watch
training.train

evaluation.config
evaluation.page evaluation.probes evaluation.published
evaluation.report evaluation.evaluate evaluation.export evaluation.layers
evaluation.plots evaluation.classifier evaluation.compare
evaluation.analyze evaluation.finetune

demo doctor
cli
"""
LEVEL = {name: level for level, line in enumerate(LAYERS.split("\n")) for name in line.split()}


def modules():
    """Files of the package by name; the package itself is what it offers, ``mmae_fast``."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        files[".".join(part for part in parts if part != "__init__") or "mmae_fast"] = path
    return files


def within(name):
    """The module of the package that a dotted name is of, without the package's own name."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in LEVEL:
        parts.pop()
    return ".".join(parts) or "mmae_fast"


@functools.cache
def imports(path):
    """Names of the package's modules and of other top-level packages that a file imports."""
    inside, outside = set(), set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first = name.split(".")[0]
            if first == "mmae_fast":
                inside.add(within(name))
            else:
                outside.add(first)
    return inside, outside - set(sys.stdlib_module_names)


def importers(name):
    """Modules that import this one, or one in it."""
    found = {module: imports(path)[0] for module, path in modules().items()}
    return {m for m, inside in found.items() if any(f"{i}.".startswith(f"{name}.") for i in inside)}


def test_the_parser_sees_imports():
    backends, data = PACKAGE / "backends", PACKAGE / "training" / "data"
    assert imports(backends / "torch_backend.py")[1] == {"torch"}
    assert {"reference", "backends.rows"} <= imports(backends / "torch_backend.py")[0]
    assert {"_C", "backends.torch_backend"} == imports(backends / "cpu_backend.py")[0]
    assert {"training.data.images", "training.config"} <= imports(data / "packed.py")[0]
    assert "training.train" in imports(PACKAGE / "cli.py")[0]


def test_every_module_has_its_place():
    rooms = {"backends", "training", "evaluation"}
    assert set(modules()) - rooms == set(LEVEL) - {"kernels", "_C"}
    for room in rooms:
        assert imports(modules()[room]) == (set(), set()), (
            f"{room} is imported by each of its files"
        )


@pytest.mark.parametrize("name", sorted(set(modules()) & set(LEVEL) - {"mmae_fast"}))
def test_imports_go_down(name):
    inside, _ = imports(modules()[name])
    up = {other for other in inside if LEVEL[other] >= LEVEL[name]}
    assert not up, f"{name} imports {up} from its own layer or above"


def test_public_functions_are_the_door():
    """Nobody reaches past them to backends and kernels, but the command that reports on these."""
    outer = {name for name in importers("backends") if not name.startswith("backends.")}
    assert outer == {"ops", "information", "distributed", "doctor"}
    assert importers("kernels") == {"backends.triton_backend", "doctor"}
    assert importers("_C") == {"backends.cpu_backend"}


def test_functions_need_torch_only():
    """Everything below training, and so whoever takes the functions into a program of their own."""
    functions = {name for name in LEVEL if LEVEL[name] < LEVEL["training.config"]}
    for name in functions & set(modules()):
        assert imports(modules()[name])[1] <= {"torch"}, name


def test_only_fine_tuning_and_the_demonstration_train():
    """Everything else is done with what a training left."""
    for name in ("train", "step", "objective", "logbook"):
        above = {m for m in importers(f"training.{name}") if not m.startswith("training.")}
        assert above <= {"evaluation.finetune", "demo", "cli"}, f"{above} import {name}"


def test_configurations_need_the_standard_library_only():
    for name in ("training.config", "evaluation.config", "training.recipes"):
        inside, outside = imports(modules()[name])
        assert inside <= {"training.config"} and not outside, name


def test_kernels_know_torch_and_triton_only():
    files = sorted(KERNELS.glob("*.py"))
    assert files, "kernels/ has moved: this test looks at nothing"
    for path in files:
        inside, outside = imports(path)
        assert not inside and outside <= {"torch", "triton", "kernels"}


def test_kernels_include_no_torch_and_no_python():
    """Kernels see pointers and sizes; registration, which knows torch, is in other files."""
    csrc = ROOT / "csrc"
    files = [*csrc.glob("cpu/*"), *csrc.glob("cuda/*.cu"), *csrc.glob("cuda/*.cuh")]
    assert any(path.name == "kernels.inl" for path in files)
    for path in files:
        for header in re.findall(r"^\s*#\s*include\s*[<\"](.*?)[>\"]", path.read_text(), re.M):
            assert not re.match(r"(torch|ATen|c10|pybind11)/|Python\.h", header), (path, header)


BLANK_IMPORT = """
import sys
import mmae_fast
assert not {"torch", "numpy"} & set(sys.modules)
import torch
heavy = {"triton", "timm", "matplotlib", "torchvision", "tyro", "rich", "safetensors", "numpy.f2py"}
loaded = heavy & set(sys.modules)
assert not loaded, loaded
assert not torch.cuda.is_initialized()
z = torch.eye(3, 5, requires_grad=True)
mmae_fast.fast_coding_rate(z, 1.0).backward()  # nor does a call
loaded = heavy & set(sys.modules)
assert not loaded, loaded
assert not torch.cuda.is_initialized()
"""


def test_import_is_light():
    result = subprocess.run(
        [sys.executable, "-c", BLANK_IMPORT], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_losses_need_no_more_than_torch():
    code = BLANK_IMPORT.replace("import torch\n", "import torch, mmae_fast.losses\n")
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


NAMES_ON_DEMAND = """
import pickle, sys
import torch
import mmae_fast
assert set(mmae_fast.__all__) <= set(dir(mmae_fast)) and "mmae_fast.ops" not in sys.modules

@torch.compile(fullgraph=True, backend="aot_eager")
def both(z):  # the names are first asked for while this is traced
    return mmae_fast.fast_matrix_entropy(z) + mmae_fast.information.joint_entropy(z, z)

assert both(torch.eye(3, 5)).isfinite()
from mmae_fast import *
assert fast_matrix_entropy is mmae_fast.ops.fast_matrix_entropy
assert pickle.loads(pickle.dumps(fast_matrix_entropy)) is fast_matrix_entropy
assert information is sys.modules["mmae_fast.information"]
assert EntropyMonitor is mmae_fast.monitor.EntropyMonitor
"""


def test_public_names_are_loaded_on_demand():
    result = subprocess.run(
        [sys.executable, "-c", NAMES_ON_DEMAND], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
