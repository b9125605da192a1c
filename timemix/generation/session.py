"""A session stores a text in progress, and can be copied, branched, saved and continued elsewhere."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from timemix.config.version_1 import representation
from timemix.errors import DamagedFile
from timemix.models.language_model import LanguageModel
from timemix.models.state import State
from timemix.storage.files import atomic_file
from timemix.storage.json_files import Count, to_json, to_record
from timemix.storage.settings import to_dict
from timemix.storage.tensors import check_content, open_tensors, write_tensors


@dataclass(frozen=True)
class Session:
    """Store a text in progress: the state, and all other data that is needed to continue the text.

    Args:
        state: State of one row.
        tokens: Newest token ids of the text. These tokens include the tokens that are not in the state yet, the tokens
            of an unfinished character, and the tokens that the model may process again at the end of the context.
        unread: Number of tokens at the end of `tokens` that are not in the state yet.
        written: Number of tokens generated so far.
        seen: Token ids that occurred in the text.
        held: Text that is not emitted yet, because it may begin a stop string, or follows a stop string within one
            token.
    """

    state: State
    tokens: tuple[int, ...]
    unread: int
    written: int = 0
    seen: frozenset[int] = field(default_factory=frozenset)
    held: str = ""

    def clone(self) -> "Session":
        """Return a copy with its own state, so that the original and the copy can continue in different ways.

        Returns:
            The copy.
        """
        return replace(self, state=self.state.clone())

    @property
    def nbytes(self) -> int:
        """Size of the state in bytes."""
        return self.state.nbytes


def model_hash(model: LanguageModel, config: str | None = None) -> str:
    """Return the SHA-256 of a model's config and weights.

    Args:
        model: The model.
        config: Text that represents the config; None: the config as JSON.

    Returns:
        The hash in hexadecimal.
    """
    sha256 = hashlib.sha256((config or json.dumps(to_dict(model.config), sort_keys=True)).encode())
    for name, weight in sorted(model.state_dict().items()):
        sha256.update(name.encode())
        # Weights in bfloat16 give the hash of the same numbers in float32. The parts bound the memory of the copies.
        for part in weight.detach().split(4096) if weight.ndim else (weight.detach(),):
            wide = part.to("cpu", torch.promote_types(part.dtype, torch.float32)).contiguous()
            sha256.update(wide.view(torch.uint8).numpy())
    return sha256.hexdigest()


def save_session(session: Session, path: str | Path, model: LanguageModel) -> None:
    """Save a session as one safetensors file; the write is atomic.

    Args:
        session: The session.
        path: File to write.
        model: The session's model; the file holds the hash of the model's config and weights.

    Raises:
        CannotWrite: The file cannot be written.
    """
    tensors = {f"layers.{i}.{name}": x for i, layer in enumerate(session.state.layers) for name, x in layer.items()}
    about = _About(
        model=model_hash(model),
        architecture=model.config.arch,
        tokens=session.tokens,
        unread=session.unread,
        written=session.written,
        seen=tuple(sorted(session.seen)),
        held=session.held,
    )
    with atomic_file(Path(path)) as temporary:
        write_tensors(
            temporary, tensors | {"position": session.state.position}, {"timemix_session": json.dumps(to_json(about))}
        )


def load_session(path: str | Path, model: LanguageModel) -> Session:
    """Load a session that `save_session` wrote.

    Args:
        path: The file.
        model: The model that the session belongs to.

    Returns:
        The session, on the model's device.

    Raises:
        FileError: The file is missing or damaged, is no session file, or belongs to another model.
    """
    path = Path(path)
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
        # Files of versions before 0.3 have the key `timemix_stream`.
        about = _about(path, metadata.get("timemix_session", metadata.get("timemix_stream")))
        if about.model != model_hash(model) and not _is_of_version_1(about.model, model):
            raise DamagedFile(
                f"{path} holds a session of another model ({about.architecture}); use it with the run that saved it"
            )
        check_content(file, path)
        state = model.init_state(1)
        try:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state.position.copy_(found.pop("position"))
            for i, layer in enumerate(state.layers):
                for name, x in layer.items():
                    saved = found.pop(f"layers.{i}.{name}")
                    if saved.shape != x.shape:
                        raise ValueError(f"{name} has shape {list(saved.shape)}, not {list(x.shape)}")
                    x.copy_(saved)
            if found:
                raise ValueError(f"{sorted(found)[0]} is not part of a session")
            vocab_size, unread = model.config.vocab_size, about.unread
            if not 1 <= unread <= len(about.tokens) or not all(
                0 <= t < vocab_size for t in (*about.tokens, *about.seen)
            ):
                raise ValueError("its tokens do not fit the model")
            if not 0 <= int(state.position) <= (model.max_position or 2**62):
                raise ValueError(f"its position {int(state.position)} does not fit the model")
        except KeyError as error:
            raise DamagedFile(f"{path} is damaged: {error.args[0]} is missing; save the session again") from None
        except (ValueError, RuntimeError) as error:
            raise DamagedFile(f"{path} is damaged: {error}; save the session again") from None
    return Session(state, about.tokens, unread, about.written, frozenset(about.seen), about.held)


def _is_of_version_1(saved: str, model: LanguageModel) -> bool:
    """Return whether a hash is the hash of a model in format version 1."""
    config = representation(model.config)
    return config is not None and saved == model_hash(model, config)


@dataclass(frozen=True)
class _About:
    """The fields of a session file other than tensors."""

    model: str
    architecture: str
    tokens: tuple[Count, ...]
    unread: Count
    written: Count
    seen: tuple[Count, ...]
    held: str


def _about(path: Path, text: str | None) -> _About:
    """Parse the metadata of a session file."""
    if text is None:
        raise DamagedFile(f"{path} is no session file of timemix; give a file that timemix saved")
    try:
        return to_record(json.loads(text), _About)
    except (ValueError, RecursionError):
        raise DamagedFile(f"{path} is damaged: its metadata cannot be read; save the session again") from None
