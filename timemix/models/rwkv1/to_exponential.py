"""A trained rwkv1 as a recurrent network: its curves f_h(lag) replaced by sums of decaying exponentials."""

from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor

from timemix.errors import InvalidValue
from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel
from timemix.models.layers.resize import level
from timemix.models.rwkv1.config import Rwkv1Config, Rwkv1ExpConfig
from timemix.models.rwkv1.exp_time_mix import ExpTimeMix
from timemix.models.rwkv1.fitting import fit_exponentials


def exponential_config(config: ModelConfig, exponentials: int, taps: int = 0) -> Rwkv1ExpConfig:
    """The `rwkv1_exp` that an `rwkv1` becomes.

    Raises InvalidValue for another architecture, a free W, a weighted denominator, or numbers outside ctx_len.
    """
    if not isinstance(config, Rwkv1Config):
        raise InvalidValue(f"only rwkv1 can take a constant state; this is a run of {config.arch}")
    if config.weights == "free":
        raise InvalidValue("a free W has no curves over lags to fit; only decomposed weights can take a constant state")
    if config.denominator == "weighted":
        raise InvalidValue("a weighted denominator grows no constant state; only the plain one can")
    for name, value, least in (("exponentials", exponentials, 1), ("taps", taps, 0)):
        if not least <= value <= config.ctx_len:
            raise InvalidValue(f"{name} is {value}; it must lie from {least} to the run's ctx_len {config.ctx_len}")
    same = {field.name: getattr(config, field.name) for field in fields(Rwkv1ExpConfig) if hasattr(config, field.name)}
    return Rwkv1ExpConfig(**same | {"arch": "rwkv1_exp", "exponentials": exponentials, "taps": taps})


@dataclass(frozen=True)
class FittedCurve:
    """A curve over lags and its fit.

    Args:
        layer: Of the curve's time-mix.
        head: Of the curve.
        error: Root of the weighted mean square that the fit leaves, in units of that of f.
        f: The curve by lag, ctx_len values, with the growth taken out.
        fit: The same of the sum of exponentials.
    """

    layer: int
    head: int
    error: float
    f: list[float]
    fit: list[float]


@torch.no_grad()
def with_exponentials(old: LanguageModel, exponentials: int, taps: int = 0) -> tuple[LanguageModel, list[FittedCurve]]:
    """A model with curves of so many exponentials, and the fit of each head.

    Before the fit the growth that f, alpha and beta can trade without a change of W is taken out (`layers.resize`), as
    past ctx_len alpha and beta go on with the mean of their last quarter. A lag counts by the pairs of positions that
    lie so far apart, ctx_len - lag: at 4 exponentials and ctx_len 64 this served better than weights by 1 / t^2 or by
    the tables, which trust the early positions more than the loss does. The first `taps` lags are exact.

    Raises InvalidValue as `exponential_config` does.
    """
    config = exponential_config(old.config, exponentials, taps)
    model = LanguageModel(config).to(old.device, old.head.weight.dtype).eval()
    weights = dict(old.state_dict())
    mixers = [cast(ExpTimeMix, block.mixer) for block in model.blocks]
    heads, T = config.heads, config.ctx_len
    for i in range(config.layers):
        names = [name for name in ("f", "alpha", "beta") if f"blocks.{i}.mixer.{name}" in weights]
        tables = level({name: weights[f"blocks.{i}.mixer.{name}"].cpu() for name in names})
        weights |= {f"blocks.{i}.mixer.{name}": table for name, table in tables.items()}
    if any(not x.isfinite().all() for x in weights.values()):
        raise InvalidValue("the model holds weights that are not finite")
    f = torch.cat([weights.pop(f"blocks.{i}.mixer.f") for i in range(config.layers)]).double().cpu()

    pairs = torch.arange(T, 0, -1, dtype=torch.float64).expand_as(f)
    free = torch.arange(T) >= taps if taps < T else torch.ones(T, dtype=torch.bool)
    found = fit_exponentials(f, pairs * free, exponentials)
    for mixer, rate, angle, coefficients in zip(
        mixers, found.rate.split(heads), found.angle.split(heads), found.coefficients.split(heads), strict=True
    ):
        mixer.rate.copy_(rate)
        mixer.angle.copy_(angle)
        mixer.coefficients.copy_(coefficients)
    if taps:
        # What is left of the curve as it is rounded to the model's numbers.
        for mixer, exact in zip(mixers, f.split(heads), strict=True):
            assert mixer.taps is not None
            mixer.taps.copy_((exact - mixer.curve().cpu())[:, :taps])
    model.load_state_dict(weights, strict=False)

    fitted = torch.cat([mixer.curve() for mixer in mixers]).double().cpu()
    error = _root_mean(pairs * (f - fitted) ** 2) / _root_mean(pairs * f**2).clamp(min=1e-12)
    rows = [
        FittedCurve(i // heads, i % heads, left, curve, fit)
        for i, (left, curve, fit) in enumerate(zip(error.tolist(), f.tolist(), fitted.tolist(), strict=True))
    ]
    return model, rows


def _root_mean(x: Tensor) -> Tensor:
    return x.mean(1).sqrt()
