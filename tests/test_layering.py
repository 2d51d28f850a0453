"""Who may import whom, and what an import may not do. Read from the sources, not from a promise."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mmae_fast"
KERNELS = ROOT / "kernels"

# From the bottom up; a module imports from lower layers only. Modules of one layer may not import
# each other, but for the pairs of SAME_LAYER.
LAYERS = [
    {"reference", "factor", "eager"},
    {"rows", "rational"},
    {"kernels", "_C", "torch_backend"},
    {"cpu_backend", "cuda_backend", "triton_backend"},
    {"dispatch"},
    {"operators"},
    {"information_operators", "distributed"},
    {"ops"},
    {"information"},
]
# Above the operators: the training side, which must be reachable from none of them.
CORE = set().union(*LAYERS)
DRIVERS = ["train", "cli"]


def modules():
    """Files of the package, and the packages in it, each as one module."""
    files = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    return files | {path.parent.name: path.parent for path in PACKAGE.glob("*/__init__.py")}


def imports(path):
    """Names of the package's modules and of top-level packages that a file imports anywhere."""
    inside, outside = set(), set()
    if path.is_dir():
        found = [imports(file) for file in path.glob("*.py")]
        inside, outside = (set().union(*names) for names in zip(*found, strict=True))
        return inside - {path.name}, outside
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [node.module] if node.module else [alias.name for alias in node.names]
            names = [f"mmae_fast.{name}" for name in base]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
            if node.module == "mmae_fast":
                names = [f"mmae_fast.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "mmae_fast" and rest:
                inside.add(rest[0])
            else:
                outside.add(first)
    return inside, outside - {"mmae_fast"}


def layer(name):
    return next(i for i, names in enumerate(LAYERS) if name in names)


def test_the_parser_sees_imports():
    inside, outside = imports(PACKAGE / "torch_backend.py")
    assert "reference" in inside and "torch" in outside


@pytest.mark.parametrize("name", sorted(CORE & set(modules())))
def test_core_imports_downwards(name):
    inside, outside = imports(modules()[name])
    allowed = set().union(*LAYERS[: layer(name)])
    assert inside <= allowed, f"{name} imports {inside - allowed} from its own layer or above"
    third_party = outside - set(sys.stdlib_module_names)
    assert third_party <= {"torch"}, f"{name} imports {third_party}"


def test_everything_else_is_above_the_operators():
    others = set(modules()) - CORE - {"doctor"}  # doctor reports on the installation, backends too
    assert {"losses", "models", "data", "train"} <= others
    for name in others:
        inside, _ = imports(modules()[name])
        # The public functions are the door: nobody reaches past them to backends and kernels.
        hidden = CORE - {"ops", "distributed", "information", "reference", "dispatch"}
        assert not inside & hidden, f"{name} imports {inside & hidden}"


def test_nothing_imports_the_drivers():
    """cli on top, train below it; models, data and losses know neither."""
    for name, path in modules().items():
        inside, _ = imports(path)
        if name != "cli":
            assert "cli" not in inside, f"{name} imports cli"
    for name in ("losses", "models", "data"):
        inside, _ = imports(modules()[name])
        assert not inside & set(DRIVERS), f"{name} imports {inside & set(DRIVERS)}"


def test_evaluation_knows_no_training():
    """What is done with a frozen encoder; fine-tuning and comparing runs are above training."""
    for name in ("published", "probes", "evaluate", "export", "classifier", "page", "report"):
        inside, _ = imports(modules()[name])
        above = {"train", "step", "finetune", "compare", "demo", "cli"}
        assert not inside & above, f"{name} imports {inside & above}"


def test_the_rooms_of_training():
    """train is the loop on top; each room below knows those before it."""
    order = ["manifest", "launch", "runs", "objective", "step", "checkpoint", "logbook", "train"]
    for place, name in enumerate(order):
        inside, _ = imports(modules()[name])
        assert not inside & set(order[place:]), f"{name} imports {inside & set(order[place:])}"
        assert not inside & {"demo", "compare", "finetune", "cli"}, name


def test_configurations_need_the_standard_library_only():
    for name in ("config", "eval_config", "recipes"):
        inside, outside = imports(modules()[name])
        assert inside <= {"config"} and outside <= set(sys.stdlib_module_names), name


def test_no_import_cycles():
    graph = {name: imports(path)[0] & set(modules()) for name, path in modules().items()}
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in graph[name]:
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_kernels_know_torch_and_triton_only():
    files = sorted(KERNELS.glob("*.py"))
    assert files, "kernels/ has moved: this test looks at nothing"
    for path in files:
        inside, outside = imports(path)
        assert inside <= {"kernels", *(file.stem for file in files)}
        assert outside - set(sys.stdlib_module_names) <= {"torch", "triton"}


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
