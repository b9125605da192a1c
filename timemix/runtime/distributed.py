"""The processes that train one model together: `torchrun` starts them, torch.distributed connects them.

Every process holds the same `World` but for its rank; that of a program started without torchrun has size 1, and the
same code runs in it.
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

from timemix.errors import Unavailable

Result = TypeVar("Result")

PATIENCE = timedelta(seconds=60)
"""How long a process waits for another in a collective before it takes it for lost."""

_LONG = timedelta(days=7)


class Elsewhere(Exception):
    """Another process of the run tells why it ends; this one ends with it, quietly."""


class World:
    """The processes of a run.

    rank: of this process, from 0 to size - 1; 0 alone writes files and speaks.
    local_rank: among the processes of this machine, which are local_size.
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
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, the same in all of them."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def all_do(self, action: Callable[[], None]) -> None:
        """Run `action`, which may use the file system, in every process.

        Args:
            action: Of this process.

        Raises:
            OSError: In process 0, where the action of any process raises it.
            Elsewhere: In the other processes then.
        """
        number = 0
        try:
            action()
        except OSError as error:
            number = error.errno or errno.EIO
        largest = torch.tensor(number)
        if self.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._patient)
        if largest.item():
            if self.first:
                raise OSError(int(largest), os.strerror(int(largest)))
            raise Elsewhere

    def first_does(self, action: Callable[[], Result]) -> Result | None:
        """What `action` gives in process 0, None in the others, which wait for its end however long it takes.

        Raises what it raises in process 0, and Elsewhere in the others.
        """
        failed = torch.full((1,), float(self.first))
        try:
            result = action() if self.first else None
            failed.zero_()
        finally:
            if self.size > 1:
                dist.all_reduce(failed, group=self._patient)
        if failed.item():
            raise Elsewhere
        return result

    def says_first(self) -> bool:
        """Whether this process is the first of the run to ask; for what one alone should say."""
        if self._store is None:
            return True
        try:
            result: bool = self._store.add("timemix/said", 1) == 1
            return result
        except RuntimeError:  # The store has gone with the process that kept it.
            return True

    def lost(self, error: RuntimeError) -> bool:
        """Whether an error says that another process of the run has gone or does not answer."""
        words = str(error).lower()
        return self.size > 1 and (isinstance(error, dist.DistError) or "gloo" in words or "nccl" in words)


ALONE = World()


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun made, or ALONE in a program started without it.

    Raises Unavailable where the other processes cannot be reached.
    """
    # The variables are torchrun's way to tell its processes who they are.
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        # Work of process 0 alone may take long; that it is gone shows at once in any group.
        patient = dist.new_group(backend="gloo", timeout=_LONG)
    except (RuntimeError, ValueError) as error:
        raise Unavailable(f"cannot reach the other processes of this run: {str(error).splitlines()[0]}") from error
    local_rank, local_size = (int(os.environ.get(f"LOCAL_{name}", d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    try:
        yield World(rank, size, local_rank, local_size, store, patient)
    finally:
        # Waits for nobody: a process that failed must not hold up the end.
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is cut up over the processes, which all must call; others as they are."""
    return tensor.full_tensor() if _is_cut(tensor) else tensor


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, known in every process, cut up as `like` is."""
    tensor = tensor.to(like.device)
    if _is_cut(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


@torch.no_grad()
def set_whole(own: Tensor, values: Tensor) -> None:
    """Copy a whole tensor, known in every process, into one that may be cut up over the processes.

    Args:
        own: Any shape, type and device.
        values: The same shape.
    """
    own.copy_(part_like(values.to(own.dtype), own))


def own_part(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that this process has; all of them where it is not cut up."""
    return tensor.to_local() if _is_cut(tensor) else tensor


def own_rows(tensor: Tensor) -> tuple[int, int]:
    """Return the first row that this process has of a cut tensor, and the row after the last."""
    rows, parts, rank = tensor.shape[0], tensor.device_mesh.size(), tensor.device_mesh.get_local_rank()  # type: ignore[attr-defined]
    each = -(-rows // parts)
    return min(rank * each, rows), min((rank + 1) * each, rows)


def _is_cut(tensor: Any) -> TypeGuard[Any]:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def my_rows(rows: int, world: World) -> slice:
    """The rows of a batch that this process takes: one part of `world.size` equal ones, in order."""
    each = rows // world.size
    return slice(world.rank * each, (world.rank + 1) * each)
