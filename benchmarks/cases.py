"""What is measured: shapes, quantities, implementations, and the least work each case needs.

An implementation maps features z to a value; the gradient is the product of the value's
derivative with a fixed cotangent (ones; random for the Gram matrix). ``eager`` is what people write
today: ``F.normalize``, ``x @ x.mT`` or ``x.mT @ x``, ``torch.linalg``, autograd. It always gets the
smaller of the two, and a clamped spectrum, so that no ratio comes from a bad habit.

Least work, the roofline (k = min(n, d), m = max(n, d), s bytes per entry of z, per matrix; leading
terms; a lower bound for any implementation that runs forward and backward one after the other):

| quantity     | flops forward    | + for the gradient | bytes forward | + for the gradient |
|--------------|------------------|--------------------|---------------|--------------------|
| gram         | k(k+1)m          | 2k²m               | snd + 4k²     | 2snd + 4k²         |
| coding rate  | k(k+1)m + k³/3   | 2k²m + 2k³/3       | snd           | 2snd               |
| Rényi-2      | k(k+1)m + k²     | 2k²m               | snd           | 2snd               |
| Rényi-3      | k(k+1)m + k³     | 2k²m               | snd           | 2snd               |
| Rényi-∞      | k(k+1)m + 2k²    | 4km                | snd           | 2snd               |
| von Neumann  | k(k+1)m + 4k³/3  | 2k²m + 3k³         | snd           | 2snd               |
| joint        | n(n+1)d + 3n²    | 2n²d               | snd           | 2snd               |
| ready        | n(n+1)d + 4n³/3  | 2n²d + 3n³         | snd           | 2snd               |

k(k+1)m is one triangle of a symmetric product; 2k²m the one product that a closed-form gradient
needs; k³/3 a Cholesky factor and 2k³/3 the inverse from it; 4k³/3 the reduction to tridiagonal
form, 2k³ its back-transformation and k³ the function of the matrix (the eigenvectors of the
tridiagonal matrix are not counted: their cost depends on the spectrum); k³ one triangle of the
square of a symmetric matrix; 2k² one product with a vector, the least that the largest eigenvalue
takes, and 4km a matrix of rank one times z, all that its gradient takes. "joint" is the Rényi-2
joint entropy of two views, the halves of the columns of z, on n x n matrices; "ready" is their von
Neumann joint entropy from ready Gram matrices, which are PyTorch's products for everybody.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmae_fast import fast_coding_rate, fast_gram, fast_matrix_entropy, information, reference
from mmae_fast.backends import dispatch

DIRECTIONS = ("fwd", "fwd+bwd")


class Shape(NamedTuple):
    batch: int
    n: int
    d: int
    dtype: str = "float32"

    @property
    def label(self) -> str:
        suffix = {"float32": "", "bfloat16": " bf16"}.get(self.dtype, f" {self.dtype}")
        return f"{self.batch}×{self.n}×{self.d}{suffix}"

    @property
    def k(self) -> int:
        return min(self.n, self.d)

    @property
    def bytes(self) -> int:
        """Bytes of z."""
        return self.batch * self.n * self.d * getattr(torch, self.dtype).itemsize


# Who has these shapes: tokens of a ViT per image, heads of a transformer, class tokens of a batch,
# small groups of small features; tokens per head, tokens of a sentence, memory banks.
CPU_SHAPES = (
    Shape(256, 50, 768),
    Shape(1024, 64, 64),
    Shape(64, 197, 768),
    Shape(4096, 16, 32),
    Shape(1, 1024, 768),
    Shape(1, 4096, 768),
    Shape(512, 197, 64),
    Shape(128, 128, 256),
    Shape(8, 384, 1024),
    Shape(1, 16384, 384),
    Shape(1, 8192, 1024),
    Shape(1, 65536, 384),
)
_GPU = (
    (1, 1024, 768),
    (256, 50, 768),
    (1024, 64, 64),
    (256, 197, 768),
    (1, 4096, 1024),
    (1, 65536, 4096),
)
GPU_SHAPES = tuple(Shape(*s) for s in _GPU) + tuple(Shape(*s, "bfloat16") for s in _GPU)
QUICK_SHAPES = (Shape(4, 6, 8), Shape(1, 40, 12))


# --------------------------------------------------------------------------------------------------
# What people write


def eager_gram(z: Tensor) -> Tensor:
    x = F.normalize(z, dim=-1)
    return x @ x.mT if z.shape[-2] <= z.shape[-1] else x.mT @ x


def _eager_float(z: Tensor) -> Tensor:
    g = eager_gram(z)
    return g if g.dtype == torch.float64 else g.float()  # torch.linalg has no 16-bit


def _regularised(z: Tensor) -> Tensor:
    g = _eager_float(z)
    return torch.eye(g.shape[-1], dtype=g.dtype, device=g.device) + g / z.shape[-1]


def eager_coding_rate(z: Tensor) -> Tensor:
    return torch.logdet(_regularised(z))


def cholesky_coding_rate(z: Tensor) -> Tensor:
    """The rewrite an expert makes first: one Cholesky factor, errors not looked at."""
    factor = torch.linalg.cholesky_ex(_regularised(z)).L
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _trace_one(g: Tensor) -> Tensor:
    return g / g.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _density(z: Tensor) -> Tensor:
    return _trace_one(_eager_float(z))


def eager_renyi2(z: Tensor) -> Tensor:
    return -2 * torch.linalg.matrix_norm(_density(z)).log()


def _von_neumann(rho: Tensor) -> Tensor:
    lam = torch.linalg.eigvalsh(rho).clamp(min=1e-12)  # rounding makes negative ones
    return -torch.special.xlogy(lam, lam).sum(-1)


def eager_von_neumann(z: Tensor) -> Tensor:
    return _von_neumann(_density(z))


def eager_renyi3(z: Tensor) -> Tensor:
    return -torch.linalg.eigvalsh(_density(z)).pow(3).sum(-1).log() / 2


def eager_renyi_inf(z: Tensor) -> Tensor:
    return -torch.linalg.eigvalsh(_density(z))[..., -1].log()


def halves(z: Tensor) -> tuple[Tensor, Tensor]:
    """Two views."""
    middle = z.shape[-1] // 2
    return z[..., :middle], z[..., middle:]


def eager_joint2(z: Tensor) -> Tensor:
    x, y = (F.normalize(view, dim=-1) for view in halves(z))
    k = ((x @ x.mT) * (y @ y.mT)).float()
    return -2 * torch.linalg.matrix_norm(_trace_one(k)).log()


def _products(z: Tensor) -> tuple[Tensor, Tensor]:
    """Ready Gram matrices of the two views, rows as they are."""
    x, y = halves(z)
    return x @ x.mT, y @ y.mT


class Quantity(NamedTuple):
    title: str
    fast: Callable  # (z, backend) -> value
    eager: Callable  # z -> value
    truth: Callable  # z in float64 -> value


QUANTITIES = {
    "gram": Quantity(
        "Gram matrix", lambda z, b: fast_gram(z, backend=b), eager_gram, reference.gram
    ),
    "coding_rate": Quantity(
        "coding rate",
        lambda z, b: fast_coding_rate(z, 1 / z.shape[-1], backend=b),
        eager_coding_rate,
        lambda z: reference.coding_rate(z, 1 / z.shape[-1]),
    ),
    "renyi2": Quantity(
        "Rényi-2",
        lambda z, b: fast_matrix_entropy(z, 2, backend=b),
        eager_renyi2,
        lambda z: reference.matrix_entropy(z, 2),
    ),
    "renyi3": Quantity(
        "Rényi-3",
        lambda z, b: fast_matrix_entropy(z, 3, backend=b),
        eager_renyi3,
        lambda z: reference.matrix_entropy(z, 3),
    ),
    "renyi_inf": Quantity(
        "Rényi-∞",
        lambda z, b: fast_matrix_entropy(z, math.inf, backend=b),
        eager_renyi_inf,
        lambda z: reference.matrix_entropy(z, math.inf),
    ),
    "joint2": Quantity(
        "joint Rényi-2",
        lambda z, b: information.joint_entropy(*halves(z), 2, backend=b),
        eager_joint2,
        lambda z: reference.joint_entropy(*halves(z), 2),
    ),
    "ready1": Quantity(
        "ready joint von Neumann",
        lambda z, b: information.joint_entropy(*_products(z), 1, from_gram=True, backend=b),
        lambda z: _von_neumann(_trace_one(math.prod(_products(z)))),
        lambda z: reference.entropy_of_gram(math.prod(_products(z)), 1),
    ),
    "von_neumann": Quantity(
        "von Neumann",
        lambda z, b: fast_matrix_entropy(z, 1, backend=b),
        eager_von_neumann,
        lambda z: reference.matrix_entropy(z, 1),
    ),
}


def measured(shape: Shape, quantity: str, device: str) -> bool:
    """Whether there is a row for it: n x n matrices of large n, and GPU time, are left out."""
    if quantity == "joint2":
        return device == "cpu" and shape.n <= 1024
    if quantity == "ready1":
        return device == "cpu" and shape.n <= 64
    return device == "cpu" or quantity not in ("renyi3", "renyi_inf")


def least_work(shape: Shape, quantity: str, direction: str) -> tuple[float, float]:
    """Flops and bytes of the table at the head of this file."""
    k, m = shape.k, max(shape.n, shape.d)
    if quantity in ("joint2", "ready1"):
        k, m = shape.n, shape.d
    forward = {"coding_rate": k**3 / 3, "renyi2": k**2, "renyi3": k**3, "joint2": 3 * k**2}
    forward["von_neumann"] = forward["ready1"] = 4 * k**3 / 3
    forward["renyi_inf"] = 2 * k**2
    gradient = {"coding_rate": 2 * k**3 / 3, "von_neumann": 3 * k**3, "ready1": 3 * k**3}
    flops = k * (k + 1) * m + forward.get(quantity, 0)
    result = 4 * k * k * shape.batch if quantity == "gram" else 0
    size = shape.bytes + result
    if direction == "fwd+bwd":
        product = 4 * k * m if quantity == "renyi_inf" else 2 * k * k * m
        flops += product + gradient.get(quantity, 0)
        size += 2 * shape.bytes + result
    return float(shape.batch * flops), float(size)


# --------------------------------------------------------------------------------------------------
# Inputs, calls, implementations


def make_inputs(shape: Shape, device: str, count: int | None = None) -> list[Tensor]:
    """Gaussian features; by default so many that a call finds none of its input in a cache."""
    if count is None:
        budget, most = (512 << 20, 64) if device == "cuda" else (160 << 20, 32)
        count = max(2, min(most, math.ceil(budget / shape.bytes)))
    generator = torch.Generator(device).manual_seed(0)
    size = shape[:3] if shape.batch > 1 else shape[1:3]
    dtype = getattr(torch, shape.dtype)
    draw = lambda: torch.randn(size, generator=generator, device=device).to(dtype)  # noqa: E731
    return [draw() for _ in range(count)]


def cotangent(quantity: str, z: Tensor) -> Tensor:
    """What the gradient is multiplied with, in float64, the same for every implementation."""
    k = min(z.shape[-2:])
    shape = z.shape[:-2] + ((k, k) if quantity == "gram" else ())
    if quantity != "gram":
        return torch.ones(shape, dtype=torch.float64, device=z.device)
    generator = torch.Generator(z.device).manual_seed(1)
    return torch.randn(shape, generator=generator, device=z.device, dtype=torch.float64)


def value_dtype(implementation: str, quantity: str, dtype: str) -> torch.dtype:
    """Everything is float32 but the Gram matrix of those who do not accumulate."""
    own = quantity == "gram" and not implementation.startswith("fast")
    return getattr(torch, dtype) if own else torch.float32


def run(function: Callable, z: Tensor, direction: str, grad: Tensor) -> tuple[Tensor, ...]:
    """(value,) or (value, gradient)."""
    if direction == "fwd":
        return (function(z),)
    z = z.detach().requires_grad_()
    value = function(z)
    return value.detach(), torch.autograd.grad(value, z, grad)[0]


def calls(function, inputs: list[Tensor], direction: str, grad: Tensor) -> list[Callable]:
    """One call without arguments per input."""
    return [lambda z=z: run(function, z, direction, grad) for z in inputs]


def graphed_calls(function, inputs: list[Tensor], direction: str, grad: Tensor) -> list[Callable]:
    """The same as replays of CUDA graphs: what remains when Python and launches cost nothing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # handles and workspaces must exist before the capture
        for z in inputs[:2]:
            run(function, z, direction, grad)
    torch.cuda.current_stream().wait_stream(side)
    replays = []
    for z in inputs[:32]:  # as many as one of the largest caches does not hold
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(function, z, direction, grad)
        replays.append(lambda graph=graph, out=out: graph.replay() or out)
    return replays


