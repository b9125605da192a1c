"""The verb data: describe or prepare a text."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from timemix.cli.options import parse, print_report
from timemix.data.config import DataConfig
from timemix.storage.json_files import to_json


@dataclass(frozen=True)
class DataArguments:
    """Describe a text, named first: timemix data FILE. With --out, write its tokens for `train --data` instead.

    A source is a file, a folder or a glob of files (.gz, .xz and .bz2 are read as they are), `builtin`, or a
    download: simplebooks-92, simplebooks-2, tinyshakespeare, enwik8, text8.
    """

    out: Path | None = None
    """Folder to make."""
    data: DataConfig = field(default_factory=DataConfig)
    json: bool = False
    """Print one JSON object."""


def data(arguments: list[str]) -> int:
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--data.source", *arguments]
    parsed = parse(DataArguments, arguments, "data")
    from timemix.data.prepare import describe, prepare

    if parsed.out is None:
        report = to_json(describe(parsed.data, progress=True))
    else:
        report = to_json(prepare(parsed.out, parsed.data, progress=True).info) | {"folder": str(parsed.out)}
    if parsed.json:
        print(json.dumps(report))
    else:
        print_report(report)
    return 0
