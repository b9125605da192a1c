"""Convert a trained model to a recurrent network in a new run folder, measure the losses, and fine-tune the model."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from timemix.config.run import RunConfig, TrainConfig
from timemix.data.corpus import is_corpus
from timemix.data.shards import Tokens
from timemix.data.sources import open_source
from timemix.errors import InvalidValue
from timemix.evaluation.loss import counted_by_position, loss_by_position
from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel
from timemix.models.registry import ARCHITECTURES, find_architecture, load_part
from timemix.reporting.plots import plot_loss, save_picture
from timemix.runs.load import Loaded
from timemix.runtime.machine import keep_freed_memory
from timemix.storage.files import refuse_existing, write_text
from timemix.storage.json_files import OPTIONAL, to_json
from timemix.training.progress import Watch
from timemix.training.start import new_run
from timemix.training.trainer import Trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Fitted(Protocol):
    """A learned curve (a weight for each distance between two tokens) and its fit by a sum of exponentials."""

    layer: int
    head: int
    error: float
    """Relative error of the fit."""
    f: list[float]
    """Values of the curve at each distance between two tokens."""
    fit: list[float]
    """Values of the fit at each distance between two tokens."""


Watching = Callable[[int, int], AbstractContextManager[Watch]]
"""Function that returns, for a run's first step and number of steps, a context manager that yields a `watch`."""

RANGES = ((0, 1), (1, 4), (4, 8), (8, 16))
"""Ranges of positions, counted in multiples of ctx_len. A conversion reports the mean loss of each range."""

CONTEXTS = 4
"""Length of a fine-tuning window, in multiples of ctx_len."""

MOST_TOKENS = 2**18
"""Largest number of held-out tokens that the loss measurement uses, from the beginning of the text."""


@dataclass(frozen=True)
class Conversion:
    """Settings of a conversion.

    Args:
        exponentials: Number K of exponentials per curve.
        out: Run folder to create.
        taps: Number of smallest distances between two tokens (lags) at which a curve keeps its exact values.
        finetune: Number of optimizer steps of fine-tuning; 0: no fine-tuning.
        lr: Initial learning rate of fine-tuning. The learning rate decays to 0.
        data: Source of the text. Default: the source of the run.
        device: PyTorch device of fine-tuning.
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
    """Relative error of the fit of one curve."""

    layer: int
    head: int
    error: float


@dataclass(frozen=True)
class Converted:
    """Result of a conversion, and content of convert.json. Losses are in nats per token, by range of positions.

    Args:
        run: Folder of the original checkpoint.
        exponentials: Number of exponentials per curve.
        taps: Number of smallest distances between two tokens (lags) at which a curve keeps its exact values.
        out: New run folder.
        fits: Errors of the fits, one for each curve.
        original: Losses of the original model.
        before: Losses of the new model before fine-tuning.
        after: Losses of the new model after fine-tuning, None without fine-tuning.
    """

    run: str
    exponentials: int
    taps: int
    out: str
    fits: tuple[CurveError, ...]
    original: dict[str, float]
    before: dict[str, float]
    after: dict[str, float] | None = field(default=None, metadata=OPTIONAL)


def check_conversion(conversion: Conversion, config: RunConfig) -> None:
    """Check that a trained model can be converted with these settings, before the fit of its curves takes minutes.

    Args:
        conversion: Settings of the conversion.
        config: Config of the trained model.

    Raises:
        InvalidValue: The model cannot be converted with these settings.
        AlreadyExists: The folder `conversion.out` already exists.
        TimemixError: The source `conversion.data` cannot be opened.
    """
    _recurrent_part(config.model).exponential_config(config.model, conversion.exponentials, conversion.taps)
    _train_config(conversion, config.train)
    refuse_existing(conversion.out)
    # A folder exists, and opening a folder of texts prints its warnings.
    if conversion.data is not None and not Path(conversion.data).is_dir():
        open_source(conversion.data)


def _recurrent_part(model: ModelConfig) -> Any:
    """Return the module that converts models of this architecture; raise InvalidValue without such a module."""
    architecture = find_architecture(model.arch)
    if not architecture.bounded:
        raise InvalidValue(f"a run of {model.arch} already has a constant state; use the run as it is")
    part = architecture.recurrent
    if part is None:
        able = ", ".join(name for name, each in ARCHITECTURES.items() if each.recurrent is not None)
        raise InvalidValue(f"a run of {model.arch} cannot get a constant state; use a run of {able}")
    return load_part(part)


def convert_run(conversion: Conversion, loaded: Loaded, watching: Watching) -> Converted:
    """Convert a trained model to a recurrent network, and fine-tune it in a new run folder.

    Args:
        conversion: Settings of the conversion.
        loaded: The trained model.
        watching: Function that returns a context manager. The manager yields the `watch` of fine-tuning.

    Returns:
        Errors of the fits, and losses before and after the conversion.

    Raises:
        InvalidValue: The model cannot be converted.
        AlreadyExists: The folder `conversion.out` already exists.
        TimemixError: Fine-tuning fails for a reason that `Trainer.run` lists.
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
    try:
        _draw(fits, out / "fit.png")
        before, after = _losses_of_new_run(trainer, watching)
        made = Converted(
            run=str(loaded.folder),
            exponentials=conversion.exponentials,
            taps=conversion.taps,
            out=str(out),
            fits=tuple(CurveError(fit.layer, fit.head, fit.error) for fit in fits),
            original=losses_by_range(loaded.model, trainer.corpus.valid.part(slice(MOST_TOKENS))),
            before=before,
            after=after,
        )
        write_text(out / "convert.json", json.dumps(to_json(made), indent=1))
    finally:
        trainer.lock.release()
    return made


