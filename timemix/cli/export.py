"""The command-line verb export: export a trained model for other programs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from timemix.cli.options import RunFolder, parse


@dataclass(frozen=True)
class ExportArguments:
    """Export a trained model for other programs. Numbers and number format of the weights stay unchanged.

    - pth: model.pth with the names of the original code, a pickle that torch.load reads
    - hf: config.json and model.safetensors in the form of flash-linear-attention and rwkv7-hf

    Examples:
        timemix export runs/rwkv7 --to pth --out exported
        timemix export runs/rwkv7 --to hf --out exported-hf --checkpoint newest
    """

    run: RunFolder
    to: Literal["pth", "hf"]
    """Format of the other program."""
    out: Path
    """New folder for the files."""
    checkpoint: str = "best"
    """Checkpoint: best, newest, or the number of its step."""
    json: bool = False
    """Output as one JSON object on stdout."""


def export(arguments: list[str]) -> int:
    parsed = parse(ExportArguments, arguments, "export")
    from timemix.interop.export import export_run

    folder = export_run(parsed.run, parsed.to, parsed.out, checkpoint=parsed.checkpoint)
    files = sorted(str(path) for path in parsed.out.iterdir())
    if parsed.json:
        print(json.dumps({"checkpoint": str(folder), "files": files}))
    else:
        print(f"exported {folder}:")
        print("\n".join(files))
    return 0
