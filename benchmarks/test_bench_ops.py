"""pytest-benchmark over implementation × shape × quantity × direction, on the CPU or on a GPU.

    pytest benchmarks --benchmark-only
    pytest benchmarks --benchmark-only -k "von_neumann and 256"

For ratios use ``python -m benchmarks.run``, which interleaves the implementations; this suite has
the filters, histograms and comparisons of pytest-benchmark. Both check a result before timing it.
"""

import functools
import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import cases, measure, run
from benchmarks.memory import MemoryProbe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("fast", "eager", "cholesky_ex")


def grid():
    shapes = run.shapes_for(DEVICE, quick=False)
    for shape, quantity in itertools.product(shapes, run.ORDER):
        if not cases.measured(shape, quantity, DEVICE):
            continue
        have = cases.implementations(quantity, shape, DEVICE)
        for direction, name in itertools.product(cases.DIRECTIONS, NAMES):
            if name in have:
                label = f"{shape.label.replace(' ', '-')}-{quantity}-{direction}-{name}"
                yield pytest.param(shape, quantity, direction, name, id=label.replace("×", "x"))


@functools.lru_cache(maxsize=1)
def data(shape, quantity):
    return measure.make_data(shape, quantity, cases.make_inputs(shape, DEVICE, 4), most_checked=8)


@functools.cache
def environment():
    return measure.environment(DEVICE)


@pytest.fixture(scope="session")
def probe():
    with MemoryProbe(enabled=DEVICE == "cpu") as found:
        yield found


@pytest.mark.parametrize(("shape", "quantity", "direction", "name"), list(grid()))
def test_ops(benchmark, probe, shape, quantity, direction, name):
    benchmark.group = f"{shape.label} {cases.QUANTITIES[quantity].title} {direction}"
    case = data(shape, quantity)
    implementation = cases.implementations(quantity, shape, DEVICE)[name]
    grad = case.grad.to(cases.value_dtype(name, quantity, shape.dtype))
    calls = implementation.prepare(case.inputs, direction, grad)
    errors = measure.check(name, case, calls[0]())
    turn = itertools.cycle(calls)

    def target():
        next(turn)()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(target, rounds=3, warmup_rounds=1)
    rates = measure.machine_rates(DEVICE)
    samples = benchmark.stats.stats.data if benchmark.stats else [float("nan")] * 2
    work = cases.least_work(shape, quantity, direction)
    benchmark.extra_info |= environment() | {
        "errors": errors,
        "backend": cases.backend_of(name, DEVICE),
        **measure.statistics_of(samples, work, rates, shape.dtype),
        "peak_bytes": measure.cuda_peak(calls[0])
        if DEVICE == "cuda"
        else probe.peak(shape, quantity, direction, name),
    }
