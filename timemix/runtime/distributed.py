"""Processes that train one model together. `torchrun` starts the processes, and torch.distributed connects them.

Each process has a `World` with its rank. Without torchrun, a program runs the same code with a world of size 1.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from timemix.errors import TimemixError, Unavailable

Result = TypeVar("Result")

PATIENCE = timedelta(seconds=60)
"""Time limit of a collective operation. A process that waits longer for another process stops with an error."""

_LONG = timedelta(days=7)


class Elsewhere(Exception):
    """Error in this process when another process of the run has failed. Only the failed process prints a message."""


class World:
    """The processes of a run, with the rank of this process.

    Args:
        rank: Rank of this process, 0 to size - 1. Only rank 0 writes files and prints.
        size: Number of processes.
        local_rank: Rank of this process among the processes of its machine, 0 to local_size - 1.
        local_size: Number of processes on this machine.
        store: Key-value store that the processes share; None in a world of size 1.
        patient: Process group with a long timeout, which waits while process 0 works alone; None in a world of size 1.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        local_size: int = 1,
        store: dist.Store | None = None,  # type: ignore[name-defined]
        patient: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self._store, self._patient = store, patient

    @property
    def first(self) -> bool:
        """True if this process is process 0."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sum each value over the processes.

        Args:
            *values: The values of this process.

        Returns:
            The sums, which are equal in all processes.
        """
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def _largest(self, number: int) -> int:
        """Return the largest number that a process passes.

        A process waits for all other processes without a time limit.
        """
        largest = torch.tensor(number)
        if self.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._patient)
        return int(largest)

    def all_do(self, action: Callable[[], Result]) -> Result:
        """In every process, call a function that may use the file system.

        Args:
            action: Function that this process calls.

        Returns:
            The result of the function in this process.

        Raises:
            OSError: The function of any process fails with an OSError. Only process 0 raises this error.
            Elsewhere: The function of any process fails with an OSError. All processes except process 0 raise this
                error.
        """
        number = 0
        try:
            result = action()
        except OSError as error:
            number = error.errno or errno.EIO
        if number := self._largest(number):
            raise OSError(number, os.strerror(number)) if self.first else Elsewhere
        return result

    def all_check(self, check: Callable[[], object]) -> None:
        """In every process, call a function that may refuse to continue.

        Args:
            check: Function that this process calls.

        Raises:
            TimemixError: The function of this process raises this error.
            Elsewhere: The function of another process raises a TimemixError.
        """
        found = None
        try:
            check()
        except TimemixError as error:
            found = error
        if self._largest(found is not None):
            raise found or Elsewhere

    def first_does(self, action: Callable[[], Result]) -> Result | None:
        """Call a function in process 0 alone. All processes except process 0 wait until the function returns.

        Args:
            action: The function.

        Returns:
            The result of the function in process 0, None in the other processes.

        Raises:
            Elsewhere: The function fails in process 0. All processes except process 0 raise this error, and process 0
                raises the exception of the function.
        """
        has_failed = self.first
        try:
            result = action() if self.first else None
            has_failed = False
        finally:
            has_failed = bool(self._largest(has_failed))
        if has_failed:
            raise Elsewhere
        return result

    def says_first(self) -> bool:
        """Return whether this process is the first to call this method, so that only one process prints a message.

        Returns:
            True in the first process that calls this method, and in every process if the process of the store has
            ended.
        """
        if self._store is None:
            return True
        try:
            result: bool = self._store.add("timemix/said", 1) == 1
            return result
        except RuntimeError:  # The process of the store has ended.
            return True

    def lost(self, error: RuntimeError) -> bool:
        """Return whether an error means that another process of the run has ended or does not answer.

        Args:
            error: The error.

        Returns:
            True for an error of torch.distributed in a world of several processes.
        """
        words = str(error).lower()
        return self.size > 1 and (isinstance(error, dist.DistError) or "gloo" in words or "nccl" in words)


ALONE = World()


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Join the processes that torchrun started, for a `with` block.

    Yields:
        The world of these processes, or ALONE without torchrun.

    Raises:
        Unavailable: The other processes of the run cannot be reached.
    """
    # torchrun passes rank and size in environment variables.
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        # The timeout is long because process 0 may work alone for a long time. If process 0 ends, any process group
        # fails at once.
        patient = dist.new_group(backend="gloo", timeout=_LONG)
    except (RuntimeError, ValueError) as error:
        raise Unavailable(
            f"the other processes of this run cannot be reached: {str(error).splitlines()[0]}; check the arguments of"
            " torchrun"
        ) from error
    local_rank, local_size = (int(os.environ.get(f"LOCAL_{name}", d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    try:
        yield World(rank, size, local_rank, local_size, store, patient)
    finally:
        # This call does not wait for other processes, so a failed process does not delay the end of this process.
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that is sharded over the processes. All processes must call this function.

    Args:
        tensor: A sharded tensor (DTensor), or a plain tensor.

    Returns:
        The whole tensor, or a plain tensor unchanged.
    """
    return tensor.full_tensor() if _is_cut(tensor) else tensor


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor in the same way as another tensor.

    Args:
        tensor: The whole tensor, equal in every process.
        like: A sharded tensor (DTensor), or a plain tensor.

    Returns:
        The tensor on the device of `like`, sharded in the same way as `like`.
    """
    tensor = tensor.to(like.device)
    if _is_cut(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


@torch.no_grad()
def set_whole(own: Tensor, values: Tensor) -> None:
    """Copy a whole tensor into a tensor that may be sharded over the processes.

    Args:
        own: The tensor to overwrite, of any shape, dtype and device; plain or sharded.
        values: The whole tensor, of the same shape as `own`, equal in every process.
    """
    own.copy_(part_like(values.to(own.dtype), own))


def own_part(tensor: Tensor) -> Tensor:
    """Return the rows of a sharded tensor that this process has, or a plain tensor unchanged."""
    return tensor.to_local() if _is_cut(tensor) else tensor


def own_rows(tensor: Tensor) -> tuple[int, int]:
    """Return the first row that this process has of a sharded tensor, and the row after the last row."""
    rows, parts, rank = tensor.shape[0], tensor.device_mesh.size(), tensor.device_mesh.get_local_rank()  # type: ignore[attr-defined]
    each = -(-rows // parts)
    return min(rank * each, rows), min((rank + 1) * each, rows)


def _is_cut(tensor: Any) -> TypeGuard[Any]:
    """Return whether a tensor is sharded, which means that it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def my_rows(rows: int, world: World) -> slice:
    """Return the slice of the rows of a batch that this process computes. All processes have equal numbers of rows."""
    each = rows // world.size
    return slice(world.rank * each, (world.rank + 1) * each)
