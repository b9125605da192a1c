"""Atomic writes of checkpoints, in one file by process 0 alone or in one file per process."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from timemix.config.run import RunConfig, to_toml
from timemix.runs.folder import Progress, checkpoint_name
from timemix.runtime.distributed import ALONE, World
from timemix.storage.files import atomic_folder, sync, unfinished_name
from timemix.storage.index import shard_name, write_index
from timemix.storage.json_files import to_json
from timemix.storage.tensors import write_tensors
from timemix.tokenizers.base import Tokenizer


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a file of one process to the disk, and return its checksum. Process 0 cannot sync other machines' files."""
    checksum = write_tensors(path, tensors, {})
    with path.open("rb") as file:
        sync(file.fileno())
    return checksum


def save_checkpoint(
    run: Path,
    tensors: Mapping[str, dict[str, Tensor]],
    config: RunConfig,
    tokenizer: Tokenizer,
    progress: Progress,
    world: World = ALONE,
    shapes: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
) -> Path:
    """Write the checkpoint RUN/checkpoints/step-NNNNNNNN atomically, and return its path.

    Args:
        run: Run folder.
        tensors: Tensors of "model" and of "training" by name, on the CPU. With `shapes`, each tensor contains the rows
            of this process; else, the tensors are whole.
        config: Config of the run.
        tokenizer: Tokenizer of the run.
        progress: State of the run without its tensors.
        world: The processes of the run. With `shapes`, all processes must call this function; else, process 0 alone.
        shapes: Shapes of the whole tensors if each process writes its rows; None if process 0 writes whole tensors.

    Raises:
        CannotWrite: The disk is full or not writable. Only process 0 raises CannotWrite.
        Elsewhere: Process 0 raised CannotWrite. All other processes then raise Elsewhere.
    """
    folder = run / "checkpoints" / checkpoint_name(progress.step)

    def write_rest(temporary: Path) -> None:
        (temporary / "config.toml").write_text(to_toml(config), encoding="utf-8")
        tokenizer.save(temporary / "tokenizer.json")
        (temporary / "training.json").write_text(json.dumps(to_json(progress), indent=1), encoding="utf-8")

    if shapes is None:
        with atomic_folder(folder) as temporary:
            for stem, named in tensors.items():
                write_tensors(temporary / f"{stem}.safetensors", named, {"format": "pt"} if stem == "model" else {})
            write_rest(temporary)
        return folder
    with contextlib.ExitStack() as stack:
        made = world.first_does(lambda: stack.enter_context(atomic_folder(folder)))
        # The name of the temporary folder ends with the id of process 0.
        (creator,) = world.sum(os.getpid() if made else 0)
        temporary = made or unfinished_name(folder, int(creator))
        checksums = {}
        for stem, named in tensors.items():
            own = [0] * world.size
            path = temporary / shard_name(stem, world.rank, world.size)
            own[world.rank] = int(world.all_do(partial(_write_shard, path, named)), 16)
            checksums[stem] = [f"{int(each):08x}" for each in world.sum(*own)]

        def finish() -> None:
            for stem, each in shapes.items():
                write_index(temporary, stem, checksums[stem], each)
            write_rest(temporary)
            stack.close()

        world.first_does(finish)
    return folder
