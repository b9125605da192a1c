"""Fitting of sums of decaying exponentials to curves over lags.

    fit(lag) = sum_j c_j phi_j(lag)        slots, rate, angle and c (coefficients) as in `ops.rwkv1.exponential`
    error    = sum_lag weight(lag) (f(lag) - fit(lag))^2,   weights of sum 1

The Levenberg-Marquardt method minimizes the error over rates, angles and coefficients together, in float64. The error
has many local minima, so the method runs from several starting points, and the best result is used:

    matrix pencil:  the poles of the curve itself (Hua and Sarkar, 1990), at three window lengths
    real rates:     evenly spaced in their logarithm
    slow pairs:     evenly spaced in their angle
    growth:         two more exponentials at a time, chosen from a grid to lower the error most

Shapes: S curves (one for each head), L lags, K exponentials.
"""

import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from timemix.ops.rwkv1.curves import LEAST_RATE, Curves, basis, partners

MOST_RATE = 8.0
"""Largest rate. After one lag, exp(-8) of the curve remains, so a faster decay is no better than a tap (a direct
coefficient of one lag)."""

MOST_COEFFICIENTS = 20.0
"""Largest sum of |coefficients|, in units of max |f|, since large terms that cancel each other lose digits."""

STEPS = 200
"""Number of steps of a refinement."""

MOST_GROWN = 32
"""Largest number of exponentials for which a fit is grown, and refined in STEPS steps. With more exponentials, starting
points without growth are good enough, and each step costs O(K^3)."""


class Fit(NamedTuple):
    """Parameters and errors of the fits of all curves.

    Args:
        rate: Decay per token (S, K).
        angle: Rotation per token in radians (S, K // 2); 0 for two real slots.
        coefficients: Weights of the slots (S, K).
        error: Weighted mean square of f - fit (S,).
    """

    rate: Tensor
    angle: Tensor
    coefficients: Tensor
    error: Tensor


def fit_exponentials(f: Tensor, weight: Tensor, exponentials: int) -> Fit:
    """Fit each curve by a sum of exponentials.

    Args:
        f: Curves (H, L) by lag.
        weight: Weight of each lag (H, L), at least 0, of any scale.
        exponentials: Number K of exponentials, 1 to L.

    Returns:
        The best fit found for each curve.
    """
    f, weight = f.double(), weight.double()
    weight = weight / weight.sum(1, keepdim=True)
    starts = [*_pencils(f, weight, exponentials), _real(f, exponentials), _around(f, exponentials)]
    fits = [_refined(f, weight, rate, angle) for rate, angle in starts]
    if exponentials <= MOST_GROWN:
        fits.append(_grown(f, weight, exponentials))
    return reduce(_better, fits)


def _better(a: Fit, b: Fit) -> Fit:
    """Return, for each curve, the fit with the smaller error."""
    first = a.error <= b.error
    return Fit(*(torch.where(first.view(-1, *[1] * (x.ndim - 1)), x, y) for x, y in zip(a, b, strict=True)))


