"""A trained model as a recurrent network: its run folder, losses by range of positions, a fine-tune to regain them."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from timemix.config.run import RunConfig
from timemix.data.config import DataConfig
from timemix.data.corpus import is_corpus
from timemix.data.shards import Tokens
from timemix.errors import InvalidValue
from timemix.evaluation.loss import loss_by_position
from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel
from timemix.models.registry import ARCHITECTURES, find_architecture, load_part
from timemix.reporting.plots import plot_loss, save_picture
from timemix.runs.load import Loaded
from timemix.runtime.machine import keep_freed_memory
from timemix.storage.files import write_text
from timemix.storage.json_files import OPTIONAL, to_json
from timemix.training.progress import Watch
from timemix.training.start import new_run
from timemix.training.trainer import Trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Fitted(Protocol):
    """A curve over lags and its fit, as the module that converts gives it."""

    layer: int
    head: int
    error: float
    f: list[float]
    fit: list[float]


Watching = Callable[[int, int], AbstractContextManager[Watch]]
"""From first step and steps of a run to what gives its watch."""

RANGES = ((0, 1), (1, 4), (4, 8), (8, 16))
"""Ranges of positions whose mean loss is reported, in units of ctx_len."""

CONTEXTS = 4
"""Length of the fine-tune's windows, in units of ctx_len."""

MOST_TOKENS = 2**18
"""Tokens of the held-out text that are measured, at most: its first."""


@dataclass(frozen=True)
class Conversion:
    """What is made of a run.

    Args:
        exponentials: K, their number for each curve.
        out: New run folder.
        taps: First lags that keep their exact values.
        finetune: Optimizer steps afterwards, 0 for none.
        lr: Learning rate of the fine-tune; it decays to 0.
        data: Source of the text, None for that of the run.
        device: Device of the fine-tune.
    """

    exponentials: int
    out: Path
    taps: int = 0
    finetune: int = 0
    lr: float = 5e-4
    data: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class CurveError:
    """What the fit of a curve leaves, as `FittedCurve.error`."""

    layer: int
    head: int
    error: float


@dataclass(frozen=True)
class Converted:
    """A conversion that was made, as convert.json holds it. Losses are in nats per token, by range of positions.

    Args:
        run: Checkpoint that was converted.
        exponentials: As in the conversion.
        taps: As in the conversion.
        out: New run folder.
        fits: What the fit of each curve leaves.
        original: Losses of the original.
        before: Losses of the new model before the fine-tune.
        after: Losses after the fine-tune, None without one.
    """

    run: str
    exponentials: int
    taps: int
    out: str
    fits: tuple[CurveError, ...]
    original: dict[str, float]
    before: dict[str, float]
    after: dict[str, float] | None = field(default=None, metadata=OPTIONAL)


def check_conversion(conversion: Conversion, model: ModelConfig) -> None:
    """Raises InvalidValue for a model that cannot be converted so."""
    _recurrent_part(model).exponential_config(model, conversion.exponentials, conversion.taps)


def _recurrent_part(model: ModelConfig) -> Any:
    """Return the module that converts models of this architecture. Raises InvalidValue where there is none."""
    part = find_architecture(model.arch).recurrent
    if part is None:
        able = ", ".join(name for name, each in ARCHITECTURES.items() if each.recurrent is not None)
        raise InvalidValue(f"only {able} can take a constant state; this is a run of {model.arch}")
    return load_part(part)


