"""The verb convert: a trained model as a recurrent network, what that costs in loss, a fine-tune to regain it."""

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import tyro

from timemix.cli.options import parse
from timemix.cli.terminal import lasting_output
from timemix.errors import InvalidValue
from timemix.storage.files import write_text
from timemix.storage.json_files import to_json

if TYPE_CHECKING:
    from timemix.experiments.convert import Converted

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
    rows: list[Converted] = []
    for conversion in conversions:
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
        print(f"{'nats per token at positions, in ctx_len':<44}{ranges}")
        print(_line("original, reading its newest half again", row.original))
    print(_line(name, row.before), f"  {error:.1%} of the curves not fitted; {row.out}")
    if row.after is not None:
        print(_line(f"{name}, fine-tuned", row.after))


def _line(name: str, losses: dict[str, float]) -> str:
    return f"{name:<44}" + "".join(f"{loss:>9.4f}" for loss in losses.values())
