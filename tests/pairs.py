"""Two views, and the accuracy rule of accuracy.py for their joint entropy: joint_floors."""

import math
from functools import partial

import torch
import torch.nn.functional as F

from mmae_fast import reference
from mmae_fast.information import joint_entropy

from .accuracy import BACKENDS, eager_rows, entropy, features, largest, spectral_terms

ALPHAS = (0.5, 1.0, 1.01, 2.0, 3.0, math.inf)
ROWS = [{}, {"center": True}, {"normalize": False}, {"normalize": False, "center": True}]


def views(*shape, d2=None, kind="gaussian", kind2="gaussian", dtype=torch.float64, seed=0):
    *batch, n, d = shape
    z1 = features(kind, *batch, n, d, dtype=dtype, seed=2 * seed)
    return z1, features(kind2, *batch, n, d2 or d, dtype=dtype, seed=2 * seed + 1)


def joint_floors(alpha, z1, z2, value, rows):
    """What rounding may do to the value and to both gradients; compare accuracy.floors.

    K1 ⊙ K2 is the Gram matrix of the rows w_i = x_i ⊗ y_i; r1, r2 are the longest rows. Gram
    matrices are off by e_v = 4 eps lam_max(K_v) (more if centred), and a Hadamard product with a
    positive semi-definite matrix of diagonal at most r² magnifies a norm by at most r², so

        delta = r2² e_1 + r1² e_2   in place of   4 eps lam_max.

    Row i of the gradient (V ⊙ K2) X1 is row i of V W contracted with y_i, so the floor is that of
    the features W, times r2 (and the like for view 2).
    """
    q = entropy(alpha)
    eps = torch.finfo(reference.accumulation_dtype(z1.dtype)).eps
    n = z1.shape[-2]
    x, longest, slopes, errors = [], [], [], []
    for z in (z1.detach().double(), z2.detach().double()):
        x.append(reference.prepare(z, **rows))
        uncentred = reference.prepare(z, **rows | {"center": False})
        longest.append(largest(torch.linalg.vector_norm(uncentred, dim=-1), 1))
        slope = torch.ones_like(longest[-1])
        if rows.get("normalize", True):
            norm = reference.prepare(z, normalize=False, mask=rows.get("mask")).norm(dim=-1)
            slope = largest(torch.where(norm > 0, 1 / norm, 0), 1)
        slopes.append(slope)
        norm = torch.linalg.matrix_norm(x[-1], 2)
        error = 4 * eps * norm**2
        if rows.get("center"):
            r = n**0.5 * longest[-1]
            error = error + 4 * eps * r * (norm + eps * r)
        errors.append(error)
    w = (x[0].unsqueeze(-1) * x[1].unsqueeze(-2)).flatten(-2)
    sigma = torch.linalg.svdvals(w)
    sigma = F.pad(sigma, (0, n - sigma.shape[-1]))  # the n x n matrix has n eigenvalues
    tau = sigma.square().sum(-1)
    tau = torch.where(tau == 0, 1, tau)
    delta = longest[1] ** 2 * errors[0] + longest[0] ** 2 * errors[1]
    rho, delta = sigma.square() / tau.unsqueeze(-1), (delta / tau).unsqueeze(-1)
    total = rho.pow(alpha).sum(-1, keepdim=True)
    total = torch.where(total == 0, 1, total)
    h = spectral_terms(q, rho, total)[0]
    _, f, size = spectral_terms(q, torch.maximum(rho, delta / 40), total)
    up, steep, _ = spectral_terms(q, rho + delta, total)
    down = spectral_terms(q, (rho - delta).clamp(min=0), total)[0]
    roundings = 4 * value.abs() + 4 * n**0.5
    if alpha not in (1, math.inf):
        roundings = roundings + 4 * abs(alpha / (1 - alpha))
    turn = (steep - f).abs()
    if alpha == math.inf and n > 1:
        gap = (rho[..., :1] - rho[..., 1:2]).clamp(min=1e-300)
        turn = turn + f.abs() * (delta / gap).clamp(max=1)
    derivative = 4 * eps * largest(size, 1) * (sigma[..., 0] * n**0.5 + longest[0] * longest[1])
    derivative = 2 * (derivative + largest(turn * sigma, 1)) / tau
    conditioning = torch.maximum((up - h).abs(), (down - h).abs()).norm(dim=-1)
    grads = (slopes[0] * longest[1] * derivative, slopes[1] * longest[0] * derivative)
    return eps * roundings + conditioning, grads


def run_pair(function, z1, z2, cotangent):
    z1, z2 = (z.detach().requires_grad_() for z in (z1, z2))
    value = function(z1, z2)
    (value * cotangent.to(value.dtype)).sum().backward()
    return value.detach(), (z1.grad, z2.grad)


def eager_joint_entropy(z1, z2, alpha, **rows):
    x1, x2 = (eager_rows(z, **rows) for z in (z1, z2))
    k = (x1 @ x1.mT) * (x2 @ x2.mT)
    return reference.entropy_of_gram(k.to(reference.accumulation_dtype(z1.dtype)), alpha)


def check_joint(alpha, z1, z2, *, need_grad=True, backends=BACKENDS, **rows):
    """max |fast - truth| <= 2 max |eager - truth| + floor: value and both gradients, per matrix."""
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(z1.shape[:-2], generator=generator, dtype=torch.float64)
    truth = partial(reference.joint_entropy, alpha=alpha, **rows)
    value, grads = run_pair(truth, z1.double(), z2.double(), cotangent)
    floor, grad_floors = joint_floors(alpha, z1, z2, value, rows)
    try:
        eager, eager_grads = run_pair(
            partial(eager_joint_entropy, alpha=alpha, **rows), z1, z2, cotangent
        )
        allowed = 2 * largest(eager.double() - value, 0) + floor
        pairs = zip(eager_grads, grads, strict=True)
        grads_allowed = [2 * largest(e.double() - g, 2) for e, g in pairs]
    except torch.linalg.LinAlgError:
        allowed = torch.full_like(floor, math.inf)
        grads_allowed = [allowed, allowed]
    for backend in backends:
        fast = partial(joint_entropy, alpha=alpha, backend=backend, **rows)
        actual, actual_grads = run_pair(fast, z1, z2, cotangent)
        about = f"{backend} alpha={alpha} {tuple(z1.shape)} {tuple(z2.shape)} {z1.dtype} {rows}"
        assert actual.dtype == reference.accumulation_dtype(z1.dtype)
        error = largest(actual.double() - value, 0)
        assert (error <= allowed).all(), f"{about}: value {error}, allowed {allowed}"
        if not need_grad:
            continue
        for view in range(2):
            limit = grads_allowed[view] + grad_floors[view] * cotangent.abs()
            if z1.dtype in (torch.bfloat16, torch.float16):
                info = torch.finfo(z1.dtype)
                tiny = info.smallest_normal * info.eps
                limit = limit + info.eps * largest(grads[view], 2) + tiny
            assert actual_grads[view].dtype == z1.dtype
            error = largest(actual_grads[view].double() - grads[view], 2)
            assert (error <= limit).all(), f"{about}: gradient {view + 1}: {error}, allowed {limit}"
