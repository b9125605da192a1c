"""The command-line verb export: export a trained model for other programs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from timemix.cli.options import RunFolder, parse
from timemix.errors import InvalidValue


@dataclass(frozen=True)
class ExportArguments:
    """Export a trained model for other programs. In pth and hf, the weights keep their numbers and number format.

    - pth: a folder with model.pth, a pickle with the names of the original code
    - hf: a folder with config.json and model.safetensors, for flash-linear-attention and rwkv7-hf
    - gguf: a file for llama.cpp, with the vocabulary (pip install 'timemix[gguf]')
    - onnx: a file with the step of one token, and a tokenizer file beside it (pip install 'timemix[onnx]')

    Examples:
        timemix export runs/rwkv7 --to pth --out exported
        timemix export runs/rwkv7 --to gguf --out rwkv7.gguf --dtype q8_0
    """

    run: RunFolder
    to: Literal["pth", "hf", "gguf", "onnx"]
    """Format of the other program."""
    out: Path
    """New folder for the files, or new file."""
    checkpoint: str = "best"
    """Checkpoint: best, newest, or the number of its step."""
    dtype: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """Number format of the matrices in GGUF. q8_0: int8 with one scale for 32 weights. Default: the number format of
    the checkpoint."""
    json: bool = False
    """Output as one JSON object on stdout."""


def export(arguments: list[str]) -> int:
    parsed = parse(ExportArguments, arguments, "export")
    if parsed.dtype is not None and parsed.to != "gguf":
        raise InvalidValue(f"--dtype has no effect on --to {parsed.to}; leave it out")
    files = [parsed.out]
    if parsed.to == "gguf":
        from timemix.interop.gguf import export_gguf

        folder = export_gguf(parsed.run, parsed.out, dtype=parsed.dtype, checkpoint=parsed.checkpoint)
    elif parsed.to == "onnx":
        from timemix.interop.onnx import export_onnx, tokenizer_file

        folder = export_onnx(parsed.run, parsed.out, checkpoint=parsed.checkpoint)
        files.append(tokenizer_file(parsed.out))
    else:
        from timemix.interop.export import export_run

        folder = export_run(parsed.run, parsed.to, parsed.out, checkpoint=parsed.checkpoint)
        files = sorted(parsed.out.iterdir())
    if parsed.json:
        print(json.dumps({"checkpoint": str(folder), "files": [str(path) for path in files]}))
    else:
        print(f"exported {folder}:")
        print("\n".join(map(str, files)))
    return 0
