"""Failures that a run survives, reported once instead of at each repetition."""

from collections.abc import Callable


class Failures:
    """Reports one kind of failure that may repeat: when it begins, when its cause changes, and when it is over.

    Args:
        what: Whatever fails, as the subject of a sentence: "hook my_module:log".
        warn: Called with each sentence.
    """

    def __init__(self, what: str, warn: Callable[[str], None]) -> None:
        self._what, self._warn = what, warn
        self._cause: str | None = None
        self._count = 0

    def failed(self, cause: str, sentence: str) -> None:
        """Count a failure, and report it unless the one before had the same cause."""
        self._count += 1
        if cause != self._cause:
            self._warn(sentence)
        self._cause = cause

    def worked(self) -> None:
        """Report how many failures came before this success, if there were any."""
        if self._count:
            self._warn(f"{self._what} works again after {_times(self._count)}")
        self._cause, self._count = None, 0

    def close(self) -> None:
        """Report how often it failed until the end of the run."""
        if self._count > 1:
            self._warn(f"{self._what} did not work again: {_times(self._count)}")
        self._cause, self._count = None, 0


def _times(count: int) -> str:
    return f"{count} failure{'s' if count > 1 else ''}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, its class where it has none or fails to give it."""
    try:
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    except Exception:
        return type(error).__name__
