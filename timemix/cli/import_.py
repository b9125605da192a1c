"""The command-line verb import: import published weights of RWKV as a run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from timemix.cli.options import parse, print_report


@dataclass(frozen=True)
class ImportArguments:
    """Import published weights of RWKV as a run for timemix sample, eval, inspect, export and train --from.

    The weights keep their number format on disk. Names and shapes give the version and the sizes of the model. A folder
    of timemix export --to hf may have any architecture.

    Examples:
        timemix import rwkv7.pth --tokenizer rwkv_vocab_v20230424.txt --out runs/rwkv7
        timemix import rwkv7-hf --out runs/rwkv7 --ctx-len 4096
    """

    file: Annotated[
        Path,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="FILE", help="File of weights (.pth or .safetensors), or folder of Hugging Face with a config.json."
        ),
    ]
    out: Path
    """New folder for the run."""
    tokenizer: Path | None = None
    """Tokenizer of the model: rwkv_vocab_v20230424.txt, or a tokenizer.json of timemix or of a byte-level tokenizer
    such as GPT-NeoX's. Default: such a file in the folder of the weights, or for 65,536 tokens the file of the package
    rwkv or pyrwkv-tokenizer."""
    ctx_len: int = 1024
    """Length of windows in training and eval in tokens, from 1 to 1048576. Generation has no such limit. A folder of
    timemix export --to hf has its own length."""
    json: bool = False
    """Output as one JSON object on stdout."""


def import_(arguments: list[str]) -> int:
    parsed = parse(ImportArguments, arguments, "import")
    from timemix.interop.importing import import_run

    imported = import_run(parsed.file, parsed.out, parsed.tokenizer, ctx_len=parsed.ctx_len)
    report = {
        "arch": imported.config.model.arch,
        "size": imported.config.model.size_words(),
        "parameters": imported.parameters,
        "weights": imported.formats,
        "tokenizer": imported.config.data.tokenizer,
        "run": str(parsed.out),
    }
    if parsed.json:
        print(json.dumps(report))
    else:
        print_report(report)
    return 0
