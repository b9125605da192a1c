"""The command-line verb data: describe or prepare a text."""

import json
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from timemix.cli.options import parse, print_report
from timemix.cli.terminal import lasting_output
from timemix.data.config import DataConfig
from timemix.storage.json_files import to_json


@dataclass(frozen=True)
class DataArguments:
    """Describe a text, or with --out save its tokens to a folder for timemix train --data.

    A source is a file, a folder or a glob of files (.gz, .xz, .bz2 and .zst are decompressed), `-` (standard input),
    `builtin`, or a download: simplebooks-92, simplebooks-2, tinyshakespeare, enwik8, text8. `hf:NAME` is a dataset of
    Hugging Face, with :CONFIG and :SPLIT if needed, and `hf:FOLDER` is a folder with such a dataset. In a folder or a
    glob, timemix skips hidden files, binary files, links to other files of the source, compressed copies of other
    files, and folders that timemix has created. A warning names up to four skipped files of each kind.

    Examples:
        timemix data my.txt
        timemix data my.txt --data.tokenizer subword --data.vocab-size 300 --out tokens/mine
    """

    source: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[SOURCE]")] = None
    """Source of the text. Default: the value of --data.source."""
    out: Path | None = None
    """New folder for the tokens. Default: a description on stdout, no folder."""
    data: DataConfig = field(default_factory=DataConfig)
    json: bool = False
    """Output as one JSON object on stdout."""


def data(arguments: list[str]) -> int:
    parsed = parse(DataArguments, arguments, "data")
    config = parsed.data if parsed.source is None else replace(parsed.data, source=parsed.source)
    from timemix.data.describe import describe
    from timemix.data.prepare import prepare

    if parsed.out is None:
        report = to_json(describe(config, progress=True))
    else:
        report = to_json(prepare(parsed.out, config, progress=True).info) | {"folder": str(parsed.out)}
    # With --out the result is the folder: a full or closed stdout is not an error.
    with nullcontext() if parsed.out is None else lasting_output():
        if parsed.json:
            print(json.dumps(report))
        else:
            print_report(_without_zeros(report if parsed.out is None else _in_short(report)))
    return 0


def _without_zeros(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report without the numbers of documents of a text that has no ends of documents."""
    splits = {split: {k: v for k, v in report[split].items() if k != "documents" or v} for split in ("train", "valid")}
    return report | splits


def _in_short(info: dict[str, Any]) -> dict[str, Any]:
    """Return the summary of a prepared folder, without hashes and with counts in place of lists."""
    splits = {
        split: {name: value for name, value in info[split].items() if isinstance(value, int)}
        for split in ("train", "valid")
    }
    return {
        "folder": info["folder"],
        "files": len(info["files"]),
        "encoding": info["encoding"],
        "held_out": info["held_out"],
        "tokenizer": info["tokenizer"]["kind"],
        "vocab_size": info["tokenizer"]["vocab_size"],
        **splits,
        **{name: info[name] for name in ("documents", "valid_documents") if name in info},
    }
