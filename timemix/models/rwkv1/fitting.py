"""Curves over lags fitted by sums of decaying exponentials.

A fit minimizes sum_lag weight (f - fit)^2 over rates, angles and coefficients together (Levenberg-Marquardt, in
float64), from several starts: the matrix pencil (Hua and Sarkar, 1990), real rates evenly spaced in their logarithm,
pairs evenly spaced in their angle, and fits grown two exponentials at a time, each where most of what is left lies. The
best is kept.

Slots, rate, angle and coefficients as in `ops.exponential`; S curves at once, L lags.
"""

import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from timemix.ops.rwkv1.exponential import LEAST_RATE, Curves, basis, partners

MOST_RATE = 8.0
"""exp(-8) of a value is left one lag later: faster is as good as a tap."""

MOST_COEFFICIENTS = 20.0
"""Sum of |coefficients| at most, in units of max |f|: what cancels costs digits."""

STEPS = 200
"""Of a refinement."""

MOST_GROWN = 32
"""Exponentials beyond which a fit is not grown, and hardly refined: its starts are good, and each step costs K^3."""


class Fit(NamedTuple):
    """rate (S, K), angle (S, K // 2), coefficients (S, K), error (S,): the weighted mean square that is left."""

    rate: Tensor
    angle: Tensor
    coefficients: Tensor
    error: Tensor


def fit_exponentials(f: Tensor, weight: Tensor, exponentials: int) -> Fit:
    """Best fit of each curve f (H, L) under weight (H, L) >= 0 by K exponentials, K at most L."""
    f, weight = f.double(), weight.double()
    weight = weight / weight.sum(1, keepdim=True)
    starts = [*_pencils(f, weight, exponentials), _real(f, exponentials), _around(f, exponentials)]
    fits = [_refined(f, weight, rate, angle) for rate, angle in starts]
    if exponentials <= MOST_GROWN:
        fits.append(_grown(f, weight, exponentials))
    return reduce(_better, fits)


def _better(a: Fit, b: Fit) -> Fit:
    """Curve by curve the fit of the smaller error."""
    first = a.error <= b.error
    return Fit(*(torch.where(first.view(-1, *[1] * (x.ndim - 1)), x, y) for x, y in zip(a, b, strict=True)))


