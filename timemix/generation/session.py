"""A session stores a text in progress, and can be copied, branched, saved and continued elsewhere."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from timemix.config.version_1 import representation
from timemix.errors import DamagedFile, InvalidValue
from timemix.models.hashes import model_hash
from timemix.models.language_model import LanguageModel
from timemix.models.state import State
from timemix.storage.files import atomic_file
from timemix.storage.json_files import Count, to_json, to_record
from timemix.storage.tensors import MOST_BRACES, check_content, open_tensors, tensors_from_bytes, tensors_to_bytes


@dataclass(frozen=True, eq=False)
class Session:
    """Store a text in progress: the state, and all other data that is needed to continue the text.

    Args:
        state: State of one row.
        tokens: Newest token ids of the text; empty before the first token. These tokens include the tokens that are not
            in the state yet, the tokens of an unfinished character, and the tokens that the model may process again at
            the end of the context.
        unread: Number of tokens at the end of `tokens` that are not in the state yet.
        written: Number of tokens generated so far.
        seen: Token ids that occurred in the text.
        held: Text that is not emitted yet, because it may begin a stop string, or follows a stop string within one
            token.
        counts: Number of times that the tokens generated so far contain each of their ids.
    """

    state: State
    tokens: tuple[int, ...]
    unread: int
    written: int = 0
    seen: frozenset[int] = field(default_factory=frozenset)
    held: str = ""
    counts: Mapping[int, int] = field(default_factory=dict)

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


def save_session(session: Session, path: str | Path, model: LanguageModel) -> None:
    """Save a session as one safetensors file; the write is atomic.

    Args:
        session: The session.
        path: File to write; missing folders are created.
        model: The session's model; the file holds the hash of the model's config and weights.

    Raises:
        InvalidValue: The session has states of other shapes than the model.
        CannotWrite: The file cannot be written.
    """
    with atomic_file(Path(path)) as temporary:
        temporary.write_bytes(session_to_bytes(session, model))


def session_to_bytes(session: Session, model: LanguageModel) -> bytes:
    """Return the content of the file that `save_session` writes.

    Args:
        session: The session.
        model: The session's model.

    Returns:
        The content, a safetensors file.

    Raises:
        InvalidValue: The session has states of other shapes than the model.
    """
    if session.state.shapes != model.init_state(1).shapes:
        raise InvalidValue("session is a session of another model; pass the model of this session")
    tensors = {f"layers.{i}.{name}": x for i, layer in enumerate(session.state.layers) for name, x in layer.items()}
    about = _About(
        model=model_hash(model),
        architecture=model.config.arch,
        tokens=session.tokens,
        unread=session.unread,
        written=session.written,
        seen=tuple(sorted(session.seen)),
        held=session.held,
        counted=tuple(session.counts),
        counts=tuple(session.counts.values()),
    )
    metadata = {"timemix_session": json.dumps(to_json(about))}
    return tensors_to_bytes(
        {name: x.cpu() for name, x in (tensors | {"position": session.state.position}).items()}, metadata
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
        check_content(file, path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _session(str(path), tensors, file.metadata() or {}, model)


def session_from_bytes(content: bytes, model: LanguageModel) -> Session:
    """Return the session whose file has a given content, which may come from anyone.

    Args:
        content: Content of a file that `save_session` wrote, or the result of `session_to_bytes`.
        model: The model that the session belongs to.

    Returns:
        The session, on the model's device.

    Raises:
        DamagedFile: The content is damaged, is no session file, or belongs to another model.
    """
    name = "the session"
    try:
        tensors, metadata = tensors_from_bytes(content, 1 + sum(map(len, model.init_state(1).layers)))
    except ValueError as error:
        raise DamagedFile(f"{name} is damaged: {error}; save the session again") from None
    return _session(name, tensors, metadata, model)


def _session(name: str, tensors: dict[str, Tensor], metadata: dict[str, str], model: LanguageModel) -> Session:
    """Return the session of a file, after all checks. `name` names the file in messages."""
    # Files of versions before 0.3 have the key `timemix_stream`.
    about = _about(name, metadata.get("timemix_session", metadata.get("timemix_stream")))
    if about.model != model_hash(model) and not _is_of_version_1(about.model, model):
        raise DamagedFile(
            f"{name} holds a session of another model ({about.architecture}); use it with the run that saved it"
        )
    try:
        _check(about, model)
        state = _state(tensors, model)
    except KeyError as error:
        raise DamagedFile(f"{name} is damaged: {error.args[0]} is missing; save the session again") from None
    except ValueError as error:
        raise DamagedFile(f"{name} is damaged: {error}; save the session again") from None
    counts = dict(zip(about.counted, about.counts, strict=True))
    return Session(state, about.tokens, about.unread, about.written, frozenset(about.seen), about.held, counts)


def _check(about: "_About", model: LanguageModel) -> None:
    """Check the fields of a session file against a model. Raise ValueError if they do not fit."""
    ids = (*about.tokens, *about.seen, *about.counted)
    # A state that state tuning has learned, before the first token, has no tokens.
    fewest = min(1, len(about.tokens))
    if not (fewest <= about.unread <= len(about.tokens) and max(ids, default=0) < model.config.vocab_size):
        raise ValueError("its tokens do not fit the model")
    if any("\ud800" <= character <= "\udfff" for character in about.held):
        raise ValueError("the text that it holds back is not Unicode")
    if len(about.counted) != len(about.counts):
        raise ValueError(f"it has {len(about.counts)} counts for {len(about.counted)} tokens")


def _state(tensors: dict[str, Tensor], model: LanguageModel) -> State:
    """Return the state that a file holds. Raise KeyError for a missing tensor, and ValueError for a wrong tensor."""
    state, left = model.init_state(1), dict(tensors)
    own = {"position": state.position}
    own |= {f"layers.{i}.{name}": x for i, layer in enumerate(state.layers) for name, x in layer.items()}
    for name, x in own.items():
        saved = left.pop(name)
        if saved.shape != x.shape or saved.is_floating_point() != x.is_floating_point() or saved.is_complex():
            raise ValueError(f"{name} is {saved.dtype} {list(saved.shape)}, not {x.dtype} {list(x.shape)}")
        if not x.copy_(saved).isfinite().all():
            raise ValueError(f"{name} holds a number that is not finite")
    if left:
        raise ValueError(f"{min(left)} is not part of a session")
    if not 0 <= int(state.position) <= (model.max_position or 2**62):
        raise ValueError(f"its position {int(state.position)} does not fit the model")
    return state


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
    # Files of versions before 0.3 have no counts.
    counted: tuple[Count, ...] = ()
    counts: tuple[Count, ...] = ()


def _about(name: str, text: str | None) -> _About:
    """Parse the metadata of a session file."""
    if text is None:
        raise DamagedFile(f"{name} is no session file of timemix; give a file that timemix saved")
    try:
        # The record is flat. Many small lists would need much more memory than their text.
        if text.count("[") + text.count("{") > MOST_BRACES:
            raise ValueError
        return to_record(json.loads(text), _About)
    except (ValueError, RecursionError):
        raise DamagedFile(f"{name} is damaged: its metadata cannot be read; save the session again") from None
