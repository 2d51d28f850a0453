"""The public functions: arguments, errors, determinism, memory, autocast, threads."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import mmae_fast
from mmae_fast import effective_rank, fast_coding_rate, fast_gram, fast_matrix_entropy

from .accuracy import BACKENDS, DTYPES, coding_rate, entropy, features, gram, run

QUANTITIES = [coding_rate(1.0), *map(entropy, (0.5, 1.0, 2.0, 3.0, math.inf))]
QUANTITIES += [gram("samples"), gram("features")]
ROWS = [{}, {"center": True}, {"normalize": False}]
# Compiled kernels on both sides, the LAPACK path, and one matrix shared by all threads.
SHAPES = [(3, 9, 40), (3, 40, 9), (300, 260), (1, 120, 200)]


def name(q):
    return f"{q.kind}-{q.parameter}"


def test_public_names():
    assert set(mmae_fast.__all__) == {
        "EntropyMonitor",
        "effective_rank",
        "fast_coding_rate",
        "fast_gram",
        "fast_matrix_entropy",
        "information",
    }
    functions = set(mmae_fast.__all__) - {"information"}
    assert all(callable(getattr(mmae_fast, each)) for each in functions)


CALLS = {
    "matrix_entropy": fast_matrix_entropy,
    "coding_rate": lambda z, **kwargs: fast_coding_rate(z, **{"scale": 1.0} | kwargs),
    "gram": fast_gram,
    "effective_rank": effective_rank,
}
Z = torch.ones(2, 3, 4)
BAD_FEATURES = [
    (None, TypeError, "z must be a torch.Tensor, got NoneType"),
    ([[1.0]], TypeError, "z must be a torch.Tensor, got list"),
    (Z.int(), TypeError, "float32, float64, bfloat16 or float16, got torch.int32"),
    (Z.bool(), TypeError, "got torch.bool"),
    (Z.to(torch.complex64), TypeError, "got torch.complex64"),
    (Z.to(torch.float8_e5m2), TypeError, "got torch.float8_e5m2"),
    (Z[0].to_sparse(), TypeError, "dense .* got layout torch.sparse_coo"),
    (torch.tensor(1.0), ValueError, r"shape \(\.\.\., n, d\), got \(\)"),
    (torch.ones(5), ValueError, r"shape \(\.\.\., n, d\), got \(5,\)"),
]
BAD_OPTIONS = [
    ({"mask": [True]}, TypeError, "mask must be a bool tensor, got list"),
    ({"mask": torch.ones(2, 3)}, TypeError, "mask must be a bool tensor, got torch.float32"),
    ({"mask": torch.ones(3).bool()}, ValueError, r"\(2, 3\), got \(3,\)"),
    ({"mask": torch.ones(2, 4).bool()}, ValueError, r"\(2, 3\), got \(2, 4\)"),
    (
        {"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")},
        ValueError,
        "z's device cpu, got meta",
    ),
    ({"precision": "tf32"}, ValueError, "precision must be one of .*'highest'.*got 'tf32'"),
    ({"precision": None}, ValueError, "got None"),
    ({"backend": "gpu"}, ValueError, "backend must be 'auto' or one of .*'cpu'.*got 'gpu'"),
    ({"backend": "cuda"}, RuntimeError, "'cuda' is not available: it serves CUDA .* 'cpu'"),
    ({"backend": "triton"}, RuntimeError, "'triton' is not available: it serves CUDA .* 'cpu'"),
]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("z", "error", "message"), BAD_FEATURES, ids=[e[2] for e in BAD_FEATURES])
def test_wrong_features(call, z, error, message):
    with pytest.raises(error, match=message):
        call(z)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("options", "error", "message"), BAD_OPTIONS, ids=[e[2] for e in BAD_OPTIONS]
)
def test_wrong_options(call, options, error, message):
    with pytest.raises(error, match=message):
        call(Z, **options)


@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        (0, ValueError, r"alpha must be > 0, got 0\.0"),
        (-2.5, ValueError, r"alpha must be > 0, got -2\.5"),
        (math.nan, ValueError, "alpha must be > 0, got nan"),
        (-math.inf, ValueError, "alpha must be > 0, got -inf"),
        ("1", TypeError, "alpha must be a Python number, got '1'"),
        (True, TypeError, "alpha must be a Python number, got True"),
        (None, TypeError, "alpha must be a Python number, got None"),
        (torch.tensor(1.0), TypeError, r"alpha must be a Python number, got tensor\(1\.\)"),
    ],
    ids=str,
)
def test_wrong_alpha(alpha, error, message):
    with pytest.raises(error, match=message):
        fast_matrix_entropy(Z, alpha)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (0.0, ValueError, r"scale must be > 0 and finite, got 0\.0"),
        (-1, ValueError, r"scale must be > 0 and finite, got -1\.0"),
        (math.inf, ValueError, "scale must be > 0 and finite, got inf"),
        (math.nan, ValueError, "scale must be > 0 and finite, got nan"),
        ("c", TypeError, "scale must be a Python number, got 'c'"),
        (False, TypeError, "scale must be a Python number, got False"),
    ],
    ids=str,
)
def test_wrong_scale(scale, error, message):
    with pytest.raises(error, match=message):
        fast_coding_rate(Z, scale)


@pytest.mark.parametrize("side", ["rows", None, 0])
def test_wrong_side(side):
    with pytest.raises(ValueError, match=f"side must be one of .*'samples'.*got {side!r}"):
        fast_gram(Z, side=side)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precision_does_not_concern_the_cpu(precision):
    z = features("gaussian", 5, 9)
    for call in CALLS.values():
        assert torch.equal(call(z, precision=precision), call(z))


def test_effective_rank_is_the_exponential_of_the_entropy():
    z = features("gaussian", 2, 5, 9)
    mask = torch.tensor([True, False, True, True, True]).expand(2, 5)
    for options in [{}, {"center": True}, {"normalize": False}, {"mask": mask}]:
        for backend in BACKENDS:
            h = fast_matrix_entropy(z, backend=backend, **options)
            assert torch.equal(effective_rank(z, backend=backend, **options), h.exp())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gram_is_symmetric_with_a_unit_diagonal(backend):
    for dtype in DTYPES:
        for shape in [(2, 9, 40), (2, 40, 9), (2, 33, 33)]:
            z = features("zero rows", *shape, dtype=dtype)
            zero = (z == 0).all(-1)
            for side in ("samples", "features", "auto"):
                for center in (False, True):
                    g = fast_gram(z, side=side, center=center, backend=backend)
                    assert torch.equal(g, g.mT)
            g = fast_gram(z, side="samples", backend=backend)
            diagonal = g.diagonal(dim1=-2, dim2=-1)
            assert torch.equal(diagonal, torch.where(zero, 0, torch.ones_like(diagonal)))


def test_gram_auto_side_is_the_smaller():
    for n, d, k in [(3, 5, 3), (5, 3, 3), (4, 4, 4)]:
        z = features("gaussian", n, d)
        side = "samples" if n <= d else "features"
        assert fast_gram(z).shape == (k, k)
        assert torch.equal(fast_gram(z), fast_gram(z, side=side))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", [15, 18, 20])
def test_many_leading_dimensions(dims, backend):
    z = features("gaussian", *[1] * (dims - 2), 2, 3, 4).squeeze(0)
    assert z.dim() == dims
    value = fast_matrix_entropy(z, backend=backend)
    torch.testing.assert_close(value.reshape(2), fast_matrix_entropy(z.reshape(2, 3, 4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q", QUANTITIES, ids=name)
def test_autocast_changes_nothing(q, backend, dtype):
    for shape, rows in [
        (SHAPES[0], {}),
        (SHAPES[1], ROWS[1]),
        (SHAPES[0], ROWS[1]),
        (SHAPES[2], {}),
    ]:
        z = features("gaussian", *shape)
        function = partial(q.fast, backend=backend, **rows)
        cotangent = torch.ones(q.truth(z).shape)
        plain = run(function, z, cotangent)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(function(z), function(z.clone()))
            cast = run(function, z, cotangent)
        for one, other in zip(cast, plain, strict=True):
            assert one.dtype == torch.float32 and torch.equal(one, other)


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN while this is active."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q", QUANTITIES, ids=name)
def test_outputs_are_written_in_full(q, backend, poisoned_memory):
    for shape in SHAPES:
        for rows in ROWS if len(shape) == 3 else ROWS[:1]:
            for dtype in (torch.float32, torch.bfloat16):
                z = features("gaussian", *shape, dtype=dtype)
                mask = (torch.arange(shape[-2]) % 3 != 0).expand(shape[:-1])
                for options in (rows, rows | {"mask": mask}):
                    cotangent = torch.ones(q.truth(z).shape)
                    value, grad = run(partial(q.fast, backend=backend, **options), z, cotangent)
                    assert value.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q", QUANTITIES, ids=name)
def test_two_runs_are_bitwise_equal(q, backend):
    for shape in SHAPES:
        z = features("gaussian", *shape)
        cotangent = torch.ones(q.truth(z).shape)
        first = run(partial(q.fast, backend=backend), z, cotangent)
        other = features("collapsed", *shape)  # leaves other numbers in the scratch memory
        run(partial(q.fast, backend=backend, center=True), other, cotangent)
        second = run(partial(q.fast, backend=backend), z.clone(), cotangent)
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_results_do_not_alias_the_input():
    z = torch.eye(4)
    for q in QUANTITIES:
        for backend in BACKENDS:
            before = z.clone()
            q.fast(z, backend).add_(1)
            value, grad = run(partial(q.fast, backend=backend), z, torch.ones(q.truth(z).shape))
            value.add_(1), grad.add_(1)
            assert torch.equal(z, before)


THREADS = """
import itertools, math, sys, torch
from functools import partial
sys.path.insert(0, sys.argv[1])
from accuracy import DTYPES, coding_rate, entropy, features, gram, poison_scratch, run
small = [(1, 3, 5), (5, 20, 33), (5, 33, 20), (40, 12, 20), (40, 20, 12), (18, 64, 64)]
large = [(1, 120, 200), (200, 120), (1, 197, 300), (390, 400)]
quantities = [coding_rate(1.0), *map(entropy, (1.0, 1.5, 2.0, 3.0, math.inf))]
quantities += [gram("samples"), gram("features")]
results = {}
for (i, shape), (j, q) in itertools.product(enumerate(small + large), enumerate(quantities)):
    for backend in ("cpu", "torch") if i % 3 == 1 and j % 2 else ("cpu",):
        z = features("gaussian", *shape, dtype=DTYPES[(i + j) % 4])
        mask = torch.arange(shape[-2]).expand(shape[:-1]) % 4 != 1
        rows = [{}, {"center": True}, {"normalize": False}, {"mask": mask}][(i + j // 3) % 4]
        function = partial(q.fast, backend=backend, **rows)
        cotangent = torch.ones(q.truth(z).shape)
        first = run(function, z, cotangent)
        poison_scratch(80)
        second = run(function, z.clone(), cotangent)
        assert torch.equal(first[0], second[0]), (q, backend, shape)
        assert torch.equal(first[1], second[1]), (q, backend, shape)
        results[f"{q} {backend} {shape}"] = first
torch.save((torch.get_num_threads(), results), sys.argv[2])
"""


def test_thread_counts_agree(tmp_path):
    """Each count reproduces itself bit for bit; two counts differ by the order of sums at most.

    A process per count: torch.set_num_threads in a running one changes how MKL waits for threads,
    and its LAPACK has been seen to wait for ever.
    """
    results = []
    for count in (1, 2):
        path = tmp_path / f"{count}.pt"
        arguments = [sys.executable, "-c", THREADS, str(Path(__file__).parent), str(path)]
        environment = os.environ | {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}
        subprocess.run(arguments, env=environment, check=True, timeout=300)
        threads, values = torch.load(path)
        assert threads == count
        results.append(values)
    assert results[0].keys() == results[1].keys() and len(results[0]) > 80
    for key, pair in results[0].items():
        for one, other in zip(pair, results[1][key], strict=True):
            eps = torch.finfo(one.dtype).eps  # a 16-bit gradient may round to a neighbour
            bound = max(1e-5, eps) * (1 + one.abs().max().item())
            torch.testing.assert_close(one, other, rtol=0, atol=bound, msg=key)
