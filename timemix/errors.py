"""The errors of timemix: one root, `TimemixError`, and a class for each cause that a caller may want to tell apart.

TimemixError
    InvalidValue        an argument or a setting (also a ValueError)
        Unfit           a text that this tokenizer or model cannot take
    FileError           a file or folder
        MissingFile     there is none
        DamagedFile     of another content, kind or version than its name says
        AlreadyExists   the place is taken
        InUse           another process holds it
        CannotWrite     a full disk, or no permission
    Unavailable         this machine lacks it: a device, memory, a package, the network
        ProcessLost     another process of a distributed run
    TooManyRequests     the queue of an engine is full
    NotFinite           training diverged, or a model gives no finite logits
    HookFailed          a hook raised, and the run is set to stop then

Interrupted stands beside it: a signal ended a run after its step was saved, so that `except TimemixError` does not
swallow Ctrl-C.
"""

import difflib
import typing
from pathlib import Path

LONGEST = 1000
"""Characters of a message at most."""


class TimemixError(Exception):
    """The root of all errors that timemix raises for a cause outside its own code.

    The message is one sentence: what is wrong, then the way out. Quoted file content is escaped and truncated, so the
    message stays one short line. The command line prints it without a traceback and exits with status 2.

    Args:
        sentence: The message.
    """

    def __init__(self, sentence: str) -> None:
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence)
        if len(shown) > LONGEST:
            shown = f"{shown[: LONGEST // 2 - 5]} ... {shown[-LONGEST // 2 :]}"
        super().__init__(shown)


class InvalidValue(TimemixError, ValueError):
    """An argument or a setting has a value that is not supported. Settings have dotted names: `train.batch_size`."""


class Unfit(InvalidValue):
    """A text does not fit: the same call fails in the same way again."""


class FileError(TimemixError):
    """A file or a folder cannot be used."""


class MissingFile(FileError):
    """A file, a folder, or a checkpoint in it does not exist."""


class DamagedFile(FileError):
    """A file holds something else than its name says: damaged, or of another kind, version, model or run."""


class AlreadyExists(FileError):
    """A folder to create exists already."""


class InUse(FileError):
    """Another process works in the folder."""


class CannotWrite(FileError):
    """A file cannot be written: the disk is full, or the place is not writable."""


class Unavailable(TimemixError):
    """This machine lacks what was asked for: a device, memory, a package, the network."""


class ProcessLost(Unavailable):
    """Another process of a distributed run has ended or does not answer."""


class TooManyRequests(TimemixError):
    """As many requests are pending as the engine takes: the same call can succeed later."""


class NotFinite(TimemixError):
    """A loss, a gradient or a logit is not finite: the same call fails in the same way again."""


class HookFailed(TimemixError):
    """A hook raised while `train.hook_errors` is "stop"; the run was saved first."""


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or SIGHUP ended a run after its step was saved; no TimemixError, since nothing failed.

    Args:
        number: Number of the signal.
        saved: The newest checkpoint, None in processes that write none.
    """

    def __init__(self, number: int, saved: Path | None) -> None:
        super().__init__(f"stopped; saved {saved}")
        self.number = number


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """Return the end of an error sentence: the nearest right name, or all of them.

    Args:
        word: The unknown name.
        known: The right names.
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
