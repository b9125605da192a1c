"""Export of a trained model to GGUF, the file format of llama.cpp."""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from timemix.data.templates import template_of
from timemix.errors import InvalidValue, Unavailable
from timemix.interop.chat_template import to_jinja
from timemix.interop.export import refuse_learned_state, refuse_without
from timemix.interop.gguf_vocabulary import Vocabulary, vocabulary
from timemix.models.registry import ARCHITECTURES, find_architecture, load_part
from timemix.runs.load import load
from timemix.storage.files import check_name, new_file, refuse_existing

Number = Literal["f32", "f16", "bf16", "q8_0"]
"""Number formats of the matrices: float32, float16, bfloat16, and int8 with one scale for 32 weights."""

_OF_TORCH: dict[torch.dtype, Number] = {torch.float16: "f16", torch.bfloat16: "bf16"}
# llama.cpp stores these small tensors in float32, whatever the format of the file.
_IN_FLOAT32 = ("first", "w1", "w2", "decay_w1", "decay_w2", "lerp_fused")
_GROUP = 32
# Values of general.file_type, from the specification of GGUF.
_FILE_TYPES: dict[Number, int] = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}


def export_gguf(run: Path, out: Path, *, dtype: Number | None = None, checkpoint: str | int = "best") -> Path:
    """Export a trained model to a file of llama.cpp, with its vocabulary and the chat template of a chat model.

    Vectors and small matrices stay in float32, as in the files of llama.cpp's own converter.

    Args:
        run: Run folder, or a checkpoint folder.
        out: New file.
        dtype: Number format of the matrices. Default: the number format of the checkpoint.
        checkpoint: "best" (lowest validation loss), "newest", or a step. `checkpoint` has no effect if `run` is a
            checkpoint folder.

    Returns:
        The checkpoint folder that was exported.

    Raises:
        AlreadyExists: `out` exists.
        InvalidValue: llama.cpp has no such architecture, setting or vocabulary, or a weight is too large for `dtype`.
        FileError: The checkpoint is missing or damaged.
        CannotWrite: The file cannot be written.
        Unavailable: The package gguf is not installed.
    """
    if dtype is not None and dtype not in get_args(Number):
        raise InvalidValue(f"dtype={dtype!r} is not supported; choose {', '.join(get_args(Number))}")
    check_name(out)
    refuse_existing(out, "file")
    library = _library()
    loaded = load(run, checkpoint=checkpoint, mapped=True)
    refuse_learned_state(loaded.config, loaded.folder)
    config = loaded.config.model
    entry = find_architecture(config.arch)
    if entry.gguf is None:
        able = " or ".join(name for name, each in ARCHITECTURES.items() if each.gguf is not None)
        raise InvalidValue(f"llama.cpp has no architecture {config.arch}; export a model of {able}")
    refuse_without(config)
    form = load_part(entry.gguf)
    settings, words = form.settings(config), vocabulary(loaded.tokenizer)
    weights: dict[str, Tensor] = form.to_gguf(load_part(str(entry.weights)).to_published(loaded.model.state_dict()))
    number = dtype or _usual(weights)
    with new_file(out) as temporary:
        writer = library.GGUFWriter(temporary, config.arch)
        try:
            writer.add_name(run.resolve().name)
            _add_settings(writer, library, settings, number)
            _add_vocabulary(writer, library, words)
            if template := to_jinja(template_of(loaded.tokenizer, loaded.config.data.template)):
                writer.add_chat_template(template)
            for name, x in weights.items():
                _add_tensor(writer, library, name, x, number)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return loaded.folder


def _library() -> Any:
    """Import the package gguf.

    Raises:
        Unavailable: The package is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise Unavailable("the package gguf is not installed; run: pip install 'timemix[gguf]'") from error
    return gguf


def _usual(weights: dict[str, Tensor]) -> Number:
    """Return the number format of the weights of a checkpoint, or f32 if GGUF lacks it."""
    types = {x.dtype for x in weights.values()}
    return _OF_TORCH.get(types.pop(), "f32") if len(types) == 1 else "f32"


def _add_settings(writer: Any, library: Any, settings: dict[str, int | float], number: Number) -> None:
    for key, value in settings.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{writer.arch}.{key}", value)
    writer.add_file_type(_FILE_TYPES[number])
    writer.add_quantization_version(library.GGML_QUANT_VERSION)


def _add_vocabulary(writer: Any, library: Any, words: Vocabulary) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_token_list(words.tokens)
    writer.add_token_types([library.TokenType[kind] for kind in words.kinds])
    if words.merges:
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(words.merges)
    if words.end is not None:
        writer.add_bos_token_id(words.end)
        writer.add_eos_token_id(words.end)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def _add_tensor(writer: Any, library: Any, name: str, x: Tensor, number: Number) -> None:
    """Add a weight to a file, in a number format that depends on its shape and name.

    Raises:
        InvalidValue: A number is too large for float16.
    """
    kind = library.GGMLQuantizationType[_format(name, x, number).upper()]
    array = x.to(torch.float32).contiguous().numpy()
    if kind == library.GGMLQuantizationType.F16 and (largest := float(x.abs().max())) > torch.finfo(torch.float16).max:
        raise InvalidValue(f"{name} has the weight {largest:g}, which float16 cannot hold; choose dtype bf16 or f32")
    writer.add_tensor(name, library.quants.quantize(array, kind), raw_dtype=kind)


def _format(name: str, x: Tensor, number: Number) -> Number:
    """Return the number format of a weight in a file."""
    kind = name.rpartition("time_mix_")[2].removesuffix(".weight")
    if x.ndim == 1 or kind in _IN_FLOAT32:
        return "f32"
    # q8_0 divides each row into groups.
    return "f16" if number == "q8_0" and x.shape[-1] % _GROUP else number
