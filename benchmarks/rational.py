"""Poles of mmae_fast/backends/rational.py, and what the method costs in accuracy.

    python -m benchmarks.rational           the constants, by Remez exchange, float64
    python -m benchmarks.rational --errors  the table of docs/algorithms.md

The best approximation of f(x) = -x log x on [0, 1] by ``r(x) = sum_i w_i x / (x + u_i) + b x`` with
m poles has an error of 2m + 2 equal extrema of alternating sign; it is found by Newton's method on
those equations for given extrema, which are then found anew. Poles, weights and extrema of m start
from those of m - 1 and m - 2, in logarithms, of which the differences shrink like those of sqrt(m).
"""

import argparse
import functools
from unittest import mock

import numpy as np
import torch

from mmae_fast import fast_matrix_entropy
from mmae_fast.backends import rational

# Close enough to start: poles, and places of the extrema, for m = 2 and m = 3.
SEEDS = (
    ([3e-2, 0.8], [2e-3, 3e-2, 0.1, 0.4, 0.8, 1.0]),
    ([5e-3, 0.1, 1.4], [4e-4, 5e-3, 2e-2, 9e-2, 0.2, 0.5, 0.8, 1.0]),
)


def target(x):
    return -x * np.log(x)


def approximation(x, u, w, b):
    x = np.asarray(x, dtype=np.float64)[..., None]
    return (w * x / (x + u)).sum(-1) + b * x[..., 0]


def solve(x, parameters):
    """Parameters (log u, w, b, E) for which the error at x is E, -E, E ..."""
    m = len(x) // 2 - 1
    sign = (-1.0) ** np.arange(len(x))
    for _ in range(60):
        u, w, b, level = np.exp(parameters[:m]), parameters[m:-2], *parameters[-2:]
        terms = x[:, None] / (x[:, None] + u)
        residual = target(x) - approximation(x, u, w, b) - sign * level
        jacobian = np.column_stack([-w * u * terms / (x[:, None] + u), terms, x, sign])
        size = np.abs(jacobian).max(0)
        step = np.linalg.solve(jacobian / size, residual) / size
        length = min(1.0, 0.7 / np.abs(step[:m]).max())
        parameters = parameters + length * step
        if length == 1 and np.abs(residual).max() < 1e-6 * abs(level) + 1e-16:
            break
    return parameters


def extrema(error):
    """Index of the largest error between changes of its sign."""
    cuts = np.flatnonzero(np.diff(np.sign(error))) + 1
    spans = zip(np.r_[0, cuts], np.r_[cuts, len(error)], strict=True)
    return np.array([first + np.argmax(np.abs(error[first:last])) for first, last in spans])


def exchange(u, x):
    """The best approximation near poles u and extrema x: (parameters, extrema)."""
    m = len(u)
    sign = (-1.0) ** np.arange(len(x))
    linear = np.column_stack([x[:, None] / (x[:, None] + u), x, sign])
    parameters = np.r_[np.log(u), np.linalg.lstsq(linear, target(x), rcond=None)[0]]
    for _ in range(40):
        parameters = solve(x, parameters)
        grid = np.geomspace(x[0] * 1e-3, 1, 20000)
        error = target(grid) - approximation(grid, *unpacked(parameters))
        at = extrema(error)[-(2 * m + 2) :]
        if len(at) < 2 * m + 2:
            raise ArithmeticError(f"{m} poles: the error has {len(at)} extrema")
        x, heights = grid[at], np.abs(error[at])
        parameters[-1] = heights.mean() * np.sign(error[at[0]])
        if heights.max() < heights.min() * (1 + 1e-5):
            return parameters, x
    raise ArithmeticError(f"{m} poles: no convergence")


def unpacked(parameters):
    m = len(parameters) // 2 - 1
    return np.exp(parameters[:m]), parameters[m:-2], parameters[-2]


