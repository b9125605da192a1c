"""Fits by exponentials: sums of exponentials are recovered, other curves are fitted within bounds."""

import pytest
import torch

from tests.helpers.tiers import slow
from timemix.models.rwkv1 import fitting
from timemix.models.rwkv1.fitting import MOST_COEFFICIENTS, fit_exponentials
from timemix.ops.rwkv1.curves import LEAST_RATE, Curves, curve


@pytest.fixture(autouse=True)
def _fewer_steps(request, monkeypatch):
    """The fast tier refines less, and its bounds still hold."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(fitting, "STEPS", 60)


def pairs(L, H=1):
    return torch.arange(L, 0, -1).double().expand(H, L)


def values(fit, L):
    return curve(Curves(fit.rate, fit.angle, fit.coefficients, fit.rate[:, 0]), L)


@pytest.mark.parametrize(
    ("rate", "angle", "coefficients"),
    [
        ([0.05], [], [2.0]),
        ([0.02, 0.3], [0.0], [1.0, -0.5]),
        ([0.05, 0.05], [0.3], [1.0, 0.7]),
        ([0.05, 0.05, 0.01], [0.4], [1.0, 0.7, 0.2]),
        # A negative pole: a pair of angle pi.
        ([0.1, 0.1], [torch.pi], [1.0, 0.0]),
        ([0.03, 0.03, 0.2, 0.2, 0.001, 0.5], [0.2, 1.5, 0.0], [1.0, 0.5, -0.4, 0.9, 0.3, 0.6]),
    ],
)
def test_sums_of_exponentials_are_found(rate, angle, coefficients):
    true = Curves(*(torch.tensor([x]).double() for x in (rate, angle, coefficients)), torch.zeros(1))
    f = curve(true, 64)
    fit = fit_exponentials(f, pairs(64), len(rate))
    assert fit.error.sqrt() < 2e-3 * f.abs().max()
    # Also past the fitted lags.
    torch.testing.assert_close(values(fit, 128), curve(true, 128), atol=0.02, rtol=0)


@pytest.mark.slow
def test_more_exponentials_fit_better_and_each_head_is_its_own():
    lag = torch.arange(48).double()
    f = torch.stack([1 / (1 + lag), (-((lag - 6) ** 2) / 18).exp(), torch.randn(48).double(), torch.zeros(48)])
    errors = torch.stack([fit_exponentials(f, pairs(48, 4), K).error for K in (1, 2, 3, 4, 8)])
    assert (errors[1:] <= errors[:-1] + 1e-12).all()
    assert errors[-1, 0].sqrt() < 1e-3
    assert errors[-1, 1].sqrt() < 0.02
    assert (errors[:, 3] == 0).all()
    alone = fit_exponentials(f[1:2], pairs(48), 4)
    torch.testing.assert_close(alone.error[0], errors[3, 1], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("K", [1, slow(2), 5, slow(8)])
def test_the_bounds_hold(K):
    f = torch.cat([torch.randn(3, 40).double(), torch.linspace(0, 1, 40).double()[None]])
    fit = fit_exponentials(f, pairs(40, 4), K)
    assert (fit.coefficients.abs().sum(1) <= MOST_COEFFICIENTS * f.abs().amax(1) + 1e-9).all()
    assert (fit.rate >= LEAST_RATE * (1 - 1e-9)).all()
    weight = pairs(40, 4) / pairs(40, 4).sum(1, keepdim=True)
    torch.testing.assert_close(fit.error, (weight * (f - values(fit, 40)) ** 2).sum(1))


@pytest.mark.parametrize("L", [1, 2, 3, slow(7), 50])
def test_as_many_exponentials_as_lags_fit_anything(L, monkeypatch):
    monkeypatch.setattr(fitting, "MOST_GROWN", 8)
    f = torch.randn(2, L).double()
    assert (fit_exponentials(f, pairs(L, 2), L).error.sqrt() < 0.02).all()


def test_lags_without_weight_do_not_count():
    f = (-0.1 * torch.arange(40)).double().exp()[None].clone()
    weight = pairs(40).clone()
    f[:, :3], weight[:, :3] = 5, 0
    assert fit_exponentials(f, weight, 1).error.sqrt() < 1e-4