def _config(conversion: Conversion, converted: Loaded) -> RunConfig:
    """Return the config of the new run: the converted model, the text, and the settings of fine-tuning.

    Without fine-tuning, the run has 0 steps, so it is complete at its first checkpoint.
    """
    config, own = converted.config, converted.folder.parent.parent / "data"
    # The folder of the old run already has prepared tokens.
    source = conversion.data or (str(own) if is_corpus(own) else config.data.source)
    data = config.data.with_source(source)
    return replace(config, data=data, train=_train_config(conversion, config.train))


def _train_config(conversion: Conversion, train: TrainConfig) -> TrainConfig:
    return replace(
        train,
        steps=conversion.finetune,
        contexts=CONTEXTS,
        batch_size=max(1, train.batch_size // CONTEXTS),
        accumulation=1,
        tune="all",
        optimizer="adamw",
        betas=(0.9, 0.99),
        weight_decay=0.0,
        lr=conversion.lr,
        lr_final=0.0,
        schedule="linear",
        warmup=0.02,
        valid_every=conversion.finetune or TrainConfig.valid_every,
        save_every=conversion.finetune or TrainConfig.save_every,
        device=conversion.device,
    )


def _losses_of_new_run(trainer: Trainer, watching: Watching) -> tuple[dict[str, float], dict[str, float] | None]:
    """Fine-tune the converted model, and return its losses before and after; None without fine-tuning."""
    tokens = trainer.corpus.valid.part(slice(MOST_TOKENS))
    before = losses_by_range(trainer.model, tokens)
    if trainer.is_complete:
        # Save the checkpoint again with a validation loss: this loss selects the best checkpoint.
        trainer.validate()
        trainer.save()
        return before, None
    keep_freed_memory()
    with watching(0, trainer.config.train.steps) as watch:
        trainer.run(watch)
    plot_loss([trainer.out], trainer.out / "loss.png")
    return before, losses_by_range(trainer.model, tokens)


def losses_by_range(model: LanguageModel, tokens: np.ndarray | Tokens) -> dict[str, float]:
    """Return the mean loss in nats per counted token for each range of RANGES that the text is long enough for.

    A window has 16 ctx_len tokens. In a shorter text, a window has the largest multiple of ctx_len that fits. A model
    with bounded context re-reads the newest half of its context when the context is full.

    Args:
        model: The model.
        tokens: Token ids, (tokens,).

    Returns:
        Losses by range of positions. A range such as "1-4" counts in multiples of ctx_len. A range without a counted
        token is left out.
    """
    ctx_len = model.config.ctx_len
    contexts = min(RANGES[-1][1], (len(tokens) - 1) // ctx_len)
    if contexts < 1:
        return {}
    counted = counted_by_position(tokens, contexts * ctx_len)
    # A position without a counted target has no loss.
    summed = np.nan_to_num(loss_by_position(model, tokens, contexts=contexts)) * counted
    ranges = {(a, b): slice(a * ctx_len, b * ctx_len) for a, b in RANGES if b <= contexts}
    return {f"{a}-{b}": float(summed[x].sum() / counted[x].sum()) for (a, b), x in ranges.items() if counted[x].any()}


def _draw(fits: Sequence[Fitted], out: Path, most: int = 8) -> None:
    """Draw each curve and its fit in a grid of layers by heads, with at most `most` layers and `most` heads."""
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
        axes.set_title(f"layer {fit.layer}, head {fit.head}: error {fit.error:.0%}", fontsize=7)
        axes.tick_params(labelsize=6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("lag", fontsize=7)
    grid[0][0].legend(fontsize=6, frameon=False)
    save_picture(figure, out)