def continued(before, last, ratio):
    """The next of sequences that grow by one or two, in logarithms."""
    before, last = np.log(before), np.log(last)
    lower = last[: len(before)] + ratio * (last[: len(before)] - before)
    upper = last[-len(before) :] + ratio * (last[-len(before) :] - before)
    size = 2 * len(last) - len(before)
    return np.exp(np.r_[lower[: size // 2], upper[size // 2 - size :]])


def poles(most):
    """(u, w, b, largest error) for m = 2 ... most."""
    found = []
    for m in range(2, most + 1):
        if m - 2 < len(SEEDS):
            u, x = map(np.array, SEEDS[m - 2])
        else:
            ratio = (m**0.5 - (m - 1) ** 0.5) / ((m - 1) ** 0.5 - (m - 2) ** 0.5)
            (before, x_before), (last, x_last) = found[-2:]
            u = continued(unpacked(before)[0], unpacked(last)[0], ratio)
            x = continued(x_before, x_last, ratio)
            x[-1] = 1
        found.append(exchange(u, x))
    return {m: (*unpacked(p), abs(p[-1])) for m, (p, _) in enumerate(found, 2)}


# --------------------------------------------------------------------------------------------------
# Errors

SPECTRA = {
    "flat": lambda i, k: torch.ones(k),
    "Gaussian": lambda i, k: torch.linalg.eigvalsh(
        torch.randn(2 * k, k, generator=torch.Generator().manual_seed(0)).T.cov().double()
    ),
    "1 / i": lambda i, k: 1 / i,
    "1 / i²": lambda i, k: 1 / i**2,
    "half zero": lambda i, k: (i <= k / 2).double(),
    "99% in one": lambda i, k: torch.where(i == 1, 0.99, 0.01 / (k - 1)),
}
# Title, method, dtype of features and factors, poles.
VARIANTS = (
    ("eigen, float32", "eigen", torch.float32, 8),
    ("8 poles, float32", "rational", torch.float32, 8),
    ("8 poles, float64", "rational", torch.float64, 8),
    ("16 poles, float64", "rational", torch.float64, 16),
)


@functools.cache
def bases(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal columns, 2k x k and k x k."""
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(n, k, generator=generator, dtype=torch.float64) for n in (2 * k, k)]
    return tuple(torch.linalg.qr(draw).Q for draw in draws)


def spectrum_errors(lam: torch.Tensor, method: str, dtype, count: int) -> tuple[float, float]:
    """Of the value, absolute, and of the gradient, relative in norm, for 2k x k features."""
    left, right = bases(len(lam))
    rho = lam.double() / lam.double().sum()
    value = torch.special.entr(rho).sum()
    slope = torch.where(rho > 0, -(rho.clamp(min=1e-300).log() + value), 0) * 2 * rho.sqrt()
    z = ((left * rho.sqrt()) @ right.T).to(dtype).requires_grad_()
    with mock.patch.dict(rational.COUNT, {dtype: count}):
        h = fast_matrix_entropy(z, method=method, normalize=False)
        (grad,) = torch.autograd.grad(h, z)
    error = (grad.double() - (left * slope) @ right.T).norm()
    # Of a flat spectrum the gradient is 0: relative to the size of its terms, then.
    size = (2 * rho.sqrt() * rho.clamp(min=1e-300).log()).norm()
    return abs(h.double() - value).item(), (error / size).item()


def print_errors(orders=(64, 256, 1024)) -> None:
    print("| k | eigenvalues | H | " + " | ".join(title for title, *_ in VARIANTS) + " |")
    print("|---:|---|---:|" + "---:|" * len(VARIANTS))
    for k in orders:
        i = torch.arange(1, k + 1, dtype=torch.float64)
        for name, spectrum in SPECTRA.items():
            lam = spectrum(i, k)
            rho = lam.double() / lam.double().sum()
            cells = [spectrum_errors(lam, *variant) for _, *variant in VARIANTS]
            entropy = torch.special.entr(rho).sum().item()
            text = " | ".join(f"{value:.0e}, {grad:.0e}" for value, grad in cells)
            print(f"| {k} | {name} | {entropy:.2f} | {text} |", flush=True)


def main() -> None:
    description = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=description)
    parser.add_argument("--errors", action="store_true")
    if parser.parse_args().errors:
        print_errors()
        return
    for m, (u, w, b, error) in poles(16).items():
        print(f"{m} poles: largest error {error:.3e}, smallest pole {u[0]:.2e}")
        print("  shifts ", [float(f"{x:.15g}") for x in u])
        print("  weights", [float(f"{x:.15g}") for x in w])
        print(f"  slope    {b:.15g}")


if __name__ == "__main__":
    main()