def convert_run(conversion: Conversion, loaded: Loaded, watching: Watching) -> Converted:
    """Make the run folder of a conversion.

    `watching` shows the progress of the fine-tune. Raises InvalidValue for a run that cannot be converted.
    """
    out = conversion.out
    recurrent = _recurrent_part(loaded.config.model)
    try:
        model, fits = recurrent.with_exponentials(loaded.model, conversion.exponentials, conversion.taps)
    except InvalidValue as error:
        raise InvalidValue(f"{loaded.folder}: {error}") from None
    config = replace(loaded.config, model=model.config, start=str(loaded.folder))
    converted = Loaded(model, loaded.tokenizer, config, loaded.folder)
    trainer = new_run(_config(conversion, converted), out, start=converted)
    tokens = trainer.corpus.valid[:MOST_TOKENS]
    _draw(fits, out / "fit.png")
    made = Converted(
        run=str(loaded.folder),
        exponentials=conversion.exponentials,
        taps=conversion.taps,
        out=str(out),
        fits=tuple(CurveError(fit.layer, fit.head, fit.error) for fit in fits),
        original=losses_by_range(loaded.model, tokens),
        before=losses_by_range(trainer.model, tokens),
    )
    if conversion.finetune:
        _finetune(trainer, watching)
        made = replace(made, after=losses_by_range(trainer.model, tokens))
    else:
        # Once more, with its loss, by which the best checkpoint is chosen.
        trainer.validate()
        trainer.save()
    write_text(out / "convert.json", json.dumps(to_json(made), indent=1))
    return made


def _config(conversion: Conversion, converted: Loaded) -> RunConfig:
    """Of the new run: the model, the text of the old one where no other is named, and the fine-tune's training."""
    config, own = converted.config, converted.folder.parent.parent / "data"
    # What the run was made with lies there already.
    source = conversion.data or (str(own) if is_corpus(own) else config.data.source)
    steps = conversion.finetune or 300
    train = replace(
        config.train,
        steps=steps,
        contexts=CONTEXTS,
        batch_size=max(1, config.train.batch_size // CONTEXTS),
        accumulation=1,
        optimizer="adamw",
        betas=(0.9, 0.99),
        weight_decay=0.0,
        lr=conversion.lr,
        lr_final=0.0,
        schedule="linear",
        warmup=0.02,
        valid_every=steps,
        save_every=steps,
        device=conversion.device,
    )
    return replace(config, data=DataConfig(source=source, order=config.data.order), train=train)


def _finetune(trainer: Trainer, watching: Watching) -> None:
    keep_freed_memory()
    with watching(0, trainer.config.train.steps) as watch:
        trainer.run(watch)
    plot_loss([trainer.out], trainer.out / "loss.png")


def losses_by_range(model: LanguageModel, tokens: np.ndarray | Tokens) -> dict[str, float]:
    """Mean loss in nats per token at each of RANGES, as far as the text is long enough; an rwkv1 re-anchored.

    Over windows of 16 ctx_len, or of what the text gives.
    """
    ctx_len = model.config.ctx_len
    contexts = min(RANGES[-1][1], (len(tokens) - 1) // ctx_len)
    if contexts < 1:
        return {}
    losses = loss_by_position(model, tokens, contexts=contexts)
    return {f"{a}-{b}": float(losses[a * ctx_len : b * ctx_len].mean()) for a, b in RANGES if b <= contexts}


def _draw(fits: Sequence[Fitted], out: Path, most: int = 8) -> None:
    """A row per layer, a column per head: the curve and its fit. Of many layers or heads the first `most`."""
    from matplotlib.figure import Figure

    layers, heads = (min(most, 1 + max(getattr(fit, name) for fit in fits)) for name in ("layer", "head"))
    figure = Figure(figsize=(2.3 * heads + 0.4, 1.5 * layers + 0.4), dpi=130, layout="constrained")
    grid = figure.subplots(layers, heads, squeeze=False, sharex=True)
    for fit in fits:
        if fit.layer >= layers or fit.head >= heads:
            continue
        axes: Axes = grid[fit.layer][fit.head]
        axes.plot(fit.f, color="0.6", linewidth=1, label="f")
        axes.plot(fit.fit, color="#D55E00", linewidth=1.3, label="fit")
        axes.set_title(f"layer {fit.layer}, head {fit.head}: {fit.error:.0%} left", fontsize=7)
        axes.tick_params(labelsize=6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("lag", fontsize=7)
    grid[0][0].legend(fontsize=6, frameon=False)
    save_picture(figure, out)
