"""A folder with which the package transformers opens a model of any architecture, through `timemix.hf`.

config.json, generation_config.json     settings
model.safetensors                       weights, with the names of timemix after "model."
tokenizer.json, tokenizer_config.json   tokenizer
chat_template.jinja                     chat template of a model that knows conversations
modeling_timemix.py                     import of timemix.hf, for trust_remote_code=True
README.md                               model card
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timemix._version import __version__
from timemix.config.run import RunConfig, to_toml
from timemix.interop.chat_template import write_template
from timemix.interop.hugging_face import WEIGHTS
from timemix.models.registry import find_architecture
from timemix.runs.folder import Progress
from timemix.storage.settings import to_dict
from timemix.storage.sharded import StoredTensors
from timemix.storage.tensors import copy_tensors
from timemix.tokenizers.base import Tokenizer

MODEL_TYPE = "timemix"
"""Value of `model_type` in config.json."""
STUB = "modeling_timemix.py"
AUTO_MAP = {
    "AutoConfig": f"{STUB.removesuffix('.py')}.TimemixConfig",
    "AutoModelForCausalLM": f"{STUB.removesuffix('.py')}.TimemixForCausalLM",
}
"""Classes of the file STUB, by the class of transformers that loads them."""
PREFIX = "model."
"""Prefix of the names of all weights."""
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"

_MISSING = "this model needs the package timemix; clone its repository, and run: pip install '/path/to/timemix[hf]'"
_STUB = f'''"""The classes of this model, which the package timemix contains."""

try:
    from timemix.hf import TimemixConfig, TimemixForCausalLM
except ImportError as error:
    raise ImportError("{_MISSING}") from error

__all__ = ["TimemixConfig", "TimemixForCausalLM"]
'''


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens for the ends of texts and for padding, which other programs require.

    Args:
        end: Text of the token at the end of a text.
        end_id: Its id, which is V or larger if the model has no such token.
        pad_id: Id of the token for padding, V or larger.
        outside_id: Token of the model that stands for ids from V on: the token before the first token of a text.
        has_end: Whether the model generates the token at the end of a text.
    """

    end: str
    end_id: int
    pad_id: int
    outside_id: int
    has_end: bool


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """Return the special tokens of a tokenizer. Tokens that it lacks get ids after its vocabulary.

    Args:
        tokenizer: The tokenizer.
    """
    V, end = tokenizer.vocab_size, tokenizer.end_of_text
    if end is None:
        return SpecialTokens(END_OF_TEXT, V, V + 1, first_token(tokenizer), has_end=False)
    document = json.loads(tokenizer.to_json())
    names = {id: text for text, id in document["model"]["vocab"].items()}
    names |= {each["id"]: each["content"] for each in document["added_tokens"]}
    return SpecialTokens(names[end], end, V, end, has_end=True)


def first_token(tokenizer: Tokenizer) -> int:
    """Return the token that stands before the first token of a text.

    Args:
        tokenizer: The tokenizer.

    Returns:
        Id of the end of a text, else of the newline, else 0.
    """
    if tokenizer.end_of_text is not None:
        return tokenizer.end_of_text
    ids, unknown = tokenizer.encode_lenient("\n")
    return int(ids[0]) if len(ids) == 1 and not unknown else 0


def write_stub(folder: Path) -> None:
    """Write the file that loads the classes of timemix, for `trust_remote_code=True`."""
    (folder / STUB).write_text(_STUB, encoding="utf-8")


