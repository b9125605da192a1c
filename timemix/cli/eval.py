"""The command-line verb eval: loss of a trained model on a text."""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from timemix.cli.options import RunFolder, parse, refuse_template, refuse_text_options
from timemix.data.config import Template
from timemix.errors import InvalidValue
from timemix.storage.json_files import to_json

if TYPE_CHECKING:
    from timemix.evaluation.texts import Evaluation
    from timemix.runs.load import Loaded


@dataclass(frozen=True)
class EvalArguments:
    """Measure the loss of a trained model on a text: nats per token, bits per character, bits per byte.

    With --tasks, run tasks of lm-evaluation-harness instead, such as questions with several answers.

    Examples:
        timemix eval runs/mine
        timemix eval runs/mine --data other.txt --json
        timemix eval runs/mine --tasks my_task.yaml
    """

    run: RunFolder
    data: str | None = None
    """Text: file, folder, glob, `-` (standard input), `builtin`, a download, or `hf:NAME`, a dataset of Hugging Face.
    Default: held-out text of the run."""
    encoding: Annotated[str, tyro.conf.arg(aliases=["--data.encoding"])] = "utf-8"
    """Encoding of the text files, by its Python name."""
    keep_nul: Annotated[bool, tyro.conf.arg(aliases=["--data.keep-nul"])] = False
    """Accept NUL characters as text. Without this option, a file with a NUL character is binary: timemix skips the file
    in a folder and rejects it as a single source."""
    text_key: Annotated[str | None, tyro.conf.arg(aliases=["--data.text-key"])] = None
    """Key of the text in .jsonl and .ndjson files, or column of .parquet, .csv and .tsv files. Default: text; .csv and
    .tsv files are then plain text."""
    template: Annotated[Template | None, tyro.conf.arg(aliases=["--data.template"])] = None
    """Chat template for records with `messages`, or with `prompt` and `completion`; only answers count in the loss.
    Default: the records have texts."""
    stride: int | None = None
    """Distance between the starts of windows in tokens, from 1 to ctx_len; a smaller stride gives more context.
    Default: ctx_len."""
    carry_state: bool = False
    """State carried from window to window, so that every token has the whole text before it as its context; only for
    architectures with unbounded context, and without --stride."""
    by_document: bool = False
    """Number of documents and mean of their losses, each document with equal weight; a token then depends only on its
    own document. Only for vocabularies with an end-of-text token. A document is a record, or a whole file of plain
    text."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness: names, YAML files, or folders of YAML files. Excludes --data. Default: the loss
    on a text."""
    include_path: Path | None = None
    """Folder of YAML files whose tasks --tasks may name. Default: only the tasks of lm-evaluation-harness."""
    num_fewshot: int | None = None
    """Number of examples in each prompt of --tasks, at least 0. Default: as the task sets it."""
    limit: int | None = None
    """Largest number of questions of each task, at least 1. Default: all questions."""
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
    if parsed.data is None:
        refuse_text_options(arguments)
    if "--tasks" in arguments and not parsed.tasks:
        raise InvalidValue("--tasks has no task; name at least one task")
    _check_tasks(parsed)
    refuse_template(parsed.template, parsed.data, parsed.text_key)
    from timemix.data.sources import read_source
    from timemix.evaluation.conversations import evaluate_conversations
    from timemix.evaluation.texts import evaluate_held_out, evaluate_text
    from timemix.models.quantize import rounded
    from timemix.runs.load import load
    from timemix.runtime.device import choose_device, choose_precision

    device, _ = choose_device(parsed.device)
    precision, _ = choose_precision(parsed.precision, device)
    loaded = load(parsed.run, checkpoint=parsed.checkpoint, device=str(device))
    loaded = replace(loaded, model=rounded(loaded.model, parsed.weights))
    if parsed.tasks:
        return _eval_tasks(parsed, loaded)
    options: dict[str, Any] = {
        "precision": precision,
        "stride": parsed.stride,
        "carry_state": parsed.carry_state,
        "cross_documents": loaded.config.data.cross_documents,
        "by_document": parsed.by_document,
    }
    if parsed.data is None:
        name, result = "the held-out text", evaluate_held_out(loaded.model, loaded.corpus(), **options)
    else:
        source = read_source(
            parsed.data,
            encoding=parsed.encoding,
            keep_nul=parsed.keep_nul,
            text_key=parsed.text_key,
            documents=_has_documents(parsed, loaded),
            template=parsed.template,
            progress=True,
        )
        text, name = source.text, source.name if parsed.data == "-" else parsed.data
        measure = evaluate_text if parsed.template is None else evaluate_conversations
        result = measure(loaded.model, loaded.tokenizer, text, **options)
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
    if result.predicted_tokens < result.tokens - 1:
        print(
            f"the loss counts {result.predicted_tokens:,} tokens, {result.predicted_characters:,} characters,"
            f" {result.predicted_bytes:,} bytes: those of the answers"
        )
    if result.documents is not None:
        count = "1 document" if result.documents == 1 else f"{result.documents:,} documents of equal weight"
        print(f"{result.nats_per_token_by_document:.4f} nats per token, mean over {count}")
    if result.unknown:
        units = "words" if loaded.tokenizer.kind == "word" else "characters"
        print(f"{result.unknown:,} unknown {units} {_treatment_of_unknown(loaded, result)}")
    return 0


