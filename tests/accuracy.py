"""The accuracy rule of the project, for every test that compares with the float64 reference.

    max |fast - truth|  <=  2 · max |eager - truth|  +  floor,      value and gradient, per matrix.

truth: reference.py in float64; of float64 rows with their singular values for eigenvalues, since
truth and eager would be the same computation otherwise, and no truth for a third. eager: the
expression that users write, in the dtype of the input: ``F.normalize`` → product →
``torch.linalg``, autograd; for 16-bit inputs rows and Gram matrix are 16-bit and the factorisation
is float32. Where eager raises or is not finite its error is infinite. The rule leaves room for no
factor in front of the floor, so the floors are what one honest rounding analysis gives and no more;
see :func:`floors`.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmae_fast import fast_coding_rate, fast_gram, fast_matrix_entropy, reference
from mmae_fast.backends import operators

BACKENDS = ("cpu", "torch")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Quantity(NamedTuple):
    """What is computed: "coding_rate" of a scale, "entropy" of an alpha, or "gram" of a side."""

    kind: str
    parameter: float | str

    def fast(self, z: Tensor, backend: str, **rows) -> Tensor:
        if self.kind == "coding_rate":
            return fast_coding_rate(z, self.parameter, backend=backend, **rows)
        if self.kind == "entropy":
            return fast_matrix_entropy(z, self.parameter, backend=backend, **rows)
        return fast_gram(z, side=self.parameter, backend=backend, **rows)

    def of_gram(self, g: Tensor) -> Tensor:
        if self.kind == "coding_rate":
            return torch.logdet(torch.eye(g.shape[-1], dtype=g.dtype) + self.parameter * g)
        return g if self.kind == "gram" else reference.entropy_of_gram(g, self.parameter)

    def truth(self, z: Tensor, **rows) -> Tensor:
        side = self.parameter if self.kind == "gram" else "auto"
        return self.of_gram(reference.gram(z.double(), side=side, **rows))

    def truth_of_float64(self, z: Tensor, **rows) -> Tensor:
        """The truth for float64 rows.

        Eigenvalues of G are known to eps sigma_max², the squares of singular values to eps sigma
        sigma_max: on decaying spectra the gradient's error is a hundredth.
        """
        if self.kind != "entropy" or self.parameter == 2:
            return self.truth(z, **rows)
        x = reference.prepare(z, **rows)
        poison = (x - x).sum((-2, -1))  # LAPACK rejects NaN and Inf
        sigma = torch.linalg.svdvals(torch.where((poison == 0)[..., None, None], x, 0))
        return self.of_gram(torch.diag_embed(sigma.square())) + poison

    def eager(self, z: Tensor, **rows) -> Tensor:
        x = eager_rows(z, **rows)
        n, d = z.shape[-2:]
        samples = n <= d if self.parameter == "auto" or self.kind != "gram" else None
        if samples is None:
            samples = self.parameter == "samples"
        g = x @ x.mT if samples else x.mT @ x
        return self.of_gram(g.to(reference.accumulation_dtype(z.dtype)))


def eager_rows(z: Tensor, normalize=True, center=False, mask=None) -> Tensor:
    if mask is not None:
        z = torch.where(mask.unsqueeze(-1), z, 0)
    norm = z.detach().double().norm(dim=-1)
    if normalize and z.numel():
        # F.normalize divides by max(norm, 1e-12) and squares entries: outside of that range it is
        # another function, and measuring with its error would let anything pass.
        inside = ((norm > 1e-6) & (norm < 1e15)).all()
        z = F.normalize(z, dim=-1) if inside else reference.prepare(z).to(z.dtype)
    if center and z.shape[-2]:
        if mask is None:
            return z - z.mean(-2, keepdim=True)
        kept = mask.unsqueeze(-1).sum(-2, keepdim=True).clamp(min=1)
        z = torch.where(mask.unsqueeze(-1), z - z.sum(-2, keepdim=True) / kept, 0)
    return z


def entropy(alpha: float) -> Quantity:
    return Quantity("entropy", alpha)


def coding_rate(scale: float) -> Quantity:
    return Quantity("coding_rate", scale)


def gram(side: str) -> Quantity:
    return Quantity("gram", side)


def run(function, z: Tensor, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Value, and gradient of ``(value · cotangent).sum()`` if there is a cotangent."""
    if cotangent is None:
        return function(z.detach()), None
    z = z.detach().requires_grad_()  # detach keeps the strides
    value = function(z)
    (value * cotangent.to(value.dtype)).sum().backward()
    return value.detach(), z.grad


