"""A text that is being written, as a value: what the model keeps of it and what it has yet to read. It can be copied,
branched, saved, and gone on with elsewhere.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from timemix.config.version_1 import representation
from timemix.errors import UserError
from timemix.models.language_model import LanguageModel
from timemix.models.state import State
from timemix.storage.files import atomic_file
from timemix.storage.json_files import Count, to_json, to_record
from timemix.storage.settings import to_dict
from timemix.storage.tensors import open_tensors, write_tensors


@dataclass(frozen=True)
class Stream:
    """One text in the midst of being written.

    state: of one row. tokens: the newest of the text, as many as a context that is read again can take (all that are
    unread at least); the last `unread` of them are not in the state yet. written: tokens drawn so far. seen: the tokens
    that occurred. held: the end of its text, not told yet because it may begin a stop string.
    """

    state: State
    tokens: tuple[int, ...]
    unread: int
    written: int = 0
    seen: frozenset[int] = field(default_factory=frozenset)
    held: str = ""

    def clone(self) -> "Stream":
        """A copy with a state of its own, to go on with in another way."""
        return replace(self, state=self.state.clone())

    @property
    def nbytes(self) -> int:
        """Size of its state in bytes."""
        return self.state.nbytes


def model_hash(model: LanguageModel, config: str | None = None) -> str:
    """SHA-256 of a model's sizes and weights, in hexadecimal; `config`: what stands for its sizes, JSON by default."""
    sha256 = hashlib.sha256((config or json.dumps(to_dict(model.config), sort_keys=True)).encode())
    for name, weight in sorted(model.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha256.hexdigest()


def save_stream(stream: Stream, path: str | Path, model: LanguageModel) -> None:
    """Writes a stream of a model as one safetensors file, whole or not at all.

    Raises CannotWrite where it cannot be written.
    """
    tensors = {f"layers.{i}.{name}": x for i, layer in enumerate(stream.state.layers) for name, x in layer.items()}
    about = _About(
        model=model_hash(model),
        architecture=model.config.arch,
        tokens=stream.tokens,
        unread=stream.unread,
        written=stream.written,
        seen=tuple(sorted(stream.seen)),
        held=stream.held,
    )
    with atomic_file(Path(path)) as temporary:
        write_tensors(
            temporary, tensors | {"position": stream.state.position}, {"timemix_stream": json.dumps(to_json(about))}
        )


def load_stream(path: str | Path, model: LanguageModel) -> Stream:
    """The stream that `save_stream` wrote of the same model.

    Raises UserError for a file that is missing, damaged, something else, or of another model.
    """
    path = Path(path)
    with open_tensors(path) as file:
        about = _about(path, (file.metadata() or {}).get("timemix_stream"))
        if about.model != model_hash(model) and not _is_of_version_1(about.model, model):
            raise UserError(f"{path} is a state of another model ({about.architecture}); give the run that wrote it")
        state = model.init_state(1)
        try:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state.position.copy_(found.pop("position"))
            for i, layer in enumerate(state.layers):
                for name, x in layer.items():
                    saved = found.pop(f"layers.{i}.{name}")
                    if saved.shape != x.shape:
                        raise ValueError(f"{name} is {list(saved.shape)}")
                    x.copy_(saved)
            if found:
                raise ValueError(f"it also holds {sorted(found)[0]}")
            vocab_size, unread = model.config.vocab_size, about.unread
            if not 1 <= unread <= len(about.tokens) or not all(
                0 <= t < vocab_size for t in (*about.tokens, *about.seen)
            ):
                raise ValueError("its tokens are not of the model")
            if not 0 <= int(state.position) <= (model.max_position or 2**62):
                raise ValueError(f"its position is {int(state.position)}")
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} is damaged: {error}") from None
    return Stream(state, about.tokens, unread, about.written, frozenset(about.seen), about.held)


def _is_of_version_1(saved: str, model: LanguageModel) -> bool:
    """Whether a hash is that which version 1 made of a model."""
    config = representation(model.config)
    return config is not None and saved == model_hash(model, config)


@dataclass(frozen=True)
class _About:
    """What a file says of its state, beside the tensors."""

    model: str
    architecture: str
    tokens: tuple[Count, ...]
    unread: Count
    written: Count
    seen: tuple[Count, ...]
    held: str


def _about(path: Path, text: str | None) -> _About:
    if text is None:
        raise UserError(f"{path} holds no state that timemix wrote")
    try:
        return to_record(json.loads(text), _About)
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: what it says of its state cannot be read") from None
