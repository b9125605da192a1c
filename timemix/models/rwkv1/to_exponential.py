"""Conversion of a trained rwkv1 to a recurrent network: its curves f_h(lag) become sums of decaying exponentials."""

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
    """Return the settings of the `rwkv1_exp` that results from the conversion of an `rwkv1`.

    Args:
        config: Settings of an `rwkv1`.
        exponentials: Number K of exponentials of each curve, 1 to ctx_len.
        taps: Number M of first lags with an additional parameter, 0 to ctx_len.

    Returns:
        The settings.

    Raises:
        InvalidValue: `config` is of another architecture, W is free, the denominator is weighted, or a number is out of
            range.
    """
    if not isinstance(config, Rwkv1Config):
        raise InvalidValue(f"a run of {config.arch} cannot get a constant state; use a run of rwkv1")
    if config.weights == "free":
        raise InvalidValue("a free W has no curves over lags to fit; use a run with decomposed weights")
    if config.denominator == "weighted":
        raise InvalidValue("a weighted denominator has no constant state; use a run with the plain denominator")
    for name, value, least in (("exponentials", exponentials, 1), ("taps", taps, 0)):
        if not least <= value <= config.ctx_len:
            raise InvalidValue(f"{name} is {value}; it must be from {least} to the run's ctx_len, {config.ctx_len}")
    same = {field.name: getattr(config, field.name) for field in fields(Rwkv1ExpConfig) if hasattr(config, field.name)}
    return Rwkv1ExpConfig(**same | {"arch": "rwkv1_exp", "exponentials": exponentials, "taps": taps})


@dataclass(frozen=True)
class FittedCurve:
    """A curve over lags and its fit.

    Args:
        layer: Index of the layer.
        head: Index of the head.
        error: Weighted root mean square of f - fit, divided by the weighted root mean square of f.
        f: The curve by lag, ctx_len values, after removing the gauge freedom between f, alpha and beta.
        fit: The fitted sum of exponentials by lag, ctx_len values.
    """

    layer: int
    head: int
    error: float
    f: list[float]
    fit: list[float]


@torch.no_grad()
def with_exponentials(old: LanguageModel, exponentials: int, taps: int = 0) -> tuple[LanguageModel, list[FittedCurve]]:
    """Convert a trained rwkv1 to an rwkv1_exp by fitting its curves.

    From position ctx_len on, alpha and beta equal the mean of their last quarter. So `layers.resize` removes the gauge
    freedom between f, alpha and beta before the fit. The weight of a lag is the number of pairs of positions at the
    lag, ctx_len - lag. Weights of 1 / t^2, and weights from the tables, count the early positions more than the loss
    does. At 4 exponentials and ctx_len 64, these two choices gave worse results than the weights ctx_len - lag. The fit
    is exact at the first `taps` lags.

    Args:
        old: The trained model.
        exponentials: Number K of exponentials of each curve, 1 to ctx_len.
        taps: Number M of first lags with an additional parameter, 0 to ctx_len.

    Returns:
        The model in eval mode, and the fit of each head of each layer.

    Raises:
        InvalidValue: The model cannot be converted (see `exponential_config`), or its weights are not finite.
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
        raise InvalidValue("the weights of the model are not finite; use another checkpoint")
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
        # The taps (direct coefficients of the first lags) hold the error of the exponentials, after the exponentials
        # are rounded to the model's dtype.
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
    """Return the square root of the mean of each row: (S, L) -> (S,)."""
    return x.mean(1).sqrt()
