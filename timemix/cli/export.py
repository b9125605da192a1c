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
    - hf: a folder that the package transformers opens with timemix installed, for any architecture
    - hf with --form native: a folder of rwkv4 for transformers, or of rwkv7 for flash-linear-attention and rwkv7-hf,
      without timemix
    - gguf: a file for llama.cpp, with the vocabulary (pip install 'timemix[gguf]')
    - onnx: a folder with the step of one token, model.onnx, and its tokenizer (pip install 'timemix[onnx]')
    - state: a folder with learned.state of a run with --train.tune state, a session for timemix sample --load-state

    Examples:
        timemix export runs/rwkv7 --to pth --out exported
        timemix export runs/mine --to hf --out exported-hf --checkpoint newest
        timemix export runs/rwkv7 --to gguf --out rwkv7.gguf --dtype q8_0
        timemix export runs/style --to state --out style
    """

    run: RunFolder
    to: Literal["pth", "hf", "gguf", "onnx", "state"]
    """Format of the other program."""
    out: Path
    """New folder for the files, or new file."""
    form: Literal["timemix", "native"] = "timemix"
    """Form of --to hf: `timemix` for any architecture, or `native` for rwkv4, and for rwkv7 with heads of 64
    channels."""
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
    if parsed.form == "native" and parsed.to != "hf":
        raise InvalidValue(f"--form has no effect on --to {parsed.to}; leave it out")
    from timemix.interop.export import export_run, has_native_form

    if parsed.to == "gguf":
        from timemix.interop.gguf import export_gguf

        folder = export_gguf(parsed.run, parsed.out, dtype=parsed.dtype, checkpoint=parsed.checkpoint)
    elif parsed.to == "onnx":
        from timemix.interop.onnx import export_onnx

        folder = export_onnx(parsed.run, parsed.out, checkpoint=parsed.checkpoint)
    else:
        folder = export_run(parsed.run, parsed.to, parsed.out, form=parsed.form, checkpoint=parsed.checkpoint)
    files = [parsed.out] if parsed.to == "gguf" else sorted(parsed.out.iterdir())
    if parsed.json:
        print(json.dumps({"checkpoint": str(folder), "files": [str(path) for path in files]}))
    else:
        print(f"exported {folder}:")
        print("\n".join(map(str, files)))
        if parsed.to == "hf" and parsed.form == "timemix":
            print("transformers opens this folder with timemix installed: pip install 'timemix[hf]'")
            if has_native_form(folder):
                print("For programs without timemix, export the model with --form native.")
    return 0
