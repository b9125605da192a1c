"""Reports of repeated failures that do not end a run. Each failure is reported once, not at every repetition."""

from collections.abc import Callable


class Failures:
    """Reporter of a failure that may repeat.

    The reporter warns when the failure begins, when its cause changes and when the failure ends.

    Args:
        what: Name of the failing part, as the subject of a sentence, such as "hook my_module:log".
        warn: Function that is called with each warning.
    """

    def __init__(self, what: str, warn: Callable[[str], None]) -> None:
        self._what, self._warn = what, warn
        self._cause: str | None = None
        self._count = 0

    def failed(self, cause: str, sentence: str) -> None:
        """Count a failure, and report it unless the previous failure had the same cause.

        Args:
            cause: Cause of the failure, which is compared with the cause of the previous failure.
            sentence: Text of the warning.
        """
        self._count += 1
        if cause != self._cause:
            self._warn(sentence)
        self._cause = cause

    def worked(self) -> None:
        """Report the number of failures before a success, if there were any failures."""
        if self._count:
            self._warn(f"{self._what} works again after {_times(self._count)}")
        self._cause, self._count = None, 0

    def close(self) -> None:
        """At the end of a run, report the number of failures if the last call failed."""
        if self._count > 1:
            self._warn(f"{self._what} failed until the end of the run: {_times(self._count)}")
        self._cause, self._count = None, 0


def _times(count: int) -> str:
    return f"{count} failure{'s' if count > 1 else ''}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has no readable message."""
    try:
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    except Exception:
        return type(error).__name__
