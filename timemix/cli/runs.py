"""The command-line verb runs: list the runs below a folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from timemix.cli.options import parse
from timemix.cli.terminal import escaped
from timemix.storage.json_files import to_json

if TYPE_CHECKING:
    from timemix.runs.listing import RunSummary


@dataclass(frozen=True)
class RunsArguments:
    """List the runs at or below a folder: state, size, steps, newest losses in nats per token.

    The state of a run is running, complete, stopped (timemix train --resume RUN resumes the run) or damaged. The age of
    a run is the time since the newest line of metrics.jsonl.

    Examples:
        timemix runs
        timemix runs runs/compared --json
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[FOLDER]")] = Path("runs")
    """Folder with runs at any depth, or a run folder."""
    json: bool = False
    """Output as one JSON object on stdout."""


def runs(arguments: list[str]) -> int:
    parsed = parse(RunsArguments, arguments, "runs")
    from timemix.runs.listing import list_runs

    found = list_runs(parsed.folder)
    if parsed.json:
        print(json.dumps({"folder": str(parsed.folder), "runs": [to_json(run) for run in found]}))
    elif found:
        _print_table(found, parsed.folder)
    else:
        print(f"there is no run in {parsed.folder}; train one with: timemix train --out {parsed.folder / 'NAME'}")
    return 0


_COLUMNS = ("run", "state", "arch", "parameters", "step", "loss", "valid", "age")


def _print_table(found: "list[RunSummary]", folder: Path) -> None:
    table = [_COLUMNS, *(_cells(run, folder) for run in found)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(map(_aligned, row, widths, _COLUMNS)).rstrip())
    for run in found:
        if run.error is not None:
            print(f"{_name(run, folder)}: {escaped(run.error)}")


def _aligned(cell: str, width: int, column: str) -> str:
    return cell.ljust(width) if column in ("run", "state", "arch") else cell.rjust(width)


def _cells(run: "RunSummary", folder: Path) -> tuple[str, ...]:
    return (
        _name(run, folder),
        run.state,
        run.arch or "-",
        "-" if run.parameters is None else f"{run.parameters:,}",
        "-" if run.step is None else f"{run.step}/{run.steps}",
        *map(_loss, (run.loss, run.valid_loss)),
        "-" if run.age is None else _age(run.age),
    )


def _loss(loss: float | None) -> str:
    if loss is None:
        return "-"
    return f"{loss:.4f}" if abs(loss) < 1e6 else f"{loss:.3g}"


def _name(run: "RunSummary", folder: Path) -> str:
    inside = Path(run.folder).relative_to(folder)
    # A name may contain a line end, and a row of the table is one line.
    return escaped(str(inside) if inside.parts else run.folder).replace("\n", "\\n").replace("\t", "\\t")


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
