"""Where the lines of metrics.jsonl go besides: TensorBoard, or any function."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from timemix.errors import InvalidValue, Unavailable
from timemix.runs.metrics import Line
from timemix.training.failures import Failures, first_line

Hook = Callable[[Line], object]
"""Gets each line of metrics.jsonl when it is written. That is all a tracking service needs:
`trainer.run(hooks=[lambda line: wandb.log(line, step=line["step"])])`."""


class Hooks:
    """The hooks of a run. What one of them raises is a warning, and never reaches the training loop.

    `failure`: the sentence of the newest failure, None before the first.
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
                failures.failed(cause, f"{self.failure}; training continues, and calls it at each line")
            else:
                failures.worked()

    def close(self) -> None:
        """Report the hooks that failed to the end."""
        for _, _, failures in self._hooks:
            failures.close()


def _name(hook: Hook) -> str:
    return f"{getattr(hook, '__module__', '')}:{getattr(hook, '__qualname__', type(hook).__qualname__)}"


def load_hook(name: str) -> Hook:
    """The function that "module:function" names; the module may lie in the working folder.

    Raises InvalidValue where there is none.
    """
    # An installed command has its own folder on the path, not the one that it is called in.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, ValueError, AttributeError) as error:
        raise InvalidValue(f"hook {name!r} cannot be used: {error}; name a function as module:function") from error
    if not callable(found):
        raise InvalidValue(f"hook {name!r} is no function; name one as module:function")
    hook: Hook = found
    return hook


def tensorboard(folder: Path, step: int) -> Hook:
    """A hook that writes the numbers of each line for TensorBoard; what `folder` holds after `step` is dropped.

    Raises Unavailable where TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise Unavailable("TensorBoard is not installed; pip install 'timemix[tensorboard]'") from error
    writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(line: Line) -> None:
        for name, value in line.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, line["step"])
        writer.flush()

    write.__qualname__ = "tensorboard"
    return write
