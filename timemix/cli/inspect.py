"""The verb inspect: a look inside a trained model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from timemix.cli.options import parse
from timemix.errors import DamagedFile, InvalidValue
from timemix.storage.json_files import to_json

if TYPE_CHECKING:
    from timemix.evaluation.inspect import Inspection


@dataclass(frozen=True)
class InspectArguments:
    """Look inside a trained model: tables over time, outputs of the projections, their use of token-shift."""

    run: tyro.conf.Positional[Path]
    """Run folder, or one of its checkpoints."""
    out: Path | None = None
    """Folder for the pictures. Default: inspect/ in the run folder."""
    data: str | None = None
    """Text, as in `eval --data`. Default: held-out text of the run."""
    encoding: Annotated[str, tyro.conf.arg(aliases=["--data.encoding"])] = "utf-8"
    """Encoding of the text files."""
    keep_nul: Annotated[bool, tyro.conf.arg(aliases=["--data.keep-nul"])] = False
    """NUL characters as text, rather than the sign of a binary file."""
    tokens: int = 16384
    """Largest number of tokens that are read."""
    checkpoint: str = "best"
    """Checkpoint: best, newest, or a step."""
    device: str = "auto"
    """PyTorch device: cpu, cuda ...; auto: cuda if available."""
    json: bool = False
    """One JSON object on stdout instead of text."""

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
            f"{parsed.run} has no weights, so neither tables nor projections can be shown; its losses can:"
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
    for what, reason in report.not_shown.items():
        print(f"not shown: {what}: {reason}")
    print("\n".join(str(picture) for picture in pictures))
    return 0


def _print_projections(report: "Inspection") -> None:
    print(
        f"{report.arch}, {report.loss:.4f} nats per token on {report.tokens:,} tokens."
        " Share: of the shifted channels in |weight| x deviation of the input, now and at the start of training."
        " Added: nats per token when this projection alone does not see them.\n"
    )
    print("layer  half   projection      mean  deviation  share  start    added")
    for row in report.projections:
        share, start = (("-" if x is None else f"{x:.2f}") for x in (row.share, row.share_at_start))
        added = f"{row.loss_without_shifted - report.loss:+.4f}" if row.loss_without_shifted is not None else "-"
        print(
            f"{row.layer:>5}  {row.half:<6} {row.projection:<11} {row.mean:>8.3f} {row.deviation:>10.3f}"
            f" {share:>6} {start:>6} {added:>8}"
        )
