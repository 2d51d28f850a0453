"""The plumbing of the benchmarks: what is timed, what is written, what the README says."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import cases, gpu, measure, memory, report, run, symmetric, vendor

ROOT = Path(__file__).parent.parent
SHAPE = cases.Shape(3, 5, 7)
RATES = {"copy_bytes_per_s": 1e10, "flops_per_s": {"float32": 1e11}}
SETTING = measure.Setting("cpu", RATES, budget_s=0.0, min_rounds=2)


def data(quantity, shape=SHAPE):
    return measure.make_data(shape, quantity, cases.make_inputs(shape, "cpu", 2))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A whole quick run."""
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--quick", "--device", "cpu", "--no-memory", "--out", str(folder)]
    assert run.main(arguments) == 0
    (path,) = folder.iterdir()
    return json.loads(path.read_text())


# --------------------------------------------------------------------------------------------------
# Nothing wrong is timed


@pytest.mark.parametrize("quantity", cases.QUANTITIES)
@pytest.mark.parametrize("shape", [SHAPE, cases.Shape(1, 9, 4), cases.Shape(70, 3, 3)])
def test_implementations_agree(quantity, shape):
    found = cases.implementations(quantity, shape, "cpu")
    assert list(found)[:2] == ["fast", "eager"]
    row = measure.measure(data(quantity, shape), "fwd+bwd", found, SETTING)
    assert not row["not_timed"]
    assert all(len(i["errors"]) == 2 for i in row["implementations"].values())


@pytest.mark.parametrize("part", ["value", "gradient", "last matrix"])
def test_wrong_result_is_never_timed(part):
    calls = []

    def wrong(z):
        calls.append(z)
        value = cases.eager_renyi2(z)
        if part == "value":
            return value + 0.01
        if part == "gradient":
            return value.detach() + 1.01 * (value - value.detach())
        return torch.cat([value[:-1], value[-1:] * torch.nan])

    found = {"fast": cases._plain(wrong), "eager": cases._plain(cases.eager_renyi2)}
    row = measure.measure(data("renyi2", cases.Shape(70, 5, 7)), "fwd+bwd", found, SETTING)
    assert list(row["implementations"]) == ["eager"]
    assert row["not_timed"]["fast"].startswith("wrong: fast: ")
    assert len(calls) == 1
    assert "over_fast" not in row["implementations"]["eager"]
    assert run.problems([row])


def test_check_names_what_is_wrong():
    case = data("renyi2")
    with pytest.raises(measure.WrongResult, match=r"fast: relative error .* of the gradient"):
        measure.check("fast", case, (case.expected[0], 1.1 * case.expected[1]))
    with pytest.raises(measure.WrongResult, match=r"shape \(2,\), expected \(3,\)"):
        measure.relative_error(torch.zeros(2), torch.zeros(3), 0)


def test_what_cannot_run_is_recorded():
    def broken(z):
        raise RuntimeError("no such operation")

    found = {"fast": cases._plain(lambda z: cases.eager_renyi2(z)), "eager": cases._plain(broken)}
    row = measure.measure(data("renyi2"), "fwd", found, SETTING)
    assert row["not_timed"] == {"eager": "RuntimeError: no such operation"}


# --------------------------------------------------------------------------------------------------
# How it is timed


def test_samples_are_interleaved_and_inputs_rotate():
    log = []
    calls = {n: [lambda n=n, i=i: log.append((n, i)) for i in range(3)] for n in "ab"}

    def clock(chosen):
        for call in chosen:
            call()
        return 1.0

    samples = measure.interleave(calls, clock, budget_s=0.0, min_rounds=2)
    assert {name: len(times) for name, times in samples.items()} == {"a": 2, "b": 2}
    assert log[2:] == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]  # after the warm-up


@pytest.mark.parametrize("device", run.PASSES)
def test_passes_reach_every_quantity_in_time(device):
    for slow in (False, True):
        turns = [q for s, quantities, _ in run.PASSES[device] if s == slow for q in quantities]
        assert sorted(turns) == sorted(cases.QUANTITIES)
    parts = [part for *_, part in run.PASSES[device]]
    assert parts == sorted(parts) and parts[-1] == 1


