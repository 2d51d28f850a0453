"""Poles of mmae_fast/rational.py, and what the method costs in accuracy.

    python -m benchmarks.rational           the constants, by Remez exchange, float64
    python -m benchmarks.rational --errors  the table of docs/algorithms.md

The best approximation of f(x) = -x log x on [0, 1] by ``r(x) = sum_i w_i x / (x + u_i) + b x`` with
m poles has an error of 2m + 2 equal extrema of alternating sign; it is found by Newton's method on
those equations for given extrema, which are then found anew. Poles, weights and extrema of m start
from those of m - 1 and m - 2, in logarithms, of which the differences shrink like those of sqrt(m).
"""

import argparse

import numpy as np

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--errors", action="store_true")
    for m, (u, w, b, error) in poles(16).items():
        print(f"{m} poles: largest error {error:.3e}, smallest pole {u[0]:.2e}")
        print(" ", [float(f"{x:.15g}") for x in u], [float(f"{x:.15g}") for x in w], b)


if __name__ == "__main__":
    main()
