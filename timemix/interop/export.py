"""Export of a trained model to the formats of other programs. The weights keep the types of the checkpoint."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from torch import Tensor

from timemix.config.run import RunConfig, read_toml
from timemix.errors import DamagedFile, InvalidValue
from timemix.generation.session import Session, save_session
from timemix.interop.chat_template import write_template
from timemix.interop.hugging_face import WEIGHTS
from timemix.interop.model_folder import write_model_folder
from timemix.models.config import ModelConfig
from timemix.models.registry import ARCHITECTURES, find_architecture, load_part
from timemix.runs.folder import find, read_progress
from timemix.runs.load import empty_model, load, load_start
from timemix.storage.files import check_name, explained, new_folder, refuse_existing
from timemix.storage.sharded import StoredTensors, open_stored
from timemix.storage.tensors import read_tensors, write_tensors
from timemix.storage.torch_files import write_torch_file
from timemix.tokenizers.make import load_tokenizer

Target = Literal["pth", "hf", "state"]
Form = Literal["timemix", "native"]
PTH = "model.pth"
STATE = "learned.state"


def export_run(run: Path, to: Target, out: Path, *, form: Form = "timemix", checkpoint: str | int = "best") -> Path:
    """Export a trained model. The numbers and types of all weights stay unchanged.

    The low-rank terms of a run with `train.tune` "lora" are added to the weights, which are then in float32.

    Args:
        run: Run folder, or a checkpoint folder.
        to: "pth": the original names, in a file of `torch.save`. "hf": a folder of Hugging Face. "state": the state of
            a run with `train.tune` "state", as a session of the model with the frozen weights.
        out: New folder.
        form: Form of the folder of Hugging Face. "timemix": of any architecture, for `timemix.hf`. "native": of RWKV-4
            and RWKV-7, for programs without timemix.
        checkpoint: "best" (lowest validation loss), "newest", or a step. `checkpoint` has no effect if `run` is a
            checkpoint folder.

    Returns:
        The checkpoint folder that was exported.

    Raises:
        AlreadyExists: `out` exists.
        InvalidValue: The architecture has no published form, or the form does not support a setting of the model.
        FileError: The checkpoint is missing or damaged.
        CannotWrite: The folder cannot be written.
    """
    check_name(out)
    refuse_existing(out)
    folder = find(run, checkpoint)
    config = read_toml(folder / "config.toml")
    if to == "state":
        if config.train.tune != "state":
            raise InvalidValue(
                f"{folder} has no learned state; train one with: timemix train --from {quote(str(run))} --train.tune"
                " state"
            )
        with new_folder(out) as temporary:
            _write_state(temporary / STATE, folder)
        return folder
    refuse_learned_state(config, folder)
    if to == "hf" and form == "timemix":
        _export_for_timemix(folder, config, out)
    else:
        _export_weights(folder, config, to, out)
    return folder


def refuse_learned_state(config: RunConfig, folder: Path) -> None:
    """Raise InvalidValue if a checkpoint has a learned state, because other programs begin with another state."""
    if config.train.tune == "state":
        raise InvalidValue(f"{folder} has a learned state, which no published form holds; export it with --to state")


def _write_state(path: Path, folder: Path) -> None:
    """Write the learned state of a checkpoint as a session of the model whose weights were frozen."""
    tuned = load(folder)
    start = load_start(tuned.config)
    while start.config.train.tune == "state":
        start = load_start(start.config)
    save_session(Session(tuned.model.init_state(1), tokens=(), unread=0), path, start.model)


def _export_weights(folder: Path, run: RunConfig, to: Target, out: Path) -> None:
    """Write the weights of a checkpoint."""
    config = run.model
    entry = find_architecture(config.arch)
    if entry.version is None:
        able = ", ".join(name for name, each in ARCHITECTURES.items() if each.version is not None)
        raise InvalidValue(
            f"a model of {config.arch} has no published form; export it with --to hf and without --form, or export a"
            f" model of {able}"
        )
    refuse_without(config)
    if to == "hf" and entry.hugging_face is None:
        raise InvalidValue(
            f"a model of {config.arch} has no native form of Hugging Face; leave out --form native, or export it with"
            " --to pth"
        )
    converter = load_part(str(entry.weights))
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    with _stored(folder, run, out) as stored:
        weights = converter.to_published({name: stored.tensor(name) for name in stored.shapes})
        with new_folder(out) as temporary:
            if to == "pth":
                _write_pth(temporary / PTH, weights | _unused(folder), config, converter)
            else:
                form = load_part(str(entry.hugging_face))
                _write_folder(temporary, weights, form.document(config, tokenizer.end_of_text), form)
            shutil.copy(folder / "tokenizer.json", temporary)
            write_template(temporary, tokenizer, run.data.template)


@contextmanager
def _stored(folder: Path, config: RunConfig, out: Path) -> Iterator[StoredTensors]:
    """Open and check the weights of a checkpoint. Low-rank terms are first added, in a file beside `out`."""
    with ExitStack() as stack:
        if config.train.tune == "lora":
            weights = load(folder).model.state_dict()
            with explained(out):
                # `new_folder` removes this folder after a kill.
                folder = out.with_name(f".{out.name}.partial-weights-{os.getpid()}")
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)
                write_tensors(folder / "model.safetensors", weights, {})
        else:
            empty_model(config.model, folder)
        stored = stack.enter_context(open_stored(folder, "model"))
        stored.check_content()
        yield stored


def refuse_without(config: ModelConfig) -> None:
    """Raise InvalidValue if a model leaves out ideas of its architecture, because other programs need all ideas."""
    if without := getattr(config, "without", ()):
        raise InvalidValue(f"a model without {', '.join(without)} has no published form; export a whole model")


def has_native_form(checkpoint: Path) -> bool:
    """Return whether a folder of Hugging Face in the form "native" can be exported from a checkpoint."""
    config = read_toml(checkpoint / "config.toml").model
    entry = find_architecture(config.arch)
    if entry.hugging_face is None:
        return False
    try:
        refuse_without(config)
        load_part(entry.hugging_face).document(config, None)
    except InvalidValue:
        return False
    return True


def _export_for_timemix(folder: Path, config: RunConfig, out: Path) -> None:
    """Write the folder that `timemix.hf` opens."""
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    progress = read_progress(folder) if (folder / "training.json").exists() else None
    if tokenizer.vocab_size != config.model.vocab_size:
        raise DamagedFile(
            f"{folder / 'tokenizer.json'} is not the tokenizer of this model: it has {tokenizer.vocab_size} tokens,"
            f" not {config.model.vocab_size}; restore it from a copy"
        )
    with _stored(folder, config, out) as stored, new_folder(out) as temporary:
        write_model_folder(temporary, stored, config, tokenizer, progress)


def _unused(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an imported file that the model does not use."""
    path = folder / "unused.safetensors"
    return read_tensors(path) if path.exists() else {}


def _write_pth(path: Path, weights: dict[str, Tensor], config: ModelConfig, converter: Any) -> None:
    """Write weights under their original names. The file is a pickle, which other programs read."""
    converter.check_exportable(config)
    write_torch_file(path, {name: x.contiguous() for name, x in weights.items()})


def _write_folder(folder: Path, weights: dict[str, Tensor], document: dict[str, Any], form: Any) -> None:
    """Write weights and settings in the form of Hugging Face."""
    types = {str(x.dtype).removeprefix("torch.") for x in weights.values()}
    document |= {"dtype": types.pop()} if len(types) == 1 else {}
    (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    write_tensors(folder / WEIGHTS, form.to_hugging_face(weights), {"format": "pt"})
