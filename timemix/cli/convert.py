"""The verb convert: a trained model as a recurrent network, what that costs in loss, a fine-tune to regain it."""

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro

from timemix.cli.options import parse
from timemix.errors import InvalidValue
from timemix.storage.files import write_text

_FLAGS = {"exponentials": "--constant-state", "taps": "--taps"}


@dataclass(frozen=True)
class ConvertArguments:
    """Turn a trained model into a recurrent network: constant time and memory per token, no end of the context.

    Each time curve f becomes a sum of K decaying exponentials. The new run folder is an ordinary one: sample, eval,
    inspect and train --from read it. fit.png shows the fits, convert.json holds the losses.
    """

    run: tyro.conf.Positional[Path]
    """Run folder, or one of its checkpoints."""
    constant_state: tuple[int, ...]
    """K, the number of exponentials per curve. Several numbers: one run folder for each, inside --out."""
    out: Path
    """New folder for the run."""
    taps: int = 0
    """Number of first lags that keep their exact values, beside the exponentials."""
    finetune: int = 0
    """Optimizer steps afterwards, on windows of 4 ctx_len. 0: no fine-tune."""
    lr: float = 5e-4
    """Learning rate of --finetune; it decays to 0."""
    data: str | None = None
    """Text of the measurement and the fine-tune, as in `train --data`. Default: text of the run."""
    device: str = "auto"
    """PyTorch device: cpu, cuda ...; auto: cuda if available."""
    json: bool = False
    """One JSON object on stdout instead of text."""

    def __post_init__(self) -> None:
        if self.finetune < 0:
            raise InvalidValue(f"--finetune is {self.finetune}; it must be at least 0")


def convert(arguments: list[str]) -> int:
    parsed = parse(ConvertArguments, arguments, "convert")
    from timemix.cli.watch import watching
    from timemix.errors import Interrupted
    from timemix.experiments.convert import Conversion, check_conversion, convert_run
    from timemix.runs.load import load

    loaded = load(parsed.run)
    several = len(parsed.constant_state) > 1
    conversions = [
        Conversion(
            exponentials=each,
            out=parsed.out / str(each) if several else parsed.out,
            taps=parsed.taps,
            finetune=parsed.finetune,
            lr=parsed.lr,
            data=parsed.data,
            device=parsed.device,
        )
        for each in parsed.constant_state
    ]
    # What is wrong with the last is found before the first begins.
    for conversion in conversions:
        try:
            check_conversion(conversion, loaded.config.model)
        except InvalidValue as error:
            raise InvalidValue(re.sub("^exponentials|^taps", lambda name: _FLAGS[name[0]], str(error))) from error
    report: dict[str, Any] = {"run": str(loaded.folder), "ctx_len": loaded.config.model.ctx_len, "converted": []}
    for conversion in conversions:
        try:
            row = convert_run(conversion, loaded, watching)
        except Interrupted as stop:
            print(f"timemix: {stop}; resume with: timemix train --resume {conversion.out}", file=sys.stderr)
            return 128 + stop.number
        report["original"] = row.pop("original")
        report["converted"].append(row)
        if not parsed.json:
            _say(report, conversion is conversions[0])
    if several:
        write_text(parsed.out / "convert.json", json.dumps(report, indent=1))
    if parsed.json:
        print(json.dumps(report))
    return 0


def _say(report: dict[str, Any], first: bool) -> None:
    row = report["converted"][-1]
    error = math.sqrt(fmean(fit["error"] ** 2 for fit in row["fits"]))
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
