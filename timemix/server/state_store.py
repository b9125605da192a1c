"""States that clients store in the server: in memory, or as files that survive a restart."""

import contextlib
import json
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from timemix.errors import CannotWrite, FileError, MissingFile
from timemix.generation.session import Session, session_from_bytes, session_to_bytes
from timemix.models.language_model import LanguageModel
from timemix.server.engine_thread import Served
from timemix.server.errors import ApiError
from timemix.storage.files import atomic_file, check_regular, explained
from timemix.storage.json_files import Count, to_json, to_record

ID = re.compile(r"state-[0-9a-f]{32}")
"""The ids of states. Nobody can guess the 128 random bits."""

LONGEST_NAME = 200
"""Largest number of characters of a state's name."""

LONGEST_LINE = 4096
"""Largest size in bytes of the first line of a file, which describes the state."""


@dataclass(frozen=True)
class Description:
    """What the server reports about a state.

    Args:
        id: Id of the state.
        model: Name of the model that the state belongs to.
        name: Name that the client chose; None: none.
        tokens: Number of tokens that the state stands for.
        bytes: Size of the state's file in bytes.
        created: Time of creation, in seconds since 1970.
        parent: Id of the state that this state continues or copies; None: none.
    """

    id: str
    model: str
    name: str | None
    tokens: Count
    bytes: Count
    created: Count
    parent: str | None

    def json(self) -> dict[str, Any]:
        """Return the JSON of the API."""
        return {"id": self.id, "object": "state"} | to_json(self)


def largest_file(model: LanguageModel) -> int:
    """Return the largest size in bytes that the file of one state of a model can have.

    The file holds the tensors with a header, the newest tokens, and a number and a count for each token that occurred.

    Args:
        model: The model.
    """
    state = model.init_state(1)
    tensors = 1 + sum(map(len, state.layers))
    tokens = 2 * model.config.vocab_size + (model.max_position or 0)
    return state.nbytes + 200 * tensors + 12 * tokens + 2**16


