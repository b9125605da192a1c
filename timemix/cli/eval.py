"""The command-line verb eval: loss of a trained model on a text."""

import json
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from timemix.cli.options import RunFolder, parse
from timemix.errors import InvalidValue
from timemix.storage.json_files import to_json

if TYPE_CHECKING:
    from timemix.evaluation.loss import Evaluation
    from timemix.runs.load import Loaded


@dataclass(frozen=True)
class EvalArguments:
    """Measure the loss of a trained model on a text: nats per token, bits per character, bits per byte.

    Examples:
        timemix eval runs/mine
        timemix eval runs/mine --data other.txt --json
    """

    run: RunFolder
    data: str | None = None
    """Text: file, folder, glob, `-` (standard input), `builtin`, or a download. Default: held-out text of the run."""
    encoding: Annotated[str, tyro.conf.arg(aliases=["--data.encoding"])] = "utf-8"
    """Encoding of the text files, by its Python name."""
    keep_nul: Annotated[bool, tyro.conf.arg(aliases=["--data.keep-nul"])] = False
    """Accept NUL characters as text. Without this option, a file with a NUL character is binary: timemix skips the file
    in a folder and rejects it as a single source."""
    text_key: Annotated[str | None, tyro.conf.arg(aliases=["--data.text-key"])] = None
    """Key of the text in .jsonl and .ndjson files, or column of .parquet, .csv and .tsv files. Default: text; .csv and
    .tsv files are then plain text."""
    stride: int | None = None
    """Distance between the starts of windows in tokens, at least 1; a smaller stride gives more context. Default:
    ctx_len."""
    carry_state: bool = False
    """State carried from window to window, so that every token has the whole text before it as its context; only for
    architectures with unbounded context, and without --stride."""
    checkpoint: str = "best"
    """Checkpoint: best, newest, or the number of its step."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Precision of the matrix products; `auto` is bfloat16 if the processor supports it, otherwise float32."""
    weights: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    """Number format of the weights, as in timemix sample --weights."""
    device: str = "auto"
    """PyTorch device: cpu, cuda ...; `auto` is cuda if available, otherwise cpu."""
    json: bool = False
    """Output as one JSON object on stdout."""


def eval(arguments: list[str]) -> int:
    parsed = parse(EvalArguments, arguments, "eval")
    if parsed.run.is_file():
        text = shlex.quote(str(parsed.run))
        raise InvalidValue(
            f"RUN is {text}, a file; to measure the loss of a run on a text: timemix eval RUN --data {text}"
        )
    from timemix.data.sources import read_source
    from timemix.evaluation.loss import evaluate_held_out, evaluate_text
    from timemix.models.quantize import rounded
    from timemix.runs.load import load
    from timemix.runtime.device import choose_device, choose_precision

    device, _ = choose_device(parsed.device)
    precision, _ = choose_precision(parsed.precision, device)
    loaded = load(parsed.run, checkpoint=parsed.checkpoint, device=str(device))
    loaded = replace(loaded, model=rounded(loaded.model, parsed.weights))
    options: dict[str, Any] = {
        "precision": precision,
        "stride": parsed.stride,
        "carry_state": parsed.carry_state,
    }
    if parsed.data is None:
        name, result = "the held-out text", evaluate_held_out(loaded.model, loaded.corpus(), **options)
    else:
        source = read_source(
            parsed.data, encoding=parsed.encoding, keep_nul=parsed.keep_nul, text_key=parsed.text_key, progress=True
        )
        text, name = source.text, source.name if parsed.data == "-" else parsed.data
        result = evaluate_text(loaded.model, loaded.tokenizer, text, **options)
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
        units = "words" if loaded.tokenizer.kind == "word" else "characters"
        print(f"{result.unknown:,} unknown {units} {_treatment_of_unknown(loaded, result)}")
    return 0


def _treatment_of_unknown(loaded: "Loaded", result: "Evaluation") -> str:
    if loaded.tokenizer.unknown != "error":
        return {"unk": "read as <unk>", "byte": "read as their bytes"}[loaded.tokenizer.unknown]
    share = result.predicted_characters / result.characters
    return (
        f"skipped, because the vocabulary has no <unk>; the losses cover the other {result.predicted_characters:,}"
        f" characters ({result.predicted_bytes:,} bytes), {share:.1%} of the text"
    )
