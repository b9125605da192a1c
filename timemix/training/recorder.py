"""The record of a run: metrics.jsonl and its hooks, written by process 0."""

from collections.abc import Callable, Sequence
from pathlib import Path

from timemix.config.run import TrainConfig
from timemix.errors import CannotWrite, HookFailed
from timemix.runs.metrics import Line, Metrics
from timemix.runtime.distributed import World
from timemix.training.failures import Failures
from timemix.training.hooks import Hook, Hooks
from timemix.training.progress import Sample


class Recorder:
    """Write the lines of a run to metrics.jsonl, and pass lines and samples to the hooks.

    Args:
        path: The file metrics.jsonl.
        config: Settings of the training, which say what a full disk and a failed hook mean.
        world: The processes of the run. Process 0 writes.
        warn: Function that is called with each warning.

    Attributes:
        metrics: The file metrics.jsonl.
    """

    def __init__(self, path: Path, config: TrainConfig, world: World, warn: Callable[[str], None]) -> None:
        self.metrics = Metrics(path)
        self._config, self._world, self._warn = config, world, warn
        self._lines = Failures(f"{path}", warn)
        self._hooks = Hooks([], warn)

    def begin(self, hooks: Sequence[Hook]) -> None:
        """Call these hooks from now on."""
        # With `train.hook_errors` "stop", the error that ends the run names the hook, so no warning is needed.
        self._hooks = Hooks(hooks, self._warn if self._config.hook_errors == "warn" else lambda sentence: None)

    @property
    def fatal(self) -> str | None:
        """Message about a failed hook that must end the run (`train.hook_errors` "stop"), None without such a hook."""
        return self._hooks.failure if self._config.hook_errors == "stop" else None

    def refuse_failed(self, state: str) -> None:
        """Raise an error if a failed hook must end the run. All processes must call this method.

        Args:
            state: Clause about the run for the message, such as "the run in runs/mine is complete".

        Raises:
            HookFailed: A hook failed, and `train.hook_errors` is "stop".
        """

        def check() -> None:
            if self.fatal is not None:
                raise HookFailed(f"{self.fatal}; {state}")

        self._world.first_does(check)

    def record(self, line: Line) -> None:
        """Write a line of metrics.jsonl, and call the hooks with this line. All processes must call this method.

        Raises:
            CannotWrite: The disk is full or not writable, and `train.full_disk` is "stop".
        """
        # The other processes wait without a time limit, because a hook may take long.
        self._world.first_does(lambda: self._write(line))

    def _write(self, line: Line) -> None:
        try:
            self.metrics.write(line)
        except CannotWrite as error:
            if self._config.full_disk == "stop":
                raise
            self._lines.failed(str(error), f"{error}; training continues and writes the missing lines later")
        else:
            self._lines.worked()
        self._hooks(line)

    def samples(self, samples: Sequence[Sample]) -> None:
        """Pass the generated texts of a step to the hooks that take samples. Only process 0 calls this method."""
        self._hooks.samples(samples)

    def end_hooks(self, *, complete: bool) -> None:
        """Close the hooks.

        Args:
            complete: Whether the training reached its end.
        """
        self._hooks.close(complete=complete)

    def close(self) -> None:
        """Report lines that could not be written."""
        self._lines.close()