def largest(x: Tensor, dims: int) -> Tensor:
    """Largest absolute entry over the last ``dims`` dimensions, NaN as infinity, 0 if none."""
    x = x.double().abs().nan_to_num(math.inf, math.inf)
    if not dims:
        return x
    x = x.flatten(-dims)
    return x.amax(-1) if x.shape[-1] else x.sum(-1)


def spectral_terms(q: Quantity, lam: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """h and f = dh/d lam per eigenvalue of G or rho, and the size of f before cancellations."""
    if q.kind == "coding_rate":
        f = q.parameter / (1 + q.parameter * lam)
        return (q.parameter * lam).log1p(), f, f
    alpha = q.parameter
    safe = lam.clamp(min=torch.finfo(lam.dtype).tiny)
    if alpha == 1:
        return torch.special.entr(lam), -safe.log(), safe.log().abs() + 1
    if math.isinf(alpha):
        top = torch.zeros_like(lam)
        top[..., :1] = 1  # singular values come in descending order
        return -top * safe.log(), -top / safe, top / safe + 1
    f = alpha / (1 - alpha) * safe.pow(alpha - 1) / total
    return lam.pow(alpha) / (total * (1 - alpha)), f, f.abs() + abs(alpha / (1 - alpha))


def floors(q: Quantity, z: Tensor, value: Tensor, rows: dict) -> tuple[Tensor, Tensor]:
    """What rounding alone may do to the value and to the gradient of z, per matrix.

    eps is that of the accumulation dtype; x the exact prepared rows, r the longest of them before
    centring, s = max 1 / |z_i| (1 without normalisation), k = min(n, d); lam the eigenvalues (of G
    for the coding rate, of rho for entropies); the value is a sum of h(lam), and f = h'.

    | what                    | floor                                                           |
    |-------------------------|-----------------------------------------------------------------|
    | coding rate             | eps (4 |value| + 2 k)                          + |dh|_2         |
    | entropy                 | eps (4 |value| + 4 sqrt k + 4 |a / (1 - a)|)   + |dh|_2         |
    | Gram entry              | 4 eps max |v|², v the rows or columns, centred or not           |
    | ... of float64          | max(4, m / 4) eps max |v|², m the entries of v                  |
    | gradient, value         | 2 s / tau (4 eps max |f| (sqrt(k) |x|_2 + r)    + max |df| sigma) |
    | gradient, Gram matrix   | 8 s eps r sqrt(rows summed) max |cotangent|                     |
    | ... of a 16-bit z       | + eps(16-bit) max |gradient| + its smallest subnormal           |

    Left: a handful of roundings. The result's own; half a unit for every pivot of I + cG near 1,
    twice because Cholesky takes its root; a random walk over k eigenvalues; a trace that is off by
    a few eps, which alpha near 1 magnifies; a k-term product with a weight f(G) of that norm.
    Right: the conditioning. A backward stable method is exact for a Gram matrix that is off by
    delta = 4 eps (lam_max + sqrt(n) r sqrt(lam_max) if centred: the subtraction keeps the rounding
    of the rows that went in). Weyl moves no eigenvalue by more, and dh, df are the changes of h, f.
    They matter where f is steep: at zero eigenvalues for alpha <= 1 (noise enters as noise^alpha),
    at small ones of log det(I + cG) with c lam_max >> 1, at a small gap for alpha = inf.
    The float64 truth is itself computed, by the same rounding: what covers one covers both. Of a
    Gram matrix eager is the truth and allows nothing, so that the length of the sums in an entry
    has to be counted: m equal products may round the same way, by half an eps of a sum that grows
    to |v|².
    """
    dtype = reference.accumulation_dtype(z.dtype)
    eps = torch.finfo(dtype).eps
    z = z.detach().double()
    n, k = z.shape[-2], min(z.shape[-2:])
    x = reference.prepare(z, **rows)
    uncentred = reference.prepare(z, **rows | {"center": False})
    longest = largest(torch.linalg.vector_norm(uncentred, dim=-1), 1)
    slope = torch.ones_like(longest)
    if rows.get("normalize", True):
        norm = reference.prepare(z, normalize=False, mask=rows.get("mask")).norm(dim=-1)
        slope = largest(torch.where(norm > 0, 1 / norm, 0), 1)
    if q.kind == "gram":
        dim = -1 if q.parameter == "samples" else -2
        # A centred row can be twice as long as the unit rows that it is the difference of.
        lengths = [torch.linalg.vector_norm(rows_of, dim=dim) for rows_of in (uncentred, x)]
        vectors = torch.maximum(*(largest(length, 1) for length in lengths))
        summed = math.sqrt(max(z.shape[-2 if dim == -1 else -1], 1))
        roundings = max(4, z.shape[dim] / 4) if dtype == torch.float64 else 4
        return roundings * eps * vectors**2, 8 * eps * longest * slope * summed
    sigma = torch.linalg.svdvals(x)  # resolves what eigenvalues of G lose below eps lam_max
    lam = sigma.square()
    tau = torch.ones_like(longest)
    if q.kind == "entropy":
        tau = torch.where(lam.sum(-1) == 0, 1, lam.sum(-1))
    norm = sigma[..., :1].sum(-1)
    delta = 4 * eps * norm**2
    if rows.get("center"):
        delta = delta + 4 * eps * n**0.5 * longest * (norm + eps * n**0.5 * longest)
    rho, delta = lam / tau.unsqueeze(-1), (delta / tau).unsqueeze(-1)
    total = None
    if q.kind == "entropy":
        total = rho.pow(q.parameter).sum(-1, keepdim=True)
        total = torch.where(total == 0, 1, total)
    h = spectral_terms(q, rho, total)[0]
    # No backend evaluates f closer to zero than a tenth of eps.
    _, f, size = spectral_terms(q, torch.maximum(rho, delta / 40), total)
    up, steep, _ = spectral_terms(q, rho + delta, total)
    down, _, size_down = spectral_terms(q, (rho - delta).clamp(min=0), total)
    if q.kind == "coding_rate":  # its f is largest where delta has taken all of an eigenvalue
        size = size_down
    conditioning = torch.maximum((up - h).abs(), (down - h).abs()).norm(dim=-1)
    roundings = 4 * value.abs() + (2 * k if q.kind == "coding_rate" else 4 * k**0.5)
    if q.kind == "entropy" and q.parameter not in (1, math.inf):
        roundings = roundings + 4 * abs(q.parameter / (1 - q.parameter))
    turn = (steep - f).abs()
    if q.parameter == math.inf and k > 1:
        gap = (rho[..., :1] - rho[..., 1:2]).clamp(min=1e-300)
        turn = turn + f.abs() * (delta / gap).clamp(max=1)
    derivative = 4 * eps * largest(size, 1) * (norm * k**0.5 + longest)
    derivative = derivative + largest(turn * sigma, 1)
    return eps * roundings + conditioning, 2 * derivative * slope / tau


class Result(NamedTuple):
    value: Tensor
    grad: Tensor | None


def expected(q: Quantity, z: Tensor, rows: dict, need_grad: bool = True):
    """Truth, cotangent, and the largest errors of value and gradient that the rule allows."""
    shape = q.truth(z, **rows).shape
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(shape, generator=generator, dtype=torch.float64) if need_grad else None
    true = q.truth_of_float64 if z.dtype == torch.float64 else q.truth
    truth = Result(*run(partial(true, **rows), z.double(), cotangent))
    dims = 2 if q.kind == "gram" else 0
    try:
        eager = Result(*run(partial(q.eager, **rows), z, cotangent))
        value_error = 2 * largest(eager.value.double() - truth.value, dims)
        grad_error = 2 * largest(eager.grad.double() - truth.grad, 2) if need_grad else None
    except torch.linalg.LinAlgError:
        value_error = grad_error = torch.full(z.shape[:-2], math.inf)
    value_floor, grad_floor = floors(q, z, truth.value, rows)
    if not need_grad:
        return truth, None, value_error + value_floor, None
    grad_floor = grad_floor * largest(cotangent, dims)
    if z.dtype in (torch.bfloat16, torch.float16):
        info = torch.finfo(z.dtype)
        tiny = info.smallest_normal * info.eps
        grad_floor = grad_floor + info.eps * largest(truth.grad, 2) + tiny
    return truth, cotangent, value_error + value_floor, grad_error + grad_floor


def check(q: Quantity, z: Tensor, *, need_grad: bool = True, backends=BACKENDS, **rows) -> None:
    """The rule, for value and gradient of every backend, with every violation in the message."""
    truth, cotangent, value_allowed, grad_allowed = expected(q, z, rows, need_grad)
    dims = 2 if q.kind == "gram" else 0
    failures = []
    for backend in backends:
        fast = Result(*run(partial(q.fast, backend=backend, **rows), z, cotangent))
        assert fast.value.dtype == reference.accumulation_dtype(z.dtype)
        assert fast.value.shape == truth.value.shape
        pairs = [("value", largest(fast.value.double() - truth.value, dims), value_allowed)]
        if need_grad:
            assert fast.grad.dtype == z.dtype and fast.grad.shape == z.shape
            pairs += [("gradient", largest(fast.grad.double() - truth.grad, 2), grad_allowed)]
        for name, error, allowed in pairs:
            bad = ~(error <= allowed)
            if bad.any():
                at = tuple(bad.nonzero()[0].tolist())
                failures.append(
                    f"{backend} {name}{list(at)}: error {error[at]:.3g}, allowed {allowed[at]:.3g}"
                    f" ({error[at] / allowed[at]:.3g}x), {int(bad.sum())} of {bad.numel()} matrices"
                )
    options = rows | ({"mask": "..."} if "mask" in rows else {})
    about = f"{q.kind}({q.parameter}) {tuple(z.shape)} {z.dtype} {options}"
    assert not failures, "\n".join([about, *failures])


def by_operator(q: Quantity, z: Tensor, backend: str, normalize=True, center=False, mask=None):
    """q by a GPU's backend on CPU tensors, emulated or interpreted: past the public function."""
    if q.kind == "gram":
        return operators.gram(z, mask, q.parameter == "samples", normalize, center, backend)[0]
    op = operators.coding_rate if q.kind == "coding_rate" else operators.matrix_entropy
    return op(z, mask, float(q.parameter), normalize, center, z.requires_grad, backend)[0]


def check_operator(q: Quantity, z: Tensor, backend: str, need_grad: bool = True, **rows) -> None:
    """The rule for by_operator: value, with and without the weight, and gradient."""
    truth, cotangent, value_allowed, grad_allowed = expected(q, z, rows, need_grad)
    dims = 2 if q.kind == "gram" else 0
    call = partial(by_operator, q, backend=backend, **rows)
    results = []
    if q.kind != "gram" or not need_grad:  # there is no weight to a Gram matrix
        results.append(("value", run(call, z, None)[0], truth.value, value_allowed))
    if need_grad:
        value, grad = run(call, z, cotangent)
        assert grad.dtype == z.dtype
        results.append(("value with weight", value, truth.value, value_allowed))
        results.append(("gradient", grad, truth.grad, grad_allowed))
    for name, got, wanted, allowed in results:
        assert got.shape == wanted.shape
        error = largest(got.double() - wanted, 2 if name == "gradient" else dims)
        assert (error <= allowed).all() and error.isfinite().all(), (
            f"{name} of {q}, {tuple(z.shape)} {z.dtype} {rows}: {error} allowed {allowed}"
        )


def features(kind: str, *shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    """Inputs of every kind that breaks something somewhere, shape (..., n, d)."""
    generator = torch.Generator().manual_seed(seed)
    *batch, n, d = shape

    def randn(*size):
        return torch.randn(*batch, *size, generator=generator, dtype=torch.float64)

    if kind == "gaussian":
        z = randn(n, d)
    elif kind == "collapsed":
        z = randn(1, d) + 1e-3 * randn(n, d)
    elif kind == "rank1":  # both signs, so that centring leaves something
        z = torch.where(torch.arange(n) % 2 == 0, 1.0, -0.5).unsqueeze(-1) * randn(1, d)
    elif kind == "rank3":
        z = randn(n, 3) @ randn(3, d)
    elif kind == "duplicates":
        z = randn((n + 1) // 2, d).repeat_interleave(2, -2)[..., :n, :]
    elif kind == "zero rows":
        z = randn(n, d) * (torch.arange(n) % 3 != 0).unsqueeze(-1)
    elif kind == "zeros":
        z = 0 * randn(n, d)
    elif kind == "decaying":
        z = randn(n, d) * torch.logspace(0, -6, d, dtype=torch.float64)
    elif kind == "orthonormal":  # repeated eigenvalues
        z = torch.linalg.qr(randn(max(n, d), min(n, d)))[0]
        z = z.mT if n < d else z
    else:
        raise ValueError(kind)
    return z.to(dtype).contiguous()


def poison_scratch(size: int) -> None:
    """Leaves NaN in the memory that the compiled kernels keep between calls."""
    for dtype in (torch.float32, torch.float64):
        fast_gram(torch.full((size, size), math.nan, dtype=dtype), backend="cpu")


def compact() -> None:
    """The rule on a few cases that reach every compiled loop, on both sides of k = min(n, d)."""
    spectral = [coding_rate(1.0), *map(entropy, (1.0, 2.0, 3.0, math.inf))]
    quantities = [*spectral, gram("samples"), gram("features")]
    few = [(3, 1, 5), (3, 17, 8), (2, 33, 49), (3, 65, 31), (2, 50, 200), (3, 64, 64)]
    many = [(40, 5, 9), (17, 31, 12), (33, 8, 8), (20, 14, 48), (19, 48, 30), (18, 64, 70)]
    large = [(2, 197, 220), (2, 220, 197), (1, 300, 320), (1, 320, 300)]
    options = [{}, {"center": True}, {"normalize": False}, {"normalize": False, "center": True}]
    for i, shape in enumerate([*few, *many, *large]):
        for j, dtype in enumerate(DTYPES):
            z = features("gaussian", *shape, dtype=dtype)
            rows = dict(options[(i + j) % 4])
            if (i + j // 2) % 2:
                rows["mask"] = torch.arange(shape[1]).expand(shape[:2]) % 5 != 2
            if (i + j) % 3 == 1:
                z = z.mT.contiguous().mT
            elif (i + j) % 3 == 2:
                z = torch.stack([z, z], -1).flatten(-2)[..., ::2]
            turns = quantities
            if shape in large:  # slow, above all their truth: every quantity with two dtypes
                turns = [q for at, q in enumerate(quantities) if (at + i + j) % 2]
            for q in turns:
                poison_scratch(max(shape[1:]))
                check(q, z, backends=("cpu",), **rows)


if __name__ == "__main__":  # a process of its own per instruction set, see test_dispatch.py
    compact()
    print(torch.ops.mmae_fast.cpu_isa())
