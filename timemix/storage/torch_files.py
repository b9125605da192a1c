"""Files of `torch.save`: writing, and reading of the tensors without running the program that the file contains.

A `.pth` file is a zip file. `TOP/data.pkl` is a pickle: a program for a stack machine, which builds a dictionary of
tensors. `TOP/data/KEY` holds the numbers of a storage, and each tensor is a view of a storage. Python's own machine for
pickles calls any function that a program names. The machine of this module knows only the operations and functions that
a dictionary of tensors needs, and none of them calls code that the file chooses:

    collections.OrderedDict()                                        an empty dictionary
    torch._utils._rebuild_tensor_v2(storage, offset, size, stride)   a tensor
    persistent id ("storage", type, KEY, device, count)              a storage
"""

import errno
import math
import pickletools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timemix.errors import DamagedFile, FileError
from timemix.storage.files import cannot_read, check_regular
from timemix.storage.zip_entries import ZipEntries

LARGEST_PICKLE = 2**20
"""Maximum size of a pickle in bytes. The largest published RWKV model needs about 200 KiB."""
MOST_DIMENSIONS = 8
_DICTIONARY, _TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
_NEWER_TENSOR = "torch._utils _rebuild_tensor_v3"
"""The function for types that no storage class has, such as float8."""
_TYPES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
}
_MARK = object()


class _Refused(ValueError):
    """The reason why a pickle does not describe a dictionary of tensors."""


class _WrongType(_Refused):
    """The name of a type of numbers that no weights have."""


@dataclass(frozen=True)
class _Function:
    """A function or class that a pickle names, such as "collections OrderedDict"."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """Numbers in the mapping of a file: the first byte, the type, and the count of numbers."""

    begin: int
    dtype: torch.dtype
    count: int


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file that `torch.save` wrote from a dictionary of tensors, such as a `state_dict`.

    The content of all tensors is checked against the checksums of the file. No code of the file runs.

    Args:
        path: The file.

    Returns:
        Tensors by name, on the CPU, in the types of the file. The tensors are views of a private mapping of the file,
        so their content is read from the disk when it is used.

    Raises:
        MissingFile: The file does not exist.
        DamagedFile: The file is damaged, is of another format, or holds other objects than a dictionary of tensors.
        FileError: The file cannot be read.
    """
    _check_format(path)
    entries = ZipEntries(path)
    try:
        program, top = _program(entries)
        return _Machine(entries, top).run(program)
    except _WrongType as error:
        raise DamagedFile(
            f"{path} has a tensor of the type {error}; convert the tensor to float32 or bfloat16, or remove it"
        ) from None
    except _Refused as error:
        raise DamagedFile(
            f"{path} does not hold a dictionary of tensors: {error}; save only the dictionary:"
            " torch.save(model.state_dict(), FILE)"
        ) from None


def write_torch_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors with `torch.save`.

    Args:
        path: The file.
        tensors: Tensors by name.

    Raises:
        OSError: The file cannot be written.
    """
    try:
        with path.open("wb") as file:
            torch.save(tensors, file)
    except RuntimeError as error:
        # After a failed write, PyTorch still tries to end the file, and this second failure hides the first one.
        first = error.__context__
        raise first if isinstance(first, OSError) else OSError(errno.EIO, str(error)) from error


def _check_format(path: Path) -> None:
    """Refuse files that are no zip files, with the way to convert pickles of old versions of PyTorch."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise FileError(cannot_read(path, error)) from error
    if start.startswith(b"\x80"):
        raise DamagedFile(
            f"{path} is a pickle of PyTorch before 1.6, without a zip file around it; load it with torch.load and"
            " weights_only=True, and save it again with torch.save"
        )
    if not start.startswith(b"PK"):
        shown = f"begins with {start!r}" if start else "is empty"
        raise DamagedFile(f"{path} is not a file of torch.save: it {shown}; give a .pth file")