def _real(f: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Return a starting point with real rates from 1 down to 1 / L: rate (H, K), angle (H, K // 2)."""
    H, L = f.shape
    rate = torch.logspace(0, -math.log10(L), K, dtype=f.dtype).expand(H, K)
    return rate.clone(), f.new_zeros(H, K // 2)


def _around(f: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Return a starting point with slowly decaying pairs of exponentials at evenly spaced angles.

    For K = L, the pairs are a Fourier basis, which fits any curve."""
    H, _ = f.shape
    # If K is even, there is no real exponential at angle 0, so the angles begin half a step from 0.
    angle = 2 * math.pi / K * (torch.arange(1, K // 2 + 1, dtype=f.dtype) - (0 if K % 2 else 0.5))
    return f.new_full((H, K), LEAST_RATE), angle.expand(H, K // 2).clone()


def _pencils(f: Tensor, weight: Tensor, K: int) -> list[tuple[Tensor, Tensor]]:
    """Return starting points from the poles of the matrix pencil, at several window lengths.

    A sum of K exponentials z_j^lag has a window matrix Y[i, j] = f(i + j) of rank K. The row space of Y is invariant
    under a shift by one lag, and the eigenvalues of the shift are the poles z_j = exp(-rate + i angle).
    """
    H, L = f.shape
    starts = []
    # Lags with a small weight are scaled down, so that the poles describe the lags with a large weight.
    taper = (weight / weight.amax(1, keepdim=True)).sqrt()
    for length in sorted({L // 2, L // 3, L // 5} - {0}):
        rate, angle = _real(f, K)
        if min(length, L - length) > K:
            for h in range(H):
                # (L,) -> (L - length, length + 1)
                rows = (f[h] * taper[h]).unfold(0, length + 1, 1)
                right = torch.linalg.svd(rows, full_matrices=False)[2][:K]
                # Least squares give the shift from `right` without its last column to `right` without its first column.
                poles = torch.linalg.eigvals(torch.linalg.pinv(right[:, :-1].T) @ right[:, 1:].T)
                _fill_slots(poles, rate[h], angle[h])
        starts.append((rate, angle))
    return starts


def _fill_slots(poles: Tensor, rate: Tensor, angle: Tensor) -> None:
    """Store the slowest poles that fit into the slots of one curve, rate (K,) and angle (K // 2,), in place.

    A conjugate pair is represented by its pole of positive phase. A negative real pole, of phase pi, becomes a pair.
    """
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
    """Grow a fit by two exponentials at a time: a rotating pair or two real exponentials, chosen from a grid.

    If K is odd, the fit begins with one real exponential.

    With the residual `left` and candidates phi_1, phi_2: target_i = sum_lag weight left phi_i and
    gram_ij = sum_lag weight phi_i phi_j. The best coefficients lower the error by the gain, target^T gram^-1 target.
    """
    H, L = f.shape
    # New exponentials are placed first, so that the single real exponential stays last.
    fit = Fit(f.new_zeros(H, 0), f.new_zeros(H, 0), f.new_zeros(H, 0), (weight * f**2).sum(1))
    if K % 2:
        fit = _refined(f, weight, *_real(f, 1))
    rates = torch.logspace(math.log10(0.5 / L), 0.3, 14, dtype=f.dtype)
    angles = torch.logspace(math.log10(0.5 * math.pi / L), math.log10(math.pi), 24, dtype=f.dtype)
    reals = torch.combinations(rates)
    pairs = len(rates) * len(angles)
    grid_rate = torch.cat([rates.repeat_interleave(len(angles))[:, None].expand(-1, 2), reals])
    grid_angle = torch.cat([angles.repeat(len(rates)), rates.new_zeros(len(reals))])[:, None]
    # found: the two exponentials of each candidate, (candidates, 2, L). products: phi_i phi_j, (candidates * 4, L)
    found = basis(Curves(grid_rate, grid_angle, grid_rate, grid_rate[:, 0]), torch.arange(L))
    products = (found[:, :, None] * found[:, None]).flatten(0, 2)
    # gram is (S, candidates, 2, 2). The ridge keeps gram invertible for two equal rates.
    gram = (weight @ products.t()).view(H, -1, 2, 2) + 1e-9 * torch.eye(2, dtype=f.dtype)
    while fit.rate.shape[1] < K:
        left = f - _values(fit, L)
        # (S, candidates, 2)
        target = ((weight * left) @ found.flatten(0, 1).t()).view(H, -1, 2)
        gain = (target * torch.linalg.solve(gram, target)).sum(-1)
        # The candidates of largest gain are similar. Two different candidates are tried: the best pair, and the best
        # two real exponentials.
        tried = []
        for part in (slice(0, pairs), slice(pairs, None)):
            i = gain[:, part].argmax(1)
            rate, angle = grid_rate[part][i], grid_angle[part][i]
            tried.append(_refined(f, weight, torch.cat([rate, fit.rate], 1), torch.cat([angle, fit.angle], 1)))
        fit = _better(*tried)
    return fit


def _values(fit: Fit, L: int) -> Tensor:
    """Evaluate the fitted curves: (S, L)."""
    if fit.rate.shape[1] == 0:
        return fit.rate.new_zeros(len(fit.rate), L)
    curves = Curves(fit.rate, fit.angle, fit.coefficients, fit.rate[:, 0])
    return (fit.coefficients[:, :, None] * basis(curves, torch.arange(L, device=fit.rate.device))).sum(1)


def _solved(phi: Tensor, f: Tensor, weight: Tensor) -> Tensor:
    """Solve for the coefficients (S, K) of phi (S, K, L): (gram + ridge I) c = target.

    gram = sum_lag weight phi phi^T, target = sum_lag weight f phi. The ridge is the smallest power of ten, relative to
    the largest entry of gram, for which sum |c| <= MOST_COEFFICIENTS max |f|.
    """
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
    """Refine a fit by the Levenberg-Marquardt method, over p = (log rate, angle, coefficients).

        (J J^T + damping diag(J J^T)) step = J residual,   J[p, lag] = sqrt(weight) d fit(lag) / dp

    A step that lowers the cost is accepted, and its damping falls. A step that does not lower the cost is rejected, and
    its damping rises. All S curves are refined at once, each with its own damping. A real slot stays real, and a paired
    slot stays in its pair.

    Args:
        f: Curves (S, L) by lag.
        weight: Weights (S, L) of sum 1.
        rate: Starting rates (S, K).
        angle: Starting angles (S, K // 2).

    Returns:
        The refined fit.
    """
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
    # Without a ridge, the coefficients of two exponentials that become equal grow without bound, with opposite signs.
    ridge = 1e-7 * (weight * f**2).sum(1) / f.abs().amax(1).clamp(min=1e-12) ** 2

    def cost_of(phi: Tensor, c: Tensor) -> Tensor:
        return (weight * (f - (c[:, :, None] * phi).sum(1)) ** 2).sum(1) + ridge * c.square().sum(1)

    cost, damping = cost_of(phi, c), torch.full((S,), 1e-2, dtype=f.dtype)
    angles = K // 2
    for _ in range(STEPS if K <= MOST_GROWN else 5):
        # d fit / d log rate = -lag rate c phi, where both slots of a pair have the rate of the first slot: (S, K, L)
        by_rate = -lags * (c * torch.where(paired, log_rate[:, first], log_rate).exp())[:, :, None] * phi
        by_rate = _of_pairs(by_rate, angle)
        # d fit / d angle = lag (c . partners(phi)), summed over the pair: (S, K // 2, 2, L) -> (S, K // 2, L)
        by_angle = _pairs(lags * c[:, :, None] * partners(phi, 1)).sum(2)
        by_angle = torch.where((angle != 0)[:, :, None], by_angle, 0)
        # (S, K + K // 2 + K, L)
        jacobian = torch.cat([by_rate, by_angle, phi], 1) * root
        residual = root[:, 0] * (f - (c[:, :, None] * phi).sum(1))
        pull = (jacobian @ residual[:, :, None]).squeeze(-1)
        # Subtract the gradient of ridge |c|^2 / 2.
        pull[:, K + angles :] -= ridge[:, None] * c
        normal = jacobian @ jacobian.transpose(1, 2)
        normal.diagonal(dim1=1, dim2=2)[:, K + angles :] += ridge[:, None]
        diagonal = normal.diagonal(dim1=1, dim2=2).clone()
        normal.diagonal(dim1=1, dim2=2).add_(damping[:, None] * diagonal + 1e-14)
        # A step is bounded: a rate changes by at most a factor of e, and every parameter stays in its range.
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
    # Compute the optimal coefficients of the refined exponentials, within the bound on the coefficients.
    c = _solved(phi, f, weight)
    rate = torch.where(paired, log_rate[:, first], log_rate).exp()
    error = (weight * (f - (c[:, :, None] * phi).sum(1)) ** 2).sum(1)
    return Fit(rate, angle, c, error)


def _pairs(x: Tensor) -> Tensor:
    """Group the slots of x by pairs, without the last slot if K is odd: (S, K, L) -> (S, K // 2, 2, L)."""
    result: Tensor = x[:, : x.shape[1] // 2 * 2].unflatten(1, (x.shape[1] // 2, 2))
    return result


def _of_pairs(x: Tensor, angle: Tensor) -> Tensor:
    """Add the derivatives x (S, K, L) of both slots of a pair into the first slot, since both slots share one rate."""
    pairs = _pairs(x)
    added = torch.stack([pairs.sum(2), torch.zeros_like(pairs[:, :, 0])], 2)
    pairs = torch.where((angle != 0)[:, :, None, None], added, pairs)
    return torch.cat([pairs.flatten(1, 2), x[:, 2 * angle.shape[1] :]], 1)
