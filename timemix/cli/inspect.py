"""The command-line verb inspect: show the curves, projections, token-shift and matrix states of a trained model."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from timemix.cli.options import RunFolder, parse, refuse_template, refuse_text_options
from timemix.data.config import Template
from timemix.errors import DamagedFile, InvalidValue
from timemix.storage.json_files import to_json

if TYPE_CHECKING:
    from timemix.evaluation.inspect import Inspection, Projection
    from timemix.evaluation.states import StateReport


@dataclass(frozen=True)
class InspectArguments:
    """Show the curves over time, the projections, the use of token-shift and the matrix states of a trained model.

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
    text_key: Annotated[str | None, tyro.conf.arg(aliases=["--data.text-key"])] = None
    """Key of the text in .jsonl and .ndjson files, or column of .parquet, .csv and .tsv files. Default: text; .csv and
    .tsv files are then plain text."""
    template: Annotated[Template | None, tyro.conf.arg(aliases=["--data.template"])] = None
    """Chat template for records with `messages`, or with `prompt` and `completion`; only answers count in the losses.
    Default: the records have texts."""
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
    if parsed.data is None:
        refuse_text_options(arguments)
    refuse_template(parsed.template, parsed.data, parsed.text_key)
    from timemix.data.corpus import evenly_spaced
    from timemix.data.sources import read_source
    from timemix.evaluation.conversations import encode_conversations
    from timemix.evaluation.inspect import draw, inspect_run
    from timemix.runs.folder import checkpoints
    from timemix.runs.load import load
    from timemix.runtime.device import choose_device

    if (parsed.run / "metrics.jsonl").exists() and not checkpoints(parsed.run):
        raise DamagedFile(
            f"{parsed.run} has no checkpoint, so there are no weights to show; draw its losses with:"
            f" timemix plot {shlex.quote(str(parsed.run))}"
        )
    loaded = load(parsed.run, checkpoint=parsed.checkpoint, device=str(choose_device(parsed.device)[0]))
    run = loaded.folder.parent.parent
    if parsed.data is None:
        tokens: Any = loaded.corpus().valid
        if len(tokens) < 2:
            raise InvalidValue(
                f"the held-out text of the run has {len(tokens)} tokens, but at least 2 are needed; add --data"
            )
    else:
        text = read_source(
            parsed.data,
            encoding=parsed.encoding,
            keep_nul=parsed.keep_nul,
            text_key=parsed.text_key,
            template=parsed.template,
        ).text
        if parsed.template is None:
            tokens, _ = loaded.tokenizer.encode_lenient(text)
        else:
            tokens, _ = encode_conversations(loaded.tokenizer, text)
    report = inspect_run(loaded, evenly_spaced(tokens, parsed.tokens))
    pictures = draw(report, loaded.config.model, parsed.out or run / "inspect")
    if parsed.json:
        print(json.dumps(to_json(report)))
        return 0
    _print_projections(report)
    if report.states is not None:
        _print_states(report.states)
    for part, reason in report.not_shown.items():
        print(f"not shown: {part}: {reason}")
    print("\n".join(str(picture) for picture in pictures))
    return 0


def _print_projections(report: "Inspection") -> None:
    print(f"{report.arch}, {report.loss:.4f} nats per token on {report.tokens:,} tokens\n")
    has_shift = "token-shift" not in report.not_shown
    if has_shift:
        print(
            "share  part of the shifted channels in |weight| x deviation of the input\n"
            "start  the same share before training, if the run did not start from another model\n"
            "added  rise of the loss, in nats per token, if this projection alone does not see the shifted channels\n"
        )
    print("layer  part   projection      mean  deviation" + ("  share  start    added" if has_shift else ""))
    for row in report.projections:
        line = f"{row.layer:>5}  {row.half:<6} {row.projection:<11} {row.mean:>8.3f} {row.deviation:>10.3f}"
        print(line + (_shift_columns(row, report.loss) if has_shift else ""))


def _shift_columns(row: "Projection", loss: float) -> str:
    share, start = (("-" if x is None else f"{x:.2f}") for x in (row.share, row.share_at_start))
    added = f"{row.loss_without_shifted - loss:+.4f}" if row.loss_without_shifted is not None else "-"
    return f" {share:>6} {start:>6} {added:>8}"


def _print_states(states: "StateReport") -> None:
    has_rates = any(row.rate is not None for row in states.heads)
    rate_words = "rate       in-context learning rate: mean and standard deviation over channels and tokens\n"
    print(
        "\nhalf-life  tokens after which half of the state is left, at 10, 50 and 90 % of channels and tokens\n"
        + rate_words * has_rates
        + "norm       Frobenius norm of the state, mean over the text\n"
        "rank       effective rank of the state, mean over the text\n"
    )
    rate_columns = "   rate  deviation" if has_rates else ""
    print(f"layer  head  half-life 10 %      50 %      90 %{rate_columns}      norm    rank")
    for row in states.heads:
        low, middle, high = (f"{x:,.1f}" for x in row.half_life)
        norm, rank = (sum(values) / len(values) for values in (row.norm, row.effective_rank))
        rate = "" if row.rate is None else f" {row.rate:>6.2f} {row.rate_deviation:>10.2f}"
        print(f"{row.layer:>5}  {row.head:>4}  {low:>14} {middle:>9} {high:>9}{rate} {norm:>9.2f} {rank:>7.2f}")
    print("\ntokens that change the states of a layer most: mean change |S[t] - S[t-1]|, and number of occurrences\n")
    for layer in dict.fromkeys(row.layer for row in states.changes):
        own = [f"{row.text!r} {row.change:.2f} ({row.count:,}x)" for row in states.changes if row.layer == layer]
        print(f"layer {layer}: {', '.join(own)}")
    print()
