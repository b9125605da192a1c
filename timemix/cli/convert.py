"""The verb convert: a trained rwkv1 as a recurrent network, what that costs in loss, a fine-tune to regain it."""

import json
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from timemix.cli.options import parse
from timemix.cli.watch import watching
from timemix.config.run import RunConfig
from timemix.data.config import DataConfig
from timemix.data.corpus import is_corpus
from timemix.data.shards import Tokens
from timemix.errors import Interrupted, InvalidValue
from timemix.evaluation.loss import loss_by_position
from timemix.models.language_model import LanguageModel
from timemix.models.rwkv1.to_exponential import exponential_config, with_exponentials
from timemix.reporting.plots import plot_loss, save_picture
from timemix.runs.load import Loaded, load
from timemix.runtime.machine import keep_freed_memory
from timemix.storage.files import write_text
from timemix.training.start import new_run
from timemix.training.trainer import Trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes


RANGES = ((0, 1), (1, 4), (4, 8), (8, 16))
"""Positions whose mean loss is told, in units of ctx_len."""

CONTEXTS = 4
"""Length of the fine-tune's windows, in ctx_len."""

_FLAGS = {"exponentials": "--constant-state", "taps": "--taps"}

MOST_TOKENS = 2**18
"""Of the held-out text, its first."""