class Implementation(NamedTuple):
    """``prepare(inputs, direction, grad)`` makes the calls; slow if that takes long or may fail."""

    prepare: Callable
    slow: bool = False


def _plain(function) -> Implementation:
    return Implementation(lambda *args: calls(function, *args))


def _compiled(function) -> Implementation:
    def prepare(inputs, direction, grad):
        torch._dynamo.reset()
        return calls(torch.compile(function, dynamic=False), inputs, direction, grad)

    return Implementation(prepare, slow=True)


def implementations(
    quantity: str, shape: Shape, device: str, vendor: bool = False
) -> dict[str, Implementation]:
    """By name; "fast" first (the backend that users get), then the ones it is compared with."""
    q = QUANTITIES[quantity]
    found = {"fast": _plain(lambda z: q.fast(z, "auto")), "eager": _plain(q.eager)}
    if quantity == "coding_rate":
        found["cholesky_ex"] = _plain(cholesky_coding_rate)
    if quantity == "von_neumann" and shape.batch == 1:
        found["fast (rational)"] = _plain(lambda z: fast_matrix_entropy(z, method="rational"))
    if device != "cuda":
        return found
    if vendor and quantity == "von_neumann":
        from .vendor import batched_von_neumann

        found["XsyevBatched"] = _plain(lambda z: batched_von_neumann(_density(z)))
    for backend in ("auto", *dispatch.BACKENDS):
        if backend == dispatch.select_backend("auto", device):
            continue
        if backend != "auto" and dispatch.refusal(backend, device) is not None:
            continue
        name = "fast" if backend == "auto" else f"fast[{backend}]"
        function = lambda z, b=backend: q.fast(z, b)  # noqa: E731
        found[name] = _plain(function)
        if quantity in ("coding_rate", "renyi2"):  # no synchronisation with the host inside
            found[f"{name} (CUDA graph)"] = Implementation(partial(graphed_calls, function), True)
    found["torch.compile"] = _compiled(q.eager)
    return found


def backend_of(implementation: str, device: str) -> str | None:
    """Which of our backends is behind a name of :func:`implementations`; None for the others."""
    if not implementation.startswith("fast"):
        return None
    if named := re.search(r"\[(\w+)\]", implementation):
        return named[1]
    return dispatch.select_backend("auto", device)