def test_least_work():
    flops, size = cases.least_work(cases.Shape(2, 4, 6), "coding_rate", "fwd+bwd")
    assert size == 3 * 2 * 4 * 6 * 4
    assert flops == pytest.approx(2 * (4 * 5 * 6 + 2 * 16 * 6 + 4**3))
    assert cases.least_work(cases.Shape(1, 6, 4, "bfloat16"), "gram", "fwd")[1] == 48 + 64
    for quantity in cases.QUANTITIES:
        forward = cases.least_work(SHAPE, quantity, "fwd")
        assert all(x < y for x, y in zip(forward, cases.least_work(SHAPE, quantity, "fwd+bwd")))  # noqa: B905


def test_roofline_is_the_larger_bound():
    found = measure.statistics_of([1.0, 1.0, 1.0], (5e10, 9e9), RATES, "float32")
    assert found["roofline"] == pytest.approx(0.9) and found["gflop_per_s"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("model", "slug"),
    [
        ("Intel(R) Xeon(R) Processor", "cpu-intel-xeon-2t"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "cpu-intel-xeon-2t"),
        ("AMD EPYC 7B13 64-Core Processor", "cpu-amd-epyc-7b13-64-core-2t"),
        ("Apple M2", "cpu-apple-m2-2t"),
    ],
)
def test_slug(model, slug):
    assert measure.device_slug({"device": "cpu", "cpu": model, "threads": 2}) == slug
    env = {"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3", "cpu": model, "threads": 2}
    assert measure.device_slug(env) == "nvidia-h100-80gb-hbm3"


@pytest.mark.skipif(not memory.SUPPORTED, reason="peak memory is measured on Linux only")
def test_peak_memory():
    """A large Gram matrix of a small input: the growth is the result."""
    with memory.MemoryProbe() as probe:
        peak = probe.peak(cases.Shape(8, 1024, 1024), "gram", "fwd", "fast")
    assert 8 * 4 <= peak / 2**20 < 2.5 * 8 * 4


# --------------------------------------------------------------------------------------------------
# What is written


def test_results_schema(result):
    env = result["environment"]
    known = {"cpu", "cores", "threads", "isa", "python", "torch", "mmae_fast", "commit", "date"}
    assert known <= env.keys() and env["device"] == "cpu"
    assert result["complete"] and result["schema"] == run.SCHEMA and result["dropped"] == []
    grid = len(cases.QUICK_SHAPES) * len(cases.QUANTITIES) * len(cases.DIRECTIONS)
    assert len(result["cases"]) == grid
    for row in result["cases"]:
        assert row["not_timed"] == {}
        fast, eager = row["implementations"]["fast"], row["implementations"]["eager"]
        assert fast["backend"] in ("cpu", "torch") and eager["backend"] is None
        assert eager["over_fast"] == pytest.approx(eager["median_s"] / fast["median_s"])
        for found in (fast, eager):
            assert found["q1_s"] <= found["median_s"] <= found["q3_s"]
            assert all(found[key] > 0 for key in ("gb_per_s", "gflop_per_s", "roofline"))


def test_summary(result):
    text = run.summary(result)
    assert "Speed-up over eager PyTorch" in text and "roofline" in text
    assert all(shape.label in text for shape in cases.QUICK_SHAPES)


def test_quick_numbers_are_not_results(tmp_path, result):
    with pytest.raises(SystemExit):
        run.main(["--quick"])
    (tmp_path / "quick.json").write_text(json.dumps(result))
    assert report.load(tmp_path, "cpu") is None


def test_time_limit():
    with memory.MemoryProbe(enabled=False) as probe:
        rows, dropped = run.suite(cases.QUICK_SHAPES, SETTING, probe, deadline=-math.inf)
    assert rows == [] and len(dropped) == len(cases.QUICK_SHAPES) * len(cases.QUANTITIES)


