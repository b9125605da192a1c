"""The verb eval: loss of a trained model on a text."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from timemix.cli.options import parse
from timemix.storage.json_files import to_json

if TYPE_CHECKING:
    from timemix.runs.load import Loaded


@dataclass(frozen=True)
class EvalArguments:
    """Loss of a trained model on a text: nats per token, bits per character, bits per byte."""

    run: tyro.conf.Positional[Path]
    """Run folder, or one of its checkpoints."""
    data: str | None = None
    """A file, folder, glob, `builtin`, or a named download; None: the text that the run held out."""
    encoding: Annotated[str, tyro.conf.arg(aliases=["--data.encoding"])] = "utf-8"
    """Encoding of the text files."""
    stride: int | None = None
    """Move the window by this many tokens, so that each has context; None: windows side by side."""
    checkpoint: str = "best"
    """best, newest, or a step."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of the matrix products."""
    weights: Literal["float32", "bfloat16", "int8"] = "float32"
    """Round the weights to this, as `timemix sample --weights` does."""
    device: str = "auto"
    """cpu, cuda ...; auto: cuda where there is one."""
    json: bool = False
    """Print one JSON object."""


def eval(arguments: list[str]) -> int:
    parsed = parse(EvalArguments, arguments, "eval")
    from timemix.data.sources import read_source
    from timemix.evaluation.loss import evaluate, evaluate_held_out
    from timemix.models.quantize import rounded
    from timemix.runs.load import load
    from timemix.runtime.device import choose_device, choose_precision

    device, _ = choose_device(parsed.device)
    precision, _ = choose_precision(parsed.precision, device)
    loaded = load(parsed.run, checkpoint=parsed.checkpoint, device=str(device))
    loaded = replace(loaded, model=rounded(loaded.model, parsed.weights))
    options: dict[str, Any] = {"precision": precision, "stride": parsed.stride}
    if parsed.data is None:
        name, result = "the held-out text", evaluate_held_out(loaded.model, loaded.corpus(), **options)
    else:
        text = read_source(parsed.data, encoding=parsed.encoding, progress=True).text
        name, result = parsed.data, evaluate(loaded.model, loaded.tokenizer, text, **options)
    if parsed.json:
        print(
            json.dumps({"checkpoint": str(loaded.folder), "data": name, "weights": parsed.weights, **to_json(result)})
        )
        return 0
    print(
        f"{result.nats_per_token:.4f} nats per token, {result.bits_per_character:.4f} bits per character,"
        f" {result.bits_per_byte:.4f} bits per byte\n"
        f"{result.tokens:,} tokens, {result.characters:,} characters, {result.bytes:,} bytes"
        f" of {name}, {loaded.folder}"
    )
    if result.unknown:
        what = "words" if loaded.tokenizer.kind == "word" else "characters"
        print(f"{result.unknown:,} unknown {what} {_unknown_fate(loaded)}")
    return 0


def _unknown_fate(loaded: "Loaded") -> str:
    fates = {"unk": "read as <unk>", "byte": "read as their bytes"}
    return fates.get(loaded.tokenizer.unknown, "left out: the vocabulary has no <unk>")
