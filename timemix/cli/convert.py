"""The command-line verb convert: convert a trained model to a recurrent network, measure its loss, fine-tune it."""

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from timemix.cli.options import RunFolder, parse
from timemix.cli.terminal import lasting_output
from timemix.errors import InvalidValue
from timemix.storage.files import write_text
from timemix.storage.json_files import to_json

if TYPE_CHECKING:
    from timemix.experiments.convert import Converted

_FLAGS = {"exponentials": "--constant-state", "taps": "--taps"}


@dataclass(frozen=True)
class ConvertArguments:
    """Convert a trained model to a recurrent network, with constant time and memory per token and no context limit.

    Each time curve f becomes a sum of K decaying exponentials. The result is a run folder for timemix sample, eval,
    inspect and train --from. In the run folder, fit.png shows the fits, and convert.json holds the losses.

    Examples:
        timemix convert runs/mine --constant-state 8 --out runs/recurrent
        timemix convert runs/mine --constant-state 4 8 16 --finetune 300 --out runs/recurrent
    """

    run: RunFolder
    constant_state: tuple[int, ...]
    """Number K of exponentials per curve, from 1 to the ctx_len of the run.
    Several numbers give one run folder each, inside --out."""
    out: Path
    """New folder for the run."""
    taps: int = 0
    """Number of first lags that keep their exact values, from 0 to the ctx_len of the run."""
    finetune: int = 0
    """Number of optimizer steps of a fine-tune on windows of 4 ctx_len, at least 0 (0: no fine-tune)."""
    lr: float | None = None
    """Learning rate of --finetune, at least 0; it decays to 0. Default: 0.0005."""
    data: str | None = None
    """Text for the measured losses and --finetune, a source as in timemix train --data. Default: text of the run."""
    device: str = "auto"
    """PyTorch device: cpu, cuda ...; `auto` is cuda if available, otherwise cpu."""
    json: bool = False
    """Output as one JSON object on stdout."""

    def __post_init__(self) -> None:
        if self.finetune < 0:
            raise InvalidValue(f"--finetune is {self.finetune}; it must be at least 0")
        given = self.constant_state
        if not given:
            raise InvalidValue("--constant-state has no number; give at least one, such as --constant-state 8")
        if self.lr is not None and not self.finetune:
            raise InvalidValue("--lr has no effect without --finetune; leave --lr out, or add --finetune STEPS")
        if len(set(given)) < len(given):
            raise InvalidValue(f"--constant-state is {' '.join(map(str, given))}; give each number once")


@lasting_output()
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
            **({} if parsed.lr is None else {"lr": parsed.lr}),
            data=parsed.data,
            device=parsed.device,
        )
        for each in parsed.constant_state
    ]
    # All conversions are checked before the first conversion starts.
    for conversion in conversions:
        try:
            check_conversion(conversion, loaded.config)
        except InvalidValue as error:
            raise InvalidValue(re.sub("^exponentials|^taps", lambda name: _FLAGS[name[0]], str(error))) from error
    rows: list[Converted] = []
    for conversion in conversions:
        fitted = f"fitting {conversion.exponentials} exponentials to each curve of {loaded.folder}"
        print(f"{fitted}, then measuring losses ...", file=sys.stderr)
        try:
            rows.append(convert_run(conversion, loaded, watching))
        except Interrupted as stop:
            print(f"timemix: {stop}; resume with: timemix train --resume {conversion.out}", file=sys.stderr)
            return 128 + stop.number
        if not parsed.json:
            _say(rows[-1], len(rows) == 1)
    report = {
        "run": str(loaded.folder),
        "ctx_len": loaded.config.model.ctx_len,
        "converted": [{n: x for n, x in to_json(row).items() if n not in ("run", "original")} for row in rows],
        "original": rows[-1].original,
    }
    if several:
        write_text(parsed.out / "convert.json", json.dumps(report, indent=1))
    if parsed.json:
        print(json.dumps(report))
    return 0


def _say(row: "Converted", first: bool) -> None:
    error = math.sqrt(fmean(fit.error**2 for fit in row.fits))
    name = f"{row.exponentials} exponentials" + (f", {row.taps} taps" if row.taps else "")
    if first:
        ranges = "".join(f"{r:>9}" for r in row.original)
        print(f"{'nats per token by position / ctx_len':<44}{ranges}")
        print(_line("original, restarted from its newest half", row.original))
    print(_line(name, row.before), f"  fit error {error:.1%} of the curves; {row.out}")
    if row.after is not None:
        print(_line(f"{name}, fine-tuned", row.after))


def _line(name: str, losses: dict[str, float]) -> str:
    return f"{name:<44}" + "".join(f"{loss:>9.4f}" for loss in losses.values())