def test_slow_implementations_join_their_row(monkeypatch):
    """What is compiled comes in a second pass, next to "fast" again."""
    every = cases.implementations

    def with_slow(*args):
        slow = cases._plain(cases.eager_renyi2)._replace(slow=True)
        return every(*args) | ({"torch.compile": slow} if args[0] == "renyi2" else {})

    monkeypatch.setattr(cases, "implementations", with_slow)
    with memory.MemoryProbe(enabled=False) as probe:
        rows, dropped = run.suite((SHAPE,), SETTING, probe)
    assert dropped == [] and len(rows) == len(run.ORDER) * len(cases.DIRECTIONS)
    for row in rows:
        compiled = row["implementations"].get("torch.compile")
        assert (compiled is not None) == (row["quantity"] == "renyi2")
        assert compiled is None or compiled["over_fast"] > 0


# --------------------------------------------------------------------------------------------------
# The README


def test_report(tmp_path, result):
    pytest.importorskip("matplotlib")
    results, readme = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    readme.write_text(
        "a <!-- bench:headline --><!-- /bench --> b\n"
        "<!-- bench:cpu-table -->\nold\n<!-- /bench -->\n"
        "<!-- bench:gpu-table --><!-- /bench -->\n<!-- bench:figure --><!-- /bench -->\nend\n"
    )
    finished = result | {"settings": result["settings"] | {"quick": False}}
    (results / "cpu.json").write_text(json.dumps(finished))
    arguments = ["--results", str(results), "--readme", str(readme)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert report.main([*arguments, "--check"]) == 0
    assert text.startswith("a <!-- bench:headline -->\nValue and gradient") and "old" not in text
    assert "geometric mean" in text and "| 4×6×8 |" in text and report.NO_GPU in text
    slug = measure.device_slug(result["environment"])
    assert f"benchmarks/results/{slug}.png" in text and (results / f"{slug}.png").stat().st_size


def test_gpu_figures_need_a_gpu(tmp_path, result):
    """No CPU result, finished or not, ends up in the GPU table."""
    (tmp_path / "cpu.json").write_text(json.dumps(result | {"settings": {"quick": False}}))
    assert report.blocks(tmp_path)["gpu-table"] == report.NO_GPU


def test_gpu_table_of_a_gpu_result(tmp_path, result):
    env = result["environment"] | {"device": "cuda", "gpu": "Some GPU", "cuda": "13.0"}
    found = result | {"environment": env, "settings": {"quick": False}}
    (tmp_path / "some-gpu.json").write_text(json.dumps(found))
    made = report.blocks(tmp_path)
    assert "Some GPU, CUDA 13.0" in made["gpu-table"] and "`cholesky_ex`" in made["gpu-table"]
    assert made["cpu-table"] == "Not yet measured."
    (tmp_path / "some-gpu.json").write_text(json.dumps(found | {"complete": False}))
    assert report.blocks(tmp_path)["gpu-table"] == report.NO_GPU


def test_unknown_marker():
    with pytest.raises(ValueError, match="unknown marker bench:x; there are headline"):
        report.fill("<!-- bench:x --><!-- /bench -->", {"headline": ""})


def test_readme_markers_are_known():
    names = {match[1] for match in report.MARKER.findall((ROOT / "README.md").read_text())}
    assert names <= {"headline", "figure", "cpu-table", "gpu-table"}


# --------------------------------------------------------------------------------------------------
# make gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_script_without_gpu():
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no GPU to measure on" in done.stderr


def test_gpu_steps_go_on_after_a_failure(capfd):
    steps = gpu.Steps(total_s=60)
    assert not steps.step("bad", gpu.python("-c", "raise SystemExit(3)"), 30)
    assert steps.step("good", gpu.python("-c", "print('ran')"), 30)
    assert not steps.step("slow", gpu.python("-c", "import time; time.sleep(60)"), 5)
    assert [r.outcome for r in steps.reports] == ["FAIL", "PASS", "FAIL"]
    assert [r.note for r in steps.reports[::2]] == ["exit status 3", "stopped after 5 s"]
    assert "ran" in capfd.readouterr().out


def test_a_stopped_gpu_step_leaves_no_children(tmp_path):
    """They would hold the GPU that the next step measures."""
    script = "import subprocess, sys, time; subprocess.Popen(['sh', '-c', sys.argv[1]]).wait()"
    child = f"echo $$ > {tmp_path}/pid; while :; do sleep 0.1; done"
    assert gpu.Steps(total_s=60).execute(gpu.python("-c", script, child), 5) == "stopped after 5 s"
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


def gpu_main(monkeypatch, tmp_path, arguments, broken=None):
    """Exit status, and the commands that would run."""
    ran = []

    def execute(self, command, limit_s, **environment):
        ran.append(" ".join([*command[1:], *(f"{k}={v}" for k, v in environment.items())]))
        return "broken" if broken and broken in ran[-1] else None

    monkeypatch.setattr(gpu, "missing_gpu", lambda: None)
    monkeypatch.setattr(gpu, "architecture", lambda: "9.0a")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: "/bin/compute-sanitizer")
    monkeypatch.setattr(gpu.Steps, "execute", execute)
    return gpu.main(arguments), ran


