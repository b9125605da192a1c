"""The command-line verb inspect: show the curves, projections and token-shift of a trained model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from timemix.cli.options import RunFolder, parse
from timemix.errors import DamagedFile, InvalidValue
from timemix.storage.json_files import to_json

if TYPE_CHECKING:
    from timemix.evaluation.inspect import Inspection


@dataclass(frozen=True)
class InspectArguments:
    """Show the curves over time, the outputs of the projections and the use of token-shift of a trained model.

    Examples:
        timemix inspect runs/mine
        timemix inspect runs/mine --tokens 4096 --out pictures --json
    """

    run: RunFolder
    out: Path | None = None
    """Folder for the pictures. Default: inspect/ in the run folder."""
    data: str | None = None
    """Text, a source as in timemix eval --data. Default: held-out text of the run."""
    encoding: Annotated[str, tyro.conf.arg(aliases=["--data.encoding"])] = "utf-8"
    """Encoding of the text files, by its Python name."""
    keep_nul: Annotated[bool, tyro.conf.arg(aliases=["--data.keep-nul"])] = False
    """Accept NUL characters as text. Without this option, a file with a NUL character is binary: timemix skips the file
    in a folder and rejects it as a single source."""
    tokens: int = 16384
    """Largest number of tokens of the text to use, at least 2."""
    checkpoint: str = "best"
    """Checkpoint: best, newest, or the number of its step."""
    device: str = "auto"
    """PyTorch device: cpu, cuda ...; `auto` is cuda if available, otherwise cpu."""
    json: bool = False
    """Output as one JSON object on stdout."""

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise InvalidValue(f"--tokens is {self.tokens}; it must be at least 2")


def inspect(arguments: list[str]) -> int:
    parsed = parse(InspectArguments, arguments, "inspect")
    from timemix.data.corpus import evenly_spaced
    from timemix.data.sources import read_source
    from timemix.evaluation.inspect import draw, inspect_run
    from timemix.runs.folder import checkpoints
    from timemix.runs.load import load
    from timemix.runtime.device import choose_device

    if (parsed.run / "metrics.jsonl").exists() and not checkpoints(parsed.run):
        raise DamagedFile(
            f"{parsed.run} has no checkpoint, so there are no weights to show; draw its losses with:"
            f" timemix plot {parsed.run}"
        )
    loaded = load(parsed.run, checkpoint=parsed.checkpoint, device=str(choose_device(parsed.device)[0]))
    run = loaded.folder.parent.parent
    if parsed.data is None:
        tokens: Any = loaded.corpus().valid
    else:
        tokens, _ = loaded.tokenizer.encode_lenient(
            read_source(parsed.data, encoding=parsed.encoding, keep_nul=parsed.keep_nul).text
        )
    report = inspect_run(loaded, evenly_spaced(tokens, parsed.tokens))
    pictures = draw(report, loaded.config.model, parsed.out or run / "inspect")
    if parsed.json:
        print(json.dumps(to_json(report)))
        return 0
    _print_projections(report)
    for part, reason in report.not_shown.items():
        print(f"not shown: {part}: {reason}")
    print("\n".join(str(picture) for picture in pictures))
    return 0


def _print_projections(report: "Inspection") -> None:
    print(
        f"{report.arch}, {report.loss:.4f} nats per token on {report.tokens:,} tokens\n\n"
        "share  part of the shifted channels in |weight| x deviation of the input\n"
        "start  the same share at the start of training\n"
        "added  rise of the loss, in nats per token, if this projection alone does not see the shifted channels\n"
    )
    print("layer  part   projection      mean  deviation  share  start    added")
    for row in report.projections:
        share, start = (("-" if x is None else f"{x:.2f}") for x in (row.share, row.share_at_start))
        added = f"{row.loss_without_shifted - report.loss:+.4f}" if row.loss_without_shifted is not None else "-"
        print(
            f"{row.layer:>5}  {row.half:<6} {row.projection:<11} {row.mean:>8.3f} {row.deviation:>10.3f}"
            f" {share:>6} {start:>6} {added:>8}"
        )