def _program(entries: ZipEntries) -> tuple[bytes, str]:
    """Return the pickle of a file, and the name of the top folder."""
    found = [name for name in entries.names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
        raise _Refused(f"it has {len(found)} entries named data.pkl instead of 1")
    top = found[0].removesuffix("/data.pkl")
    if f"{top}/byteorder" in entries.names:
        begin, size = entries.place(f"{top}/byteorder")
        if entries.mapping[begin : begin + size] != b"little":
            raise _Refused("its numbers are not little-endian")
    begin, size = entries.place(found[0])
    if size > LARGEST_PICKLE:
        raise _Refused(f"its pickle has {size:,} bytes, more than the maximum of {LARGEST_PICKLE:,}")
    return entries.mapping[begin : begin + size], top


class _Machine:
    """The stack machine of pickles, without operations that call code.

    Args:
        entries: The file.
        top: Name of the top folder of the file.
    """

    def __init__(self, entries: ZipEntries, top: str) -> None:
        self.entries, self.top = entries, top
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[tuple[str, str], _Storage] = {}

    def run(self, program: bytes) -> dict[str, Tensor]:
        """Run a pickle, and return the dictionary of tensors that it builds."""
        try:
            for operation, argument, place in pickletools.genops(program):
                self._step(operation.name, argument, place or 0)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise error if isinstance(error, _Refused) else _Refused("its pickle is damaged") from error
        found = self.stack.pop() if len(self.stack) == 1 else None
        if not isinstance(found, dict):
            raise _Refused(f"its object is of type {type(found).__name__}")
        for name, value in found.items():
            if not isinstance(value, Tensor):
                raise _Refused(f"its entry {name!r} is of type {type(value).__name__}")
        # Tensors may share numbers, such as an embedding that is also the head. A copy of all tensors must not need
        # much more memory than the file.
        needed, size = sum(x.numel() * x.itemsize for x in found.values()), len(self.entries.mapping)
        if needed > 2 * size:
            raise _Refused(f"its tensors have {needed:,} bytes, more than twice the {size:,} bytes of the file")
        return found

    def _step(self, name: str, argument: Any, place: int) -> None:
        """Run one operation of a pickle."""
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.stack.append(_MARK)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "SETITEM":
                self._set_items(self._popped(2))
            case "SETITEMS":
                self._set_items(self._popped_to_mark())
            case "BUILD":
                # The attributes of a dictionary, such as the version numbers in `_metadata`, are not used.
                self.stack.pop()
            case _:
                self.stack.append(self._created(name, argument, place))

    def _created(self, name: str, argument: Any, place: int) -> Any:
        """Return the object that an operation puts on the stack."""
        match name:
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                return argument
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                return {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name]
            case "EMPTY_DICT":
                return {}
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                return self._popped(("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3").index(name))
            case "TUPLE":
                return self._popped_to_mark()
            case "GLOBAL":
                return _known_function(argument)
            case "STACK_GLOBAL":
                return _known_function(" ".join(_checked(self._popped(2), (str, str))))
            case "BINPERSID":
                return self._storage(*_checked(self.stack.pop(), (str, _Function, str, str, int)))
            case "REDUCE":
                arguments, function = self.stack.pop(), self.stack.pop()
                return self._called(function, arguments)
        raise _Refused(f"its pickle has the operation {name} at byte {place}")

    def _popped(self, count: int) -> tuple[Any, ...]:
        """Remove and return the newest objects of the stack."""
        return tuple(reversed([self.stack.pop() for _ in range(count)]))

    def _popped_to_mark(self) -> tuple[Any, ...]:
        """Remove the newest mark of the stack and all objects after the mark, and return these objects."""
        found = []
        while (each := self.stack.pop()) is not _MARK:
            found.append(each)
        return tuple(reversed(found))

    def _set_items(self, items: tuple[Any, ...]) -> None:
        """Set keys and values, which alternate, in the dictionary on the top of the stack."""
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(target, dict) or not isinstance(key, str):
                raise _Refused(f"a key of its dictionary is of type {type(key).__name__}")
            if key in target:
                raise _Refused(f"its dictionary has the key {key!r} twice")
            target[key] = value

    def _called(self, function: Any, arguments: Any) -> Any:
        """Return the result of one of the two functions that a pickle may call."""
        name = function.name if isinstance(function, _Function) and isinstance(arguments, tuple) else None
        if name == _DICTIONARY and not arguments:
            return {}
        if name != _TENSOR:
            raise _Refused("its pickle calls an object that is no function")
        return self._tensor(*_checked(arguments[:4], (_Storage, int, tuple, tuple)))

    def _storage(self, kind: str, type_: _Function, key: str, _device: str, count: int) -> _Storage:
        """Return a storage of the file, whose content is checked the first time."""
        dtype = _TYPES.get(type_.name)
        if kind != "storage" or dtype is None:
            raise _Refused(f"its pickle has a {kind!r} of type {type_.name!r}")
        if (key, type_.name) not in self.storages:
            begin, size = self.entries.place(f"{self.top}/data/{key}")
            self.storages[key, type_.name] = _Storage(begin, dtype, size // dtype.itemsize)
            if size % dtype.itemsize:
                raise _Refused(f"the size of its storage {key!r} is no multiple of the size of a number")
        found = self.storages[key, type_.name]
        if count != found.count:
            raise _Refused(f"its storage {key!r} has {found.count:,} numbers instead of {count:,}")
        return found

    def _tensor(self, storage: _Storage, offset: int, size: tuple[Any, ...], stride: tuple[Any, ...]) -> Tensor:
        """Return a view of a storage, after a check that the view lies inside the storage."""
        if len(size) != len(stride) or len(size) > MOST_DIMENSIONS:
            raise _Refused(f"a tensor has {len(size)} sizes and {len(stride)} strides")
        most = len(self.entries.mapping)
        is_bounded = all(type(n) is int and 0 <= n <= most for n in (offset, *size, *stride))
        # PyTorch multiplies the sizes of a tensor without numbers too, and the product must not overflow.
        if not is_bounded or math.prod(n for n in size if n) > most:
            raise _Refused("a tensor has a negative or too large size, stride or offset")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if count and last >= storage.count:
            raise _Refused(f"a tensor of size {list(size)} does not fit in its storage of {storage.count:,} numbers")
        if not count:
            return torch.empty(size, dtype=storage.dtype)
        whole = torch.frombuffer(self.entries.mapping, dtype=storage.dtype, count=storage.count, offset=storage.begin)
        return whole.as_strided(size, stride, offset)


def _known_function(name: str) -> _Function:
    """Return a function that a pickle may name."""
    if name not in (_DICTIONARY, _TENSOR, *_TYPES):
        if re.fullmatch(r"torch \w+Storage", name) or name == _NEWER_TENSOR:
            raise _WrongType("float8, or another new type" if name == _NEWER_TENSOR else name.replace(" ", "."))
        raise _Refused(f"its pickle names {name.replace(' ', '.')!r}, which is no part of a tensor")
    return _Function(name)


def _checked(value: Any, kinds: tuple[type, ...]) -> Any:
    """Return a tuple whose items have the given types."""
    if not isinstance(value, tuple) or [type(each) for each in value] != list(kinds):
        raise _Refused("its pickle has a tensor or a storage with wrong arguments")
    return value