class StateStore:
    """Store states by owner and id. An owner sees only its own states.

    Any thread may call the methods. Methods that read or write contents may wait for a disk.

    Args:
        most_bytes: Largest size of all states in bytes, at least 0.
        folder: Folder of the states' files, which several servers may share; None: memory.

    Attributes:
        nbytes: Size of all known states in bytes.

    Raises:
        CannotWrite: The folder cannot be created.
    """

    def __init__(self, most_bytes: int, folder: Path | None = None) -> None:
        self._most, self._folder, self.nbytes, self._reserved = most_bytes, folder, 0, 0
        self._known: dict[str, dict[str, Description]] = {}
        self._contents: dict[tuple[str, str], bytes] = {}
        # Requests that continue the same state at the same time share one session.
        self._sessions: WeakValueDictionary[tuple[str, str], Session] = WeakValueDictionary()
        # The stamps of the files show which files another server has changed.
        self._stamps: dict[tuple[str, str], _Stamp] = {}
        self._reported: set[Path] = set()
        # `_writing` is held by one change of the store at a time, `_lock` by each use of the fields above.
        self._writing, self._lock = threading.Lock(), threading.Lock()
        if folder is not None:
            with explained(folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                owners = [each.name for each in folder.iterdir() if each.is_dir()]
            for each in owners:
                self._look("" if each == _NO_KEY else each)

    def __len__(self) -> int:
        """Return the number of known states."""
        with self._lock:
            return sum(map(len, self._known.values()))

    def descriptions(self, owner: str) -> list[Description]:
        """Return the descriptions of an owner's states, in the order of their creation."""
        self._look(owner)
        with self._lock:
            return sorted(self._known.get(owner, {}).values(), key=lambda each: each.created)

    def describe(self, owner: str, id: str) -> Description:
        """Return the description of a state.

        Raises:
            ApiError: The owner has no state with this id.
        """
        if self._folder is not None and ID.fullmatch(id):
            # Another server that shares the folder may have stored, replaced or deleted the state.
            stamp = _stamp(self._place(owner) / id)
            if stamp != self._stamps.get((owner, id)):
                self._look(owner)
        with self._lock:
            found = self._known.get(owner, {}).get(id)
        if found is None:
            raise _unknown(id)
        return found

    def content(self, owner: str, id: str) -> bytes:
        """Return the content of a state's file, as `save_session` writes it.

        Raises:
            ApiError: The owner has no state with this id.
        """
        self.describe(owner, id)
        try:
            if self._folder is None:
                return self._contents[owner, id]
            return (self._place(owner) / id).read_bytes().partition(b"\n")[2]
        except (KeyError, OSError):
            raise _unknown(id) from None

    def session(self, owner: str, id: str, served: Served) -> Session:
        """Return the session of a state.

        Args:
            owner: Owner of the state.
            id: Id of the state.
            served: The model.

        Raises:
            ApiError: The owner has no state with this id, or the state does not fit the model.
        """
        description = self.describe(owner, id)
        if description.model != served.name:
            raise ApiError(
                400, f"the state {id} belongs to the model {description.model}; send that name as model", "state"
            )
        with self._lock:
            session = self._sessions.get((owner, id))
        if session is None:
            try:
                session = session_from_bytes(self.content(owner, id), served.engine.model)
            except FileError as error:
                raise ApiError(400, f"the state {id} cannot be used: {error}", "state") from None
            with self._lock:
                if self._known.get(owner, {}).get(id) is description:
                    self._sessions[owner, id] = session
        return session

    @contextlib.contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        """Reserve room within the `with` block, so that the uploads of all clients together stay within the limit.

        Args:
            size: Size in bytes.

        Raises:
            ApiError: The room is not left.
        """
        with self._lock:
            if size > self._most:
                raise _too_small(size)
            if self.nbytes + self._reserved + size > self._most:
                raise _full()
            self._reserved += size
        try:
            yield
        finally:
            with self._lock:
                self._reserved -= size

    def check_room(self, size: int) -> None:
        """Raise ApiError unless states of `size` bytes in total can be stored now."""
        with self.reserved(size):
            pass

    def add(
        self,
        owner: str,
        served: Served,
        session: Session,
        *,
        name: str | None = None,
        parent: str | None = None,
        id: str | None = None,
    ) -> Description:
        """Store a session.

        Args:
            owner: Owner of the new state.
            served: Model of the session.
            session: The session.
            name: Name of the state.
            parent: Id of the state that the session continues.
            id: Id of the new state, which replaces a state with this id; None: a new id.

        Raises:
            ApiError: The store is full.
        """
        content = session_to_bytes(session, served.engine.model)
        tokens = int(session.state.position) + session.unread
        id = id or f"state-{secrets.token_hex(16)}"
        description = Description(id, served.name, name, tokens, len(content), int(time.time()), parent)
        self._put(owner, description, content)
        return description

    def fork(self, owner: str, id: str, name: str | None) -> Description:
        """Copy a state.

        Args:
            owner: Owner of both states.
            id: Id of the state.
            name: Name of the copy.

        Raises:
            ApiError: The owner has no state with this id, or the store is full.
        """
        old, content = self.describe(owner, id), self.content(owner, id)
        new = f"state-{secrets.token_hex(16)}"
        description = Description(new, old.model, name, old.tokens, len(content), int(time.time()), id)
        self._put(owner, description, content)
        return description

    def remove(self, owner: str, id: str) -> None:
        """Delete a state. Requests that continue the state already are not affected.

        Raises:
            ApiError: The owner has no state with this id.
        """
        self.describe(owner, id)
        with self._writing:
            if self._folder is not None:
                (self._place(owner) / id).unlink(missing_ok=True)
            with self._lock:
                self._forget(owner, id)

    def _put(self, owner: str, description: Description, content: bytes) -> None:
        """Store a content, in place of the old content of the same id."""
        id = description.id
        with self._writing:
            with self._lock:
                old = self._known.get(owner, {}).get(id)
                if self.nbytes + len(content) - (old.bytes if old else 0) > self._most:
                    raise _full()
            if self._folder is not None:
                self._write(self._place(owner) / id, description, content)
            with self._lock:
                self._forget(owner, id)
                self._known.setdefault(owner, {})[id] = description
                self.nbytes += len(content)
                if self._folder is None:
                    self._contents[owner, id] = content
                elif stamp := _stamp(self._place(owner) / id):
                    self._stamps[owner, id] = stamp

    def _forget(self, owner: str, id: str) -> None:
        """Remove a state from memory, if it is known."""
        old = self._known.get(owner, {}).pop(id, None)
        self.nbytes -= old.bytes if old else 0
        self._contents.pop((owner, id), None)
        self._stamps.pop((owner, id), None)
        self._sessions.pop((owner, id), None)

    def _place(self, owner: str) -> Path:
        """Return the folder of an owner's states."""
        assert self._folder is not None
        return self._folder / (owner or _NO_KEY)

    def _write(self, path: Path, description: Description, content: bytes) -> None:
        """Write a state's file, which only the user of the server can read."""
        try:
            with explained(path):
                path.parent.mkdir(mode=0o700, exist_ok=True)
            with atomic_file(path) as temporary:
                temporary.touch(0o600)
                with temporary.open("wb") as file:
                    file.write(json.dumps(to_json(description)).encode() + b"\n")
                    file.write(content)
        except CannotWrite as error:
            print(f"timemix: {error}", file=sys.stderr, flush=True)
            reason = "the server cannot write the state, for example because its disk is full"
            raise ApiError(429, f"{reason}; delete states, or try again later", None, "state_storage_full") from None

    def _look(self, owner: str) -> None:
        """Compare the known states of an owner with the files in the folder, which other servers may have changed."""
        if self._folder is None:
            return
        with self._writing:
            stamps = {path: stamp for path in _files(self._place(owner)) if (stamp := _stamp(path)) is not None}
            with self._lock:
                known = {self._place(owner) / id: self._stamps.get((owner, id)) for id in self._known.get(owner, {})}
            changed = [path for path, stamp in stamps.items() if stamp != known.get(path)]
            # The oldest comes first, so that the states of one second keep their order.
            changed.sort(key=lambda path: stamps[path].written)
            new = [(path, found) for path in changed if (found := self._read_description(path)) is not None]
            with self._lock:
                for path in [*(known.keys() - stamps.keys()), *changed]:
                    self._forget(owner, path.name)
                for path, each in new:
                    self._known.setdefault(owner, {})[each.id] = each
                    self._stamps[owner, each.id] = stamps[path]
                    self.nbytes += each.bytes

    def _read_description(self, path: Path) -> Description | None:
        """Return the description in a file; None if the file is damaged, which is reported once."""
        try:
            check_regular(path)
            with path.open("rb") as file:
                line = file.readline(LONGEST_LINE)
            found = to_record(json.loads(line), Description)
            if found.id == path.name and path.stat().st_size == len(line) + found.bytes:
                return found
        except (FileNotFoundError, MissingFile):
            # Another server has deleted the state.
            return None
        except (FileError, OSError, ValueError, RecursionError):
            pass
        if path not in self._reported:
            self._reported.add(path)
            print(f"timemix: {path} is damaged, so this state is left out", file=sys.stderr, flush=True)
        return None


_NO_KEY = "no-key"
"""Name of the folder for states of a server without API keys."""


class _Stamp(NamedTuple):
    """What differs between two files of one name: time of the last write in ns, number and size of the file."""

    written: int
    number: int
    size: int


def _stamp(path: Path) -> _Stamp | None:
    """Return the stamp of a file; None if it cannot be read."""
    try:
        found = path.stat()
    except OSError:
        return None
    return _Stamp(found.st_mtime_ns, found.st_ino, found.st_size)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder whose names are ids."""
    try:
        yield from (path for path in folder.iterdir() if ID.fullmatch(path.name))
    except OSError:
        return


def _unknown(id: str) -> ApiError:
    shown = id if len(id) <= 60 else f"{id[:57]}..."
    return ApiError(404, f"there is no state {shown!r}; GET /v1/states lists your states", "state", "state_not_found")


def _too_small(size: int) -> ApiError:
    return ApiError(
        429,
        f"a state of this model may need {size:,} bytes; start the server with a larger --state-bytes",
        None,
        "state_storage_full",
    )


def _full() -> ApiError:
    return ApiError(
        429,
        "the storage for states is full; delete states, or start the server with a larger --state-bytes",
        None,
        "state_storage_full",
    )