@dataclass(frozen=True)
class ConvertArguments:
    """Make a recurrent network of a trained rwkv1: constant time and memory for each token, and no end at ctx_len.

    Each time curve f becomes a sum of K decaying exponentials. The new run folder is one like any other: sample, eval,
    inspect and train --from work on it; its fits are drawn in fit.png, its losses stand in convert.json.
    """

    run: tyro.conf.Positional[Path]
    """Run folder, or one of its checkpoints."""
    constant_state: tuple[int, ...]
    """K, the exponentials of each curve; of several numbers each gets a run folder of its own in --out."""
    out: Path
    """Folder to make for the run."""
    taps: int = 0
    """Keep so many of the first lags as they are, beside the exponentials."""
    finetune: int = 0
    """Train so many steps afterwards, on windows of 4 ctx_len; 0: none."""
    lr: float = 5e-4
    """Learning rate of --finetune, falling to 0."""
    data: str | None = None
    """Text to measure and to fine-tune on, as `train --data`; None: that of the run."""
    device: str = "auto"
    """cpu, cuda ...; auto: cuda where there is one."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        if self.finetune < 0:
            raise InvalidValue(f"--finetune is {self.finetune}; it must be at least 0")


def convert(arguments: list[str]) -> int:
    parsed = parse(ConvertArguments, arguments, "convert")
    loaded = load(parsed.run)
    for each in parsed.constant_state:
        try:
            exponential_config(loaded.config.model, each, parsed.taps)
        except InvalidValue as error:
            raise InvalidValue(re.sub("^exponentials|^taps", lambda name: _FLAGS[name[0]], str(error))) from error
    several = len(parsed.constant_state) > 1
    report: dict[str, Any] = {"run": str(loaded.folder), "ctx_len": loaded.config.model.ctx_len, "converted": []}
    for each in parsed.constant_state:
        out = parsed.out / str(each) if several else parsed.out
        try:
            row = _convert(parsed, loaded, each, out)
        except Interrupted as stop:
            print(f"timemix: {stop}; go on with: timemix train --resume {out}", file=sys.stderr)
            return 128 + stop.number
        report["original"] = row.pop("original")
        report["converted"].append(row)
        if not parsed.json:
            _say(report, each == parsed.constant_state[0])
    if several:
        write_text(parsed.out / "convert.json", json.dumps(report, indent=1))
    if parsed.json:
        print(json.dumps(report))
    return 0


def _convert(parsed: ConvertArguments, loaded: Loaded, exponentials: int, out: Path) -> dict[str, Any]:
    """One run folder; returns its row of the report, and the losses of the original."""
    try:
        model, fits = with_exponentials(loaded.model, exponentials, parsed.taps)
    except InvalidValue as error:
        raise InvalidValue(f"{loaded.folder}: {error}") from error
    config = replace(loaded.config, model=model.config, start=str(loaded.folder))
    converted = Loaded(model, loaded.tokenizer, config, loaded.folder)
    trainer = new_run(_config(parsed, converted), out, start=converted)
    tokens = trainer.corpus.valid[:MOST_TOKENS]
    _draw(fits, out / "fit.png")
    row = {
        "exponentials": exponentials,
        "taps": parsed.taps,
        "out": str(out),
        "fits": [{name: fit[name] for name in ("layer", "head", "error")} for fit in fits],
        "original": losses_by_range(loaded.model, tokens),
        "before": losses_by_range(trainer.model, tokens),
    }
    if parsed.finetune:
        _finetune(trainer)
        row["after"] = losses_by_range(trainer.model, tokens)
    else:
        # Once more, with its loss, by which the best checkpoint is chosen.
        trainer.validate()
        trainer.save()
    write_text(out / "convert.json", json.dumps({"run": str(loaded.folder), **row}, indent=1))
    return row


def _config(parsed: ConvertArguments, converted: Loaded) -> RunConfig:
    """Of the new run: the model, the text of the old one where no other is named, and the fine-tune's training."""
    config, own = converted.config, converted.folder.parent.parent / "data"
    # What the run was made with lies there already.
    source = parsed.data or (str(own) if is_corpus(own) else config.data.source)
    steps = parsed.finetune or 300
    train = replace(
        config.train,
        steps=steps,
        contexts=CONTEXTS,
        batch_size=max(1, config.train.batch_size // CONTEXTS),
        accumulation=1,
        optimizer="adamw",
        betas=(0.9, 0.99),
        weight_decay=0.0,
        lr=parsed.lr,
        lr_final=0.0,
        schedule="linear",
        warmup=0.02,
        valid_every=steps,
        save_every=steps,
        device=parsed.device,
    )
    return replace(config, data=DataConfig(source=source, order=config.data.order), train=train)


def _finetune(trainer: Trainer) -> None:
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


def _say(report: dict[str, Any], first: bool) -> None:
    row = report["converted"][-1]
    error = math.sqrt(np.mean([fit["error"] ** 2 for fit in row["fits"]]))
    name = f"{row['exponentials']} exponentials" + (f", {row['taps']} taps" if row["taps"] else "")
    if first:
        ranges = "".join(f"{r:>9}" for r in report["original"])
        print(f"{'nats per token at positions, in ctx_len':<44}{ranges}")
        print(_line("original, reading its newest half again", report["original"]))
    print(_line(name, row["before"]), f"  {error:.1%} of the curves not fitted; {row['out']}")
    if "after" in row:
        print(_line(f"{name}, fine-tuned", row["after"]))


def _line(name: str, losses: dict[str, float]) -> str:
    return f"{name:<44}" + "".join(f"{loss:>9.4f}" for loss in losses.values())


def _draw(fits: list[dict[str, Any]], out: Path, most: int = 8) -> None:
    """A row per layer, a column per head: the curve and its fit. Of many layers or heads the first `most`."""
    from matplotlib.figure import Figure

    layers, heads = (min(most, 1 + max(fit[name] for fit in fits)) for name in ("layer", "head"))
    figure = Figure(figsize=(2.3 * heads + 0.4, 1.5 * layers + 0.4), dpi=130, layout="constrained")
    grid = figure.subplots(layers, heads, squeeze=False, sharex=True)
    for fit in fits:
        if fit["layer"] >= layers or fit["head"] >= heads:
            continue
        axes: Axes = grid[fit["layer"]][fit["head"]]
        axes.plot(fit["f"], color="0.6", linewidth=1, label="f")
        axes.plot(fit["fit"], color="#D55E00", linewidth=1.3, label="fit")
        axes.set_title(f"layer {fit['layer']}, head {fit['head']}: {fit['error']:.0%} left", fontsize=7)
        axes.tick_params(labelsize=6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("lag", fontsize=7)
    grid[0][0].legend(fontsize=6, frameon=False)
    save_picture(figure, out)