def _has_documents(parsed: EvalArguments, loaded: "Loaded") -> bool | None:
    """Return whether --data has documents, as the text of the run has; None: only if it has records."""
    if loaded.tokenizer.end_of_text is None:
        return False
    return True if parsed.by_document else loaded.config.data.end_of_text


def _check_tasks(parsed: EvalArguments) -> None:
    """Refuse options that exclude one another, before the model is loaded."""
    if parsed.tasks:
        for name in ("data", "stride", "carry_state", "by_document"):
            if getattr(parsed, name):
                flag = name.replace("_", "-")
                raise InvalidValue(f"--{flag} is for a text, not for tasks; leave out --{flag} or --tasks")
        if parsed.precision != "float32":
            raise InvalidValue(f"--precision is {parsed.precision}, but tasks are evaluated in float32; leave it out")
    for name, least in (("num_fewshot", 0), ("limit", 1)):
        if (value := getattr(parsed, name)) is not None and value < least:
            raise InvalidValue(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    for name in ("include_path", "num_fewshot", "limit"):
        if getattr(parsed, name) is not None and not parsed.tasks:
            raise InvalidValue(f"--{name.replace('_', '-')} needs tasks; add --tasks TASK")


def _eval_tasks(parsed: EvalArguments, loaded: "Loaded") -> int:
    """Run tasks of lm-evaluation-harness, and print their numbers."""
    from timemix.interop.lm_eval import evaluate_tasks
    from timemix.reporting.markdown import markdown_table

    scores = evaluate_tasks(
        loaded, parsed.tasks, include=parsed.include_path, shots=parsed.num_fewshot, limit=parsed.limit
    )
    if parsed.json:
        report = {"checkpoint": str(loaded.folder), "weights": parsed.weights}
        print(json.dumps(report | {"scores": [to_json(score) for score in scores]}))
        return 0
    rows = [["task", "shots", "metric", "value", "standard error"]]
    for score in scores:
        metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        shots = "" if score.shots is None else str(score.shots)
        error = "" if score.error is None else f"{score.error:.4f}"
        rows.append([score.task, shots, metric, f"{score.value:.4f}", error])
    print(markdown_table(rows, words=(0, 2)))
    return 0


def _treatment_of_unknown(loaded: "Loaded", result: "Evaluation") -> str:
    if loaded.tokenizer.unknown != "error":
        return {"unk": "read as <unk>", "byte": "read as their bytes"}[loaded.tokenizer.unknown]
    skipped = "skipped, because the vocabulary has no <unk>"
    if result.predicted_tokens < result.tokens - 1:
        return skipped
    share = result.predicted_characters / result.characters
    return (
        f"{skipped}; the losses cover the other {result.predicted_characters:,}"
        f" characters ({result.predicted_bytes:,} bytes), {share:.1%} of the text"
    )
