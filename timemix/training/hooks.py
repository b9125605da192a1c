"""Hooks: functions that receive each line of metrics.jsonl, such as a writer for TensorBoard."""

import importlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from timemix.errors import InvalidValue, Unavailable
from timemix.runs.metrics import Line
from timemix.training.failures import Failures, first_line
from timemix.training.progress import Sample

Hook = Callable[[Line], object]
"""A function that is called with each new line of metrics.jsonl, as a dictionary.

One line of code connects a tracking service: `trainer.run(hooks=[lambda line: wandb.log(line, step=line["step"])])`.
"""


class Tracker(ABC):
    """A hook that also receives the samples and the end of a run, such as the connection to a tracking service."""

    label: str
    """Name of the tracker in messages, such as "TensorBoard"."""

    @abstractmethod
    def __call__(self, line: Line) -> None:
        """Record a line of metrics.jsonl."""

    @abstractmethod
    def samples(self, samples: Sequence[Sample]) -> None:
        """Record the generated texts of a step, at least one."""

    @abstractmethod
    def close(self, *, complete: bool) -> None:
        """Finish the record after the last call.

        Args:
            complete: Whether the training reached its end.
        """


class Hooks:
    """The hooks of a run. An exception in a hook becomes a warning and never reaches the training loop.

    Args:
        hooks: The functions, called in this order.
        warn: Function that is called with each warning.

    Attributes:
        failure: Message about the newest failure, None before the first failure.
    """

    def __init__(self, hooks: Sequence[Hook], warn: Callable[[str], None]) -> None:
        self._hooks = [(hook, Failures(_name(hook), warn)) for hook in hooks]
        # A tracker may record lines and refuse samples, so the failures are counted apart.
        self._trackers = [
            (hook, Failures(f"{_name(hook)} for samples", warn)) for hook in hooks if isinstance(hook, Tracker)
        ]
        self._warn = warn
        self.failure: str | None = None

    def __call__(self, line: Line) -> None:
        """Pass a line of metrics.jsonl to each hook."""
        for hook, failures in self._hooks:
            cause = self._failure_of(hook, partial(hook, line), f"at step {line['step']}")
            if cause is None:
                failures.worked()
            else:
                failures.failed(cause, f"{self.failure}; training continues and calls the hook at each line")

    def samples(self, samples: Sequence[Sample]) -> None:
        """Pass the generated texts of a step to each tracker."""
        for tracker, failures in self._trackers:
            when = f"at the samples of step {samples[0].step}"
            cause = self._failure_of(tracker, partial(tracker.samples, samples), when)
            if cause is None:
                failures.worked()
            else:
                failures.failed(cause, f"{self.failure}; training continues")

    def close(self, *, complete: bool) -> None:
        """Close the trackers, and report the hooks whose last call failed.

        Args:
            complete: Whether the training reached its end.
        """
        for tracker, _ in self._trackers:
            if self._failure_of(tracker, partial(tracker.close, complete=complete), "at the end of the run"):
                self._warn(str(self.failure))
        for _, failures in [*self._hooks, *self._trackers]:
            failures.close()

    def _failure_of(self, hook: Hook, call: Callable[[], object], when: str) -> str | None:
        """Call a function of a hook. Record an exception in `self.failure`, and return its cause."""
        try:
            call()
        except (Exception, SystemExit) as error:
            kind, message = type(error).__name__, first_line(error)
            cause = kind if message == kind else f"{kind}: {message}"
            self.failure = f"{_name(hook)} fails {when}: {cause}"
            return cause
        return None


def _name(hook: Hook) -> str:
    if isinstance(hook, Tracker):
        return f"tracker {hook.label}"
    return f"hook {getattr(hook, '__module__', '')}:{getattr(hook, '__qualname__', type(hook).__qualname__)}"


def load_hook(name: str) -> Hook:
    """Import and return the function that "module:function" names.

    Args:
        name: Module and function, such as "my_module:log". The module may lie in the working folder.

    Raises:
        InvalidValue: The module or the function does not exist, or the function is not callable.
    """
    # sys.path of an installed command contains the folder of the command, but not the working folder.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, TypeError, ValueError, AttributeError) as error:
        raise InvalidValue(f"hook {name!r} cannot be imported: {error}; name a function as module:function") from error
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InvalidValue(f"hook {name!r} cannot be imported: {reason}; correct the module") from error
    if not callable(found):
        raise InvalidValue(f"hook {name!r} is not a function; name a function as module:function")
    hook: Hook = found
    return hook


class TensorBoard(Tracker):
    """Tracker that writes the numbers of each line of metrics.jsonl, and the samples, for TensorBoard.

    Args:
        folder: Folder of the TensorBoard log.
        step: Step from which the run resumes. Later entries of an existing log are dropped.

    Raises:
        Unavailable: TensorBoard is not installed.
    """

    label = "tensorboard"

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise Unavailable("TensorBoard is not installed; run: pip install 'timemix[tensorboard]'") from error
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def __call__(self, line: Line) -> None:
        for name, value in line.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def samples(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            # TensorBoard shows texts as Markdown, in which indented lines keep their spaces and line ends.
            text = "".join(f"    {line}\n" for line in sample.text.splitlines())
            tag = "samples" if sample.prompt is None else f"samples/{sample.prompt}"
            self._writer.add_text(tag, text, sample.step)
        self._writer.flush()

    def close(self, *, complete: bool) -> None:
        self._writer.close()
