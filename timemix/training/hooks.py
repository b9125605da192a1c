"""Hooks: functions that receive each line of metrics.jsonl, such as a writer for TensorBoard."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from timemix.errors import InvalidValue, Unavailable
from timemix.runs.metrics import Line
from timemix.training.failures import Failures, first_line

Hook = Callable[[Line], object]
"""A function that is called with each new line of metrics.jsonl, as a dictionary.

One line of code connects a tracking service: `trainer.run(hooks=[lambda line: wandb.log(line, step=line["step"])])`.
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
        self._hooks = [(hook, f"hook {_name(hook)}", Failures(f"hook {_name(hook)}", warn)) for hook in hooks]
        self.failure: str | None = None

    def __call__(self, line: Line) -> None:
        for hook, what, failures in self._hooks:
            try:
                hook(line)
            except (Exception, SystemExit) as error:
                kind, message = type(error).__name__, first_line(error)
                cause = kind if message == kind else f"{kind}: {message}"
                self.failure = f"{what} fails at step {line['step']}: {cause}"
                failures.failed(cause, f"{self.failure}; training continues and calls the hook at each line")
            else:
                failures.worked()

    def close(self) -> None:
        """Report the hooks whose last call failed."""
        for _, _, failures in self._hooks:
            failures.close()


def _name(hook: Hook) -> str:
    return f"{getattr(hook, '__module__', '')}:{getattr(hook, '__qualname__', type(hook).__qualname__)}"


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
    except (ImportError, ValueError, AttributeError) as error:
        raise InvalidValue(f"hook {name!r} cannot be imported: {error}; name a function as module:function") from error
    if not callable(found):
        raise InvalidValue(f"hook {name!r} is not a function; name a function as module:function")
    hook: Hook = found
    return hook


def tensorboard(folder: Path, step: int) -> Hook:
    """Return a hook that writes the numbers of each line of metrics.jsonl for TensorBoard.

    Args:
        folder: Folder of the TensorBoard log.
        step: Step from which the run resumes. Later entries of an existing log are dropped.

    Raises:
        Unavailable: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise Unavailable("TensorBoard is not installed; run: pip install 'timemix[tensorboard]'") from error
    writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(line: Line) -> None:
        for name, value in line.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, line["step"])
        writer.flush()

    write.__qualname__ = "tensorboard"
    return write