def write_model_folder(
    folder: Path, stored: StoredTensors, config: RunConfig, tokenizer: Tokenizer, progress: Progress | None
) -> None:
    """Write the files of the folder.

    Args:
        folder: The folder, which exists.
        stored: Weights of the checkpoint. Their numbers and types stay unchanged.
        config: Config of the run.
        tokenizer: Tokenizer of the run.
        progress: State of the run at the checkpoint, or None if unavailable.
    """
    special = special_tokens(tokenizer)
    documents = {
        "config.json": _config(config, special),
        "generation_config.json": _generation_config(special),
        "tokenizer_config.json": _tokenizer_config(config, tokenizer, special),
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer.save(folder / "tokenizer.json")
    write_template(folder, tokenizer, config.data.template)
    write_stub(folder)
    (folder / "README.md").write_text(_card(config, tokenizer, progress, stored), encoding="utf-8")
    copy_tensors(folder / WEIGHTS, {PREFIX + name: name for name in stored.shapes}, stored, {"format": "pt"})


def _is_bounded(config: RunConfig) -> bool:
    return find_architecture(config.model.arch).bounded


def _config(config: RunConfig, special: SpecialTokens) -> dict[str, Any]:
    """Return config.json. The dtype is that in which timemix loads the weights, which may be stored in fewer bits."""
    model = config.model
    return {
        "architectures": ["TimemixForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": AUTO_MAP,
        "dtype": "float64" if config.train.precision == "float64" else "float32",
        "vocab_size": model.vocab_size,
        "hidden_size": model.channels,
        "num_hidden_layers": model.layers,
        **({"max_position_embeddings": model.ctx_len} if _is_bounded(config) else {}),
        "outside_token_id": special.outside_id,
        "use_cache": True,
        "tie_word_embeddings": False,
        "timemix": to_dict(model),
    }


def _generation_config(special: SpecialTokens) -> dict[str, Any]:
    """Return generation_config.json. Without eos_token_id, `generate` ends only at the largest length."""
    end = {"eos_token_id": special.end_id} if special.has_end else {}
    return {**end, "pad_token_id": special.pad_id, "use_cache": True}


def _tokenizer_config(config: RunConfig, tokenizer: Tokenizer, special: SpecialTokens) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {special.end_id: special.end, special.pad_id: PAD}
    return {
        "tokenizer_class": "TokenizersBackend",
        "eos_token": special.end,
        "pad_token": PAD,
        "added_tokens_decoder": {str(id): {"content": text, **flags} for id, text in added.items()},
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **({"model_max_length": config.model.ctx_len} if _is_bounded(config) else {}),
    }


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- timemix
- {arch}
---

# {title}

A language model of the architecture `{arch}` with {parameters:,} parameters ({size}), trained with
timemix {version}. {context}

## Use

Install timemix from a clone of its repository:

    pip install '/path/to/timemix[hf]'

```python
import timemix.hf
from transformers import pipeline

print(pipeline("text-generation", model="FOLDER")("The ", max_new_tokens={tokens})[0]["generated_text"])
```

`FOLDER` is the folder of this file. Without `import timemix.hf`, pass `trust_remote_code=True`.

## Loss

{loss}

## Tokenizer

{tokenizer}

## Settings of the run

The content of `run.toml` {use}:

```toml
{settings}```
"""


def _card(config: RunConfig, tokenizer: Tokenizer, progress: Progress | None, stored: StoredTensors) -> str:
    """Return the model card. Files of the run have only their names in the card, because their paths may be private."""
    model, unit = config.model, "words" if tokenizer.kind == "word" else "characters"
    parameters = sum(math.prod(shape) for shape in stored.shapes.values())
    notes = [f"Kind: `{tokenizer.kind}`, with {tokenizer.vocab_size:,} tokens."]
    if tokenizer.kind == "word":
        notes.append(
            "The tokenizer is lossy: it changes letters to lower case, and decoding puts one space between words."
        )
    if tokenizer.unknown == "error":
        notes.append(f"The vocabulary has only the {unit} of the training text. Other {unit} have no token.")
    if tokenizer.unknown == "unk":
        notes.append(f"Unknown {unit} become `<unk>`.")
    if tokenizer.end_of_text is None:
        notes.append(
            f"The model does not generate the special tokens `{END_OF_TEXT}` and `{PAD}`. As inputs, they count as the"
            f" token {first_token(tokenizer)}."
        )
    source, valid, vocabulary = (
        None if path is None else Path(path).name
        for path in (config.data.source, config.data.valid, config.data.vocabulary)
    )
    data = replace(config.data, source=source or "", valid=valid, vocabulary=vocabulary)
    # Another machine does not have the model from which the run started.
    public = replace(config, start=None, start_state=None, data=data, train=replace(config.train, tune="all"))
    # An imported or converted model has no steps of its own.
    command = "for `timemix train --config run.toml --data TEXT --out RUN`"
    use = command if config.train.steps else "without settings of its training"
    if progress is None or progress.valid_loss is None:
        loss = "The loss of this model on a held-out text was not measured."
    else:
        loss = (
            f"After {progress.step:,} steps ({progress.tokens:,} tokens), the loss on the held-out text of the run is"
            f" {progress.valid_loss:.4f} nats per token, measured at step {progress.valid_step:,}. In timemix,"
            " `timemix eval RUN` measures the loss of the run."
        )
    context = (
        f"The context has at most {model.ctx_len:,} tokens."
        if _is_bounded(config)
        else "The context has no largest length."
    )
    return _CARD.format(
        arch=model.arch,
        title=f"{model.arch}, {parameters:,} parameters",
        parameters=parameters,
        size=model.size_words(),
        version=__version__,
        context=context,
        tokens=min(100, model.ctx_len // 2) if _is_bounded(config) else 100,
        loss=loss,
        tokenizer=" ".join(notes),
        use=use,
        settings=to_toml(public),
    )
