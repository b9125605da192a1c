"""Where the lines of metrics.jsonl go besides: TensorBoard, or any function."""

import importlib
from collections.abc import Callable
from pathlib import Path

from timemix.errors import InvalidValue, Unavailable
from timemix.runs.metrics import Line

Hook = Callable[[Line], object]
"""Gets each line of metrics.jsonl when it is written. That is all a tracking service needs:
`trainer.run(hook=lambda line: wandb.log(line, step=line["step"]))`."""


def load_hook(name: str) -> Hook:
    """The function that "module:function" names. Raises InvalidValue where there is none."""
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

    return write
