"""The errors of timemix: a base class, `TimemixError`, and a subclass for each cause that callers may want to handle.

    TimemixError
        InvalidValue        an argument or a setting is not supported (also a ValueError)
            Unfit           a text does not fit the tokenizer or the model
        FileError           a file or folder cannot be used
            MissingFile     the file or folder does not exist
            DamagedFile     the file is damaged, or of another kind, version, model or run
            AlreadyExists   the folder to create already exists
            InUse           another process is using the folder
            CannotWrite     the disk is full, or permission is missing
        Unavailable         this machine lacks a device, memory, a package or the network
            ProcessLost     another process of a distributed run has ended or does not answer
        TooManyRequests     the queue of an engine is full
        NotFinite           training diverged, or the logits of a model are not finite
        HookFailed          a hook raised an exception, and `train.hook_errors` is "stop"

`Interrupted` reports that a signal ended a run after the current step was saved. `Interrupted` is not a `TimemixError`,
so that `except TimemixError` does not catch Ctrl-C.
"""

import difflib
import typing
from pathlib import Path

LONGEST = 1000
"""Largest number of characters of an error message. The middle of a longer message is left out."""


class TimemixError(Exception):
    """The base class of all errors whose cause lies outside the code of timemix.

    The message is one sentence, which states the problem and then a solution. Control characters in the message are
    escaped, and a long message is shortened, so the message stays one line. The command line prints the message
    without a traceback and exits with status 2.

    Args:
        sentence: The message.
    """

    def __init__(self, sentence: str) -> None:
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence)
        if len(shown) > LONGEST:
            shown = f"{shown[: LONGEST // 2 - 5]} ... {shown[-LONGEST // 2 :]}"
        super().__init__(shown)


class InvalidValue(TimemixError, ValueError):
    """An argument or a setting has a value that is not supported.

    The message names an argument by its name, and a setting by its dotted name, such as `train.batch_size`.
    """


class Unfit(InvalidValue):
    """A text does not fit the tokenizer or the model. A call with the same arguments would fail again."""


class FileError(TimemixError):
    """A file or a folder cannot be used."""


class MissingFile(FileError):
    """A file, a folder or a checkpoint does not exist."""


class DamagedFile(FileError):
    """A file is damaged, or is of another kind, version, model or run than the call needs."""


class AlreadyExists(FileError):
    """The folder that a call should create already exists."""


class InUse(FileError):
    """Another process is using the folder."""


class CannotWrite(FileError):
    """A file cannot be written: the disk is full, or permission is missing."""


class Unavailable(TimemixError):
    """This machine lacks a device, memory, a package or the network that the call needs."""


class ProcessLost(Unavailable):
    """Another process of a distributed run has ended or does not answer."""


class TooManyRequests(TimemixError):
    """The request queue of an engine is full. A later call can succeed."""


class NotFinite(TimemixError):
    """A loss, a gradient or a logit is not finite. A call with the same arguments would fail again."""


class HookFailed(TimemixError):
    """A hook raised an exception, and `train.hook_errors` is "stop". The run saved a checkpoint before it stopped."""


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or SIGHUP ended a run after the current step was saved.

    `Interrupted` is not a `TimemixError`, since nothing failed.

    Args:
        number: Number of the signal.
        saved: Path of the newest checkpoint; None in a process that writes no checkpoints.
    """

    def __init__(self, number: int, saved: Path | None) -> None:
        super().__init__(f"stopped; saved {saved}")
        self.number = number


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """Return the end of an error message, which suggests the nearest valid name or lists all valid names.

    Args:
        word: The unknown name.
        known: The valid names.

    Returns:
        Text that begins with a semicolon.
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
