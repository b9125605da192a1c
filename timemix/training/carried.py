"""The state that the rows of a batch pass to the same rows of the next batch (`data.order` "carried")."""

from pathlib import Path

import torch
from torch import Tensor

from timemix.config.run import RunConfig
from timemix.data.batches import Batches
from timemix.errors import DamagedFile, InvalidValue
from timemix.models.language_model import LanguageModel, block_class
from timemix.models.state import State
from timemix.runtime.distributed import World
from timemix.storage.sharded import open_stored


def check_documents(config: RunConfig, world: World) -> None:
    """Check that training supports `data.order` and `data.cross_documents` with the other settings.

    Raises:
        InvalidValue: Another setting or the number of processes excludes a carried state, or separate documents.
    """
    is_separate, resets = not config.data.cross_documents, block_class(config.model).takes_resets
    if is_separate and not resets and world.size > 1 and config.train.strategy == "shard":
        # The number of calls of a block depends on the documents, but all processes must call a sharded block.
        raise InvalidValue(
            f"data.cross_documents is False, which {config.model.arch} does not support with train.strategy 'shard';"
            " set train.strategy to 'replicate'"
        )
    if config.data.order != "carried":
        return
    if config.train.tune == "state":
        raise InvalidValue(
            "data.order is 'carried', but train.tune is 'state', which learns the state before the first token; set"
            " data.order to 'epoch'"
        )
    if is_separate and not resets:
        raise InvalidValue(
            f"data.order is 'carried' and data.cross_documents is False, which {config.model.arch} does not support"
            " together; leave one of them out"
        )
    if world.size > 1:
        raise InvalidValue(f"data.order is 'carried', which supports one process, not {world.size}; start one process")


class CarriedState:
    """The states after the last batch, one for each piece of a batch (`train.accumulation`), without gradients.

    Args:
        model: The model.
        batches: Batches in the order "carried".
        rows: Number of rows of a batch.
        pieces: Number of pieces of a batch.
    """

    def __init__(self, model: LanguageModel, batches: Batches, rows: int, pieces: int) -> None:
        self._model, self._batches, self._rows, self._pieces = model, batches, rows, pieces
        self._states: list[State] = []

    def begin(self, step: int) -> None:
        """Begin a step: at the start of the text, each row starts from the initial state.

        Args:
            step: Number of the step, counted from 0.
        """
        if self._batches.earlier(step) == 0:
            self._split(self._model.init_state(self._rows))

    def __getitem__(self, piece: int) -> State:
        """Return the state that a piece of the batch continues."""
        return self._states[piece]

    def __setitem__(self, piece: int, state: State) -> None:
        """Store the state after a piece of the batch."""
        # The next call of compiled code may overwrite the tensors, which are copied for this reason.
        layers = [{name: x.detach().clone() for name, x in layer.items()} for layer in state.layers]
        self._states[piece] = State(state.position.clone(), layers)

    def tensors(self, step: int) -> dict[str, Tensor]:
        """Return the tensors of the state of all rows by name, for a checkpoint before a step.

        Args:
            step: Number of the step that continues the state.

        Returns:
            The tensors; {} if the step starts from the initial state.
        """
        if self._batches.earlier(step) == 0:
            return {}
        whole = State.cat(self._states)
        return {_name(i, name): x for i, layer in enumerate(whole.layers) for name, x in layer.items()}

    def restore(self, folder: Path, step: int) -> None:
        """Load the state from a checkpoint, whose files were checked.

        Args:
            folder: The checkpoint.
            step: Number of the step that continues the state.

        Raises:
            DamagedFile: A tensor is missing or has another shape.
        """
        if (earlier := self._batches.earlier(step)) == 0:
            return
        state = self._model.init_state(self._rows)
        with open_stored(folder, "training") as stored:
            for i, layer in enumerate(state.layers):
                for name, x in layer.items():
                    if not stored.fits(_name(i, name), x.shape):
                        raise DamagedFile(
                            f"{stored.path} does not fit this run: {_name(i, name)} is missing or has another shape;"
                            " remove the checkpoint to resume from the one before"
                        )
                    layer[name] = stored.tensor(_name(i, name)).to(x.device)
        self._split(State(torch.full_like(state.position, earlier), state.layers))

    def _split(self, state: State) -> None:
        rows = torch.arange(self._rows, device=state.position.device)
        self._states = [state.select(part) for part in rows.chunk(self._pieces)]


def _name(layer: int, name: str) -> str:
    return f"carried.{layer}.{name}"