@pytest.mark.parametrize(
    "broken", [None, "MMAE_FAST_CUDA=1", "cuda_backend", "pytest", "benchmarks.run", "memcheck"]
)
def test_gpu_steps(monkeypatch, tmp_path, capsys, broken):
    """All steps run, in order, whatever fails; a failure is in the exit status."""
    status, ran = gpu_main(monkeypatch, tmp_path, [], broken)
    assert status == (broken is not None)
    assert "MMAE_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0a" in ran[0]
    without_cuda = broken in ("MMAE_FAST_CUDA=1", "cuda_backend")
    assert any("MMAE_FAST_CUDA=0" in command for command in ran) == without_cuda
    order = ["-m pytest -m gpu", "benchmarks.vendor", "benchmarks.run --device cuda"]
    order += ["benchmarks.train_step", "benchmarks.symmetric", "racecheck", "memcheck"]
    at = [next(i for i, c in enumerate(ran) if part in c) for part in order]
    assert at == sorted(at) and "--vendor" in ran[at[2]] and "kns=mmae" in ran[at[-1]]
    assert ("FAIL" in capsys.readouterr().out) == (broken is not None)


def test_some_gpu_steps(monkeypatch, tmp_path, capsys):
    status, ran = gpu_main(monkeypatch, tmp_path, ["benchmark"], broken="benchmarks.vendor")
    assert status == 0 and len(ran) == 2 and "--vendor" not in ran[1]
    assert "SKIP" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.main(["nonsense"])
    assert "got nonsense" in capsys.readouterr().err


def test_gpu_script_needs_no_command_line_packages():
    """``make gpu`` runs where tyro and rich may be missing."""
    script = (
        "import sys; sys.modules.update(tyro=None, rich=None, timm=None, torchvision=None);"
        "import benchmarks.gpu, benchmarks.run, benchmarks.vendor"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    assert "tests/test_gpu.py" in gpu.gpu_tests()


def test_vendor_baseline():
    """Its formula on the CPU (the solver itself needs a GPU)."""
    z = cases.make_inputs(SHAPE, "cpu", 1)[0]
    rho = cases._density(z).requires_grad_()
    solve = lambda a, vectors: (torch.linalg.eigh(a)[0], torch.linalg.eigh(a)[1].mT)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vendor, "eigh_batched", solve)
        value = vendor.batched_von_neumann(rho)
        grad = torch.autograd.grad(value.sum(), rho)[0]
    torch.testing.assert_close(value, cases.eager_von_neumann(z))
    lam = torch.linalg.eigvalsh(rho)
    expected = torch.autograd.grad(-torch.special.xlogy(lam, lam).sum(), rho)[0]
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3)


def test_symmetric_products_run(tmp_path, capsys):
    assert symmetric.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    result = json.loads(next(tmp_path.glob("*.json")).read_text())
    found = {(row["k"], row["implementation"]) for row in result["gram"]}
    assert found == {(k, i) for k in (24, 40) for i in ("product", "cpu")}
    assert all(row["median_s"] > 0 and row["of_product_rate"] > 0 for row in result["gram"])
    assert {row["regulariser"] for row in result["step"]} >= {"none", "tcr, cpu"}
    assert "of the product's rate" in capsys.readouterr().out


def test_symmetric_products_need_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert symmetric.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