def _real(f: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Real rates from 1 to 1 / L."""
    H, L = f.shape
    rate = torch.logspace(0, -math.log10(L), K, dtype=f.dtype).expand(H, K)
    return rate.clone(), f.new_zeros(H, K // 2)


def _around(f: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Slow pairs whose angles lie evenly around the circle: with K = L they fit any curve."""
    H, _ = f.shape
    # Where no real one stands beside them, half a step away from 0.
    angle = 2 * math.pi / K * (torch.arange(1, K // 2 + 1, dtype=f.dtype) - (0 if K % 2 else 0.5))
    return f.new_full((H, K), LEAST_RATE), angle.expand(H, K // 2).clone()


def _pencils(f: Tensor, weight: Tensor, K: int) -> list[tuple[Tensor, Tensor]]:
    """Poles of the matrix pencil at several window lengths, of the curves whose late, light lags are tapered."""
    H, L = f.shape
    starts = []
    taper = (weight / weight.amax(1, keepdim=True)).sqrt()
    for length in sorted({L // 2, L // 3, L // 5} - {0}):
        rate, angle = _real(f, K)
        if min(length, L - length) > K:
            for h in range(H):
                rows = (f[h] * taper[h]).unfold(0, length + 1, 1)
                right = torch.linalg.svd(rows, full_matrices=False)[2][:K]
                poles = torch.linalg.eigvals(torch.linalg.pinv(right[:, :-1].T) @ right[:, 1:].T)
                _place(poles, rate[h], angle[h])
        starts.append((rate, angle))
    return starts


def _place(poles: Tensor, rate: Tensor, angle: Tensor) -> None:
    """Poles into the slots of one curve, slowest first, as far as there is room; negative ones as pairs."""
    K = len(rate)
    pairs, real = [], []
    for pole in sorted(poles.tolist(), key=abs, reverse=True):
        decay = min(max(-math.log(max(abs(pole), 1e-9)), LEAST_RATE), MOST_RATE)
        phase = math.atan2(pole.imag, pole.real)
        if phase == 0:
            real.append(decay)
        elif phase > 0:
            pairs.append((decay, phase))
    pairs = pairs[: max(0, (K - len(real)) // 2)]
    for i, (decay, phase) in enumerate(pairs):
        rate[2 * i : 2 * i + 2], angle[i] = decay, phase
    angle[len(pairs) :] = 0
    for j, decay in enumerate(real[: K - 2 * len(pairs)], 2 * len(pairs)):
        rate[j] = decay


def _grown(f: Tensor, weight: Tensor, K: int) -> Fit:
    """Two exponentials more at a time, beginning with one where K is odd: a pair, or two real ones, on a grid."""
    H, L = f.shape
    # The odd real one stays last.
    fit = Fit(f.new_zeros(H, 0), f.new_zeros(H, 0), f.new_zeros(H, 0), (weight * f**2).sum(1))
    if K % 2:
        fit = _refined(f, weight, *_real(f, 1))
    rates = torch.logspace(math.log10(0.5 / L), 0.3, 14, dtype=f.dtype)
    angles = torch.logspace(math.log10(0.5 * math.pi / L), math.log10(math.pi), 24, dtype=f.dtype)
    reals = torch.combinations(rates)
    pairs = len(rates) * len(angles)
    grid_rate = torch.cat([rates.repeat_interleave(len(angles))[:, None].expand(-1, 2), reals])
    grid_angle = torch.cat([angles.repeat(len(rates)), rates.new_zeros(len(reals))])[:, None]
    found = basis(Curves(grid_rate, grid_angle, grid_rate, grid_rate[:, 0]), torch.arange(L))
    products = (found[:, :, None] * found[:, None]).flatten(0, 2)
    gram = (weight @ products.t()).view(H, -1, 2, 2) + 1e-9 * torch.eye(2, dtype=f.dtype)
    while fit.rate.shape[1] < K:
        left = f - _values(fit, L)
        target = ((weight * left) @ found.flatten(0, 1).t()).view(H, -1, 2)
        gain = (target * torch.linalg.solve(gram, target)).sum(-1)
        # The places of the largest gain are neighbours; so the best pair, and the best two real ones.
        tried = []
        for part in (slice(0, pairs), slice(pairs, None)):
            i = gain[:, part].argmax(1)
            rate, angle = grid_rate[part][i], grid_angle[part][i]
            tried.append(_refined(f, weight, torch.cat([rate, fit.rate], 1), torch.cat([angle, fit.angle], 1)))
        fit = _better(*tried)
    return fit


def _values(fit: Fit, L: int) -> Tensor:
    """The fitted curves (S, L)."""
    if fit.rate.shape[1] == 0:
        return fit.rate.new_zeros(len(fit.rate), L)
    curves = Curves(fit.rate, fit.angle, fit.coefficients, fit.rate[:, 0])
    return (fit.coefficients[:, :, None] * basis(curves, torch.arange(L, device=fit.rate.device))).sum(1)


def _solved(phi: Tensor, f: Tensor, weight: Tensor) -> Tensor:
    """Coefficients (S, K) of phi (S, K, L) by weighted ridge least squares, the smallest ridge that keeps the bound."""
    gram = (phi * weight[:, None]) @ phi.transpose(1, 2)
    target = ((phi * weight[:, None]) @ f[:, :, None]).squeeze(-1)
    scale = gram.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
    bound = MOST_COEFFICIENTS * f.abs().amax(1).clamp(min=1e-12)
    eye = torch.eye(phi.shape[1], dtype=phi.dtype)
    best = torch.zeros_like(target)
    for power in range(0, -13, -1):
        c = torch.linalg.solve(gram + (10.0**power * scale + 1e-300) * eye, target)
        best = torch.where((c.abs().sum(1) <= bound)[:, None], c, best)
    return best


def _refined(f: Tensor, weight: Tensor, rate: Tensor, angle: Tensor) -> Fit:
    """Levenberg-Marquardt over log rate, angle and coefficients; a slot keeps its kind, real or of a pair."""
    S, L = f.shape
    K = rate.shape[1]
    lags = torch.arange(L, dtype=f.dtype)
    paired = F.pad((angle != 0).repeat_interleave(2, 1), (0, K % 2))
    first = torch.arange(K) // 2 * 2

    def phi_of(log_rate: Tensor, angle: Tensor) -> Tensor:
        curves = Curves(log_rate.exp(), angle, log_rate, log_rate[:, 0])
        return basis(curves, lags)

    log_rate, angle = rate.clamp(LEAST_RATE, MOST_RATE).log(), angle.clone()
    phi = phi_of(log_rate, angle)
    c = _solved(phi, f, weight)
    root = weight.sqrt()[:, None]
    # Without it coefficients run off in opposite directions where two exponentials meet.
    ridge = 1e-7 * (weight * f**2).sum(1) / f.abs().amax(1).clamp(min=1e-12) ** 2

    def cost_of(phi: Tensor, c: Tensor) -> Tensor:
        return (weight * (f - (c[:, :, None] * phi).sum(1)) ** 2).sum(1) + ridge * c.square().sum(1)

    cost, damping = cost_of(phi, c), torch.full((S,), 1e-2, dtype=f.dtype)
    angles = K // 2
    for _ in range(STEPS if K <= MOST_GROWN else 5):
        # Both slots of a pair move with the first one's rate, and with one angle.
        by_rate = -lags * (c * torch.where(paired, log_rate[:, first], log_rate).exp())[:, :, None] * phi
        by_rate = _of_pairs(by_rate, angle)
        by_angle = _pairs(lags * c[:, :, None] * partners(phi, 1)).sum(2)
        by_angle = torch.where((angle != 0)[:, :, None], by_angle, 0)
        jacobian = torch.cat([by_rate, by_angle, phi], 1) * root
        residual = root[:, 0] * (f - (c[:, :, None] * phi).sum(1))
        pull = (jacobian @ residual[:, :, None]).squeeze(-1)
        pull[:, K + angles :] -= ridge[:, None] * c
        normal = jacobian @ jacobian.transpose(1, 2)
        normal.diagonal(dim1=1, dim2=2)[:, K + angles :] += ridge[:, None]
        diagonal = normal.diagonal(dim1=1, dim2=2).clone()
        normal.diagonal(dim1=1, dim2=2).add_(damping[:, None] * diagonal + 1e-14)
        step = torch.linalg.solve(normal, pull)
        new_rate = (log_rate + step[:, :K].clamp(-1, 1)).clamp(math.log(LEAST_RATE), math.log(MOST_RATE))
        new_angle = torch.where(angle != 0, (angle + step[:, K : K + angles]).clamp(1e-4, math.pi), angle)
        new_phi = phi_of(new_rate, new_angle)
        new_c = c + step[:, K + angles :]
        new_cost = cost_of(new_phi, new_c)
        better = new_cost < cost
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-12, 1e12)
        log_rate, angle, c = (
            torch.where(better[:, None], x, y) for x, y in ((new_rate, log_rate), (new_angle, angle), (new_c, c))
        )
        phi = torch.where(better[:, None, None], new_phi, phi)
        cost = torch.where(better, new_cost, cost)
    c = _solved(phi, f, weight)
    rate = torch.where(paired, log_rate[:, first], log_rate).exp()
    error = (weight * (f - (c[:, :, None] * phi).sum(1)) ** 2).sum(1)
    return Fit(rate, angle, c, error)


def _pairs(x: Tensor) -> Tensor:
    """x (S, K, L) of slots as (S, K // 2, 2, L), without an odd last one."""
    return x[:, : x.shape[1] // 2 * 2].unflatten(1, (x.shape[1] // 2, 2))


def _of_pairs(x: Tensor, angle: Tensor) -> Tensor:
    """x (S, K, L) of slots, those of a pair added up in its first."""
    pairs = _pairs(x)
    added = torch.stack([pairs.sum(2), torch.zeros_like(pairs[:, :, 0])], 2)
    pairs = torch.where((angle != 0)[:, :, None, None], added, pairs)
    return torch.cat([pairs.flatten(1, 2), x[:, 2 * angle.shape[1] :]], 1)
