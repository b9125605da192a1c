"""The command-line verb import: import published weights of RWKV as a run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from timemix.cli.options import parse, print_report
from timemix.errors import InvalidValue


@dataclass(frozen=True)
class ImportArguments:
    """Import published weights of RWKV as a run for timemix sample, eval, inspect, export and train --from.

    The weights keep their number format on disk. Names and shapes give the version and the sizes of the model. A folder
    of timemix export --to hf may have any architecture.

    With --for, FILE holds states or low-rank terms (LoRA) of RWKV-PEFT for the model of a run.

    Examples:
        timemix import rwkv7.pth --tokenizer rwkv_vocab_v20230424.txt --out runs/rwkv7
        timemix import rwkv7-hf --out runs/rwkv7 --ctx-len 4096
        timemix import state.pth --for runs/rwkv7 --out style.state
        timemix import lora.pth --for runs/rwkv7 --lora-alpha 32 --out runs/merged
    """

    file: Annotated[
        Path,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="FILE", help="File of weights (.pth or .safetensors), or folder of Hugging Face with a config.json."
        ),
    ]
    out: Path
    """New folder for the run. With --for and a state: new file for the session."""
    for_: Path | None = None
    """Run whose model the states or low-rank terms in FILE belong to. Default: FILE holds a whole model."""
    lora_alpha: float | None = None
    """With --for: factor of the low-rank terms, multiplied by the rank; above 0, as in their training. Default: 16."""
    tokenizer: Path | None = None
    """Tokenizer of the model: rwkv_vocab_v20230424.txt, or a tokenizer.json of timemix or of a byte-level tokenizer
    such as GPT-NeoX's. Default: such a file in the folder of the weights, or for 65,536 tokens the file of the package
    rwkv or pyrwkv-tokenizer."""
    ctx_len: int | None = None
    """Length of windows in training and eval in tokens, from 1 to 1048576. Generation has no such limit. Default: 1024.
    A folder of timemix export --to hf has its own length."""
    json: bool = False
    """Output as one JSON object on stdout."""


def import_(arguments: list[str]) -> int:
    parsed = parse(ImportArguments, arguments, "import")
    if parsed.for_ is not None:
        return _import_tuned(parsed, parsed.for_)
    if parsed.lora_alpha is not None:
        raise InvalidValue("--lora-alpha has no effect without --for; leave --lora-alpha out")
    from timemix.interop.importing import CTX_LEN, import_run

    ctx_len = CTX_LEN if parsed.ctx_len is None else parsed.ctx_len
    imported = import_run(parsed.file, parsed.out, parsed.tokenizer, ctx_len=ctx_len)
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


def _import_tuned(parsed: ImportArguments, run: Path) -> int:
    """Import states or low-rank terms for the model of a run."""
    if parsed.tokenizer is not None:
        raise InvalidValue(f"--tokenizer excludes --for: the model has the tokenizer of {run}; leave one of them out")
    if parsed.ctx_len is not None:
        raise InvalidValue(f"--ctx-len excludes --for: the model has the length of {run}; leave one of them out")
    from timemix.interop.tuned import import_tuned

    found = import_tuned(parsed.file, run, parsed.out, alpha=parsed.lora_alpha)
    words = {"state": ("states", "session"), "lora": ("linear_maps", "run")}[found.kind]
    report = {words[0]: found.tensors, words[1]: str(parsed.out)}
    if parsed.json:
        print(json.dumps(report))
    else:
        print_report(report)
    return 0
