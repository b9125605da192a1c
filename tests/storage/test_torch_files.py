"""Files of torch.save: the tensors of good files, and refusal of all other content without running code."""

import contextlib
import io
import os
import pickletools
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.limits import seconds
from tests.helpers.tiers import examples
from timemix.errors import DamagedFile, MissingFile
from timemix.storage.torch_files import LARGEST_PICKLE, read_torch_file

GOLDEN = Path(__file__).parents[1] / "golden/published"
GRID = torch.arange(24.0).reshape(4, 6)
TENSORS = {
    "bfloat16": GRID.bfloat16(),
    "float16": GRID.half(),
    "float64": GRID.double(),
    "columns": GRID.t(),
    "part": GRID[1:3, 2:5],
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
}


def saved(content, **options) -> bytes:
    """Return the file that torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def parts_of(raw: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts, **options) -> bytes:
    """Return a zip file whose checksums match its content. A list of pairs can have one name twice."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, content in parts.items() if isinstance(parts, dict) else parts:
            archive.writestr(name, content)
    return file.getvalue()


def with_program(raw: bytes, change) -> bytes:
    """Return a file whose pickle is changed, with matching checksums."""
    return zipped({n: change(x) if n.endswith("data.pkl") else x for n, x in parts_of(raw).items()})


def read(folder: Path, raw: bytes):
    path = folder / "weights.pth"
    path.write_bytes(raw)
    return read_torch_file(path)


GOOD = saved(OrderedDict(TENSORS))


@pytest.mark.parametrize("kind", [dict, OrderedDict])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_of_a_file(tmp_path, kind, protocol):
    found = read(tmp_path, saved(kind(TENSORS), pickle_protocol=protocol))
    assert list(found) == list(TENSORS)
    for name, x in TENSORS.items():
        assert found[name].dtype == x.dtype
        assert torch.equal(found[name], x)


def test_a_state_dict_with_attributes(tmp_path):
    model = torch.nn.Linear(3, 2).bfloat16()
    found = read(tmp_path, saved(model.state_dict()))
    assert torch.equal(found["weight"], model.weight)


@pytest.mark.parametrize("name", ["rwkv7", "intact"])
def test_published_files_equal_the_own_reader_of_torch(name):
    path = GOLDEN / f"{name}.pth"
    found, expected = read_torch_file(path), torch.load(path, weights_only=True)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_the_last_number_of_a_storage(tmp_path):
    assert read(tmp_path, saved({"a": Claim([2], [2**18 - 1])}))["a"].tolist() == [0, 2**18 - 1]


def test_writes_to_the_tensors_do_not_change_the_file(tmp_path):
    found = read(tmp_path, GOOD)
    found["float64"].zero_()
    assert (tmp_path / "weights.pth").read_bytes() == GOOD


def test_numbers_without_alignment(tmp_path):
    parts = parts_of(GOOD)
    for padding in range(8):
        raw = zipped({"archive/pad": b"x" * padding} | parts)
        assert torch.equal(read(tmp_path, raw)["float64"], TENSORS["float64"])


class Payload:
    """Code that unpickling would run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def flipped(raw: bytes, place: int) -> bytes:
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


def in_big_endian(raw: bytes) -> bytes:
    return zipped({n: b"big" if n.endswith("byteorder") else x for n, x in parts_of(raw).items()})


class Claim:
    """A tensor with any size and stride, as a pickle can name it."""

    def __init__(self, size, stride) -> None:
        numbers = torch.arange(2.0**18)
        self.storage = torch.storage.TypedStorage(
            wrap_storage=numbers.untyped_storage(), dtype=numbers.dtype, _internal=True
        )
        self.size, self.stride = tuple(size), tuple(stride)

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.size, self.stride, False, OrderedDict())


MANY = OrderedDict.fromkeys(map(str, range(50)), torch.zeros(1000))
BAD = {
    "no bytes": (b"", "is empty"),
    "a web page": (b"<!DOCTYPE html>", "begins with b'<!DOCTYPE html>'"),
    "a pickle without a zip file": (saved(TENSORS, _use_new_zipfile_serialization=False), "PyTorch before 1.6"),
    "the first half": (GOOD[: len(GOOD) // 2], "not a zip file"),
    "a flipped bit of a number": (flipped(GOOD, GOOD.index(GRID.double().numpy().tobytes()) + 9), "checksum"),
    "a list": (saved([GRID]), "EMPTY_LIST"),
    "a number": (saved({"a": 3}), "'a' is of type int"),
    "a nested dictionary": (saved({"a": TENSORS}), "'a' is of type dict"),
    "integers": (saved({"a": torch.arange(3)}), "a tensor of the type torch.LongStorage; convert the tensor"),
    "numbers as names": (saved({3: GRID}), "key of its dictionary is of type int"),
    "one number for a billion": (saved({"a": torch.zeros(1).expand(2**15, 2**15)}), "too large size"),
    "no numbers in eight long dimensions": (saved({"a": Claim([2**20] * 7 + [0], [0] * 8)}), "too large size"),
    "one number in eight long dimensions": (saved({"a": Claim([2**20] * 8, [0] * 8)}), "too large size"),
    "one number past the storage": (saved({"a": Claim([2], [2**18])}), "a tensor of size [2] does not fit"),
    "one storage for 50 tensors": (saved(MANY), "more than twice the"),
    "compressed entries": (
        zipped(parts_of(GOOD), compression=zipfile.ZIP_DEFLATED),
        "has compressed or encrypted entries",
    ),
    "no pickle": (zipped({"a/data/0": b""}), "0 entries named data.pkl"),
    "two pickles": (zipped(parts_of(GOOD) | {"b/data.pkl": b"."}), "2 entries named data.pkl"),
    "no numbers": (zipped({n: x for n, x in parts_of(GOOD).items() if "/data/" not in n}), "data/0' is missing"),
    "big-endian numbers": (in_big_endian(GOOD), "not little-endian"),
    "a large pickle": (with_program(GOOD, lambda x: x + bytes(LARGEST_PICKLE)), "more than the maximum"),
    "an endless stack": (with_program(GOOD, lambda x: b"(" * LARGEST_PICKLE), "pickle is damaged"),
    "deep tuples": (with_program(GOOD, lambda x: b")" + b"\x85" * 100_000 + b"."), "of type tuple"),
    "a missing memory": (with_program(GOOD, lambda x: b"h\x07."), "pickle is damaged"),
    "nothing": (with_program(GOOD, lambda x: b"."), "of type NoneType"),
    "other bytes": (with_program(GOOD, lambda x: b"\xff"), "pickle is damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_files(tmp_path, name):
    raw, reason = BAD[name]
    with seconds(20), pytest.raises(DamagedFile, match="weights.pth") as error:
        read(tmp_path, raw)
    assert reason in str(error.value)


def test_two_entries_of_one_name(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        raw = zipped([*parts_of(GOOD).items(), *parts_of(GOOD).items()])
    with pytest.raises(DamagedFile, match="two of its entries have one name"):
        read(tmp_path, raw)


def test_many_entries(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(30_000):
            archive.writestr(f"a/data/{i}", b"")
    tracemalloc.start()
    with pytest.raises(DamagedFile, match="list of entries would have"):
        read(tmp_path, file.getvalue())
    assert tracemalloc.get_traced_memory()[1] < 2 * len(file.getvalue())
    tracemalloc.stop()


def test_names_of_entries_are_no_paths(tmp_path):
    parts = {f"../../{n}" if "data/" in n else n: x for n, x in parts_of(GOOD).items()} | {"/etc/escape": b"x"}
    with pytest.raises(DamagedFile, match="is missing"):
        read(tmp_path, zipped(parts))
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pth"]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("where", ["a value", "beside the tensors", "an attribute"])
def test_code_never_runs(tmp_path, where, protocol):
    marker = tmp_path / "marker"
    content = OrderedDict(TENSORS)
    if where == "a value":
        content["a"] = Payload(marker)
    elif where == "an attribute":
        content._metadata = Payload(marker)
    else:
        content = (content, Payload(marker))
    with pytest.raises(DamagedFile, match="system"):
        read(tmp_path, saved(content, pickle_protocol=protocol))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("code", "'posix.system'"), ("huge_claim", "too large size"), ("out_of_bounds", "does not fit in its storage")],
)
def test_hostile_files(name, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DamagedFile, match=reason):
        read_torch_file(GOLDEN / f"{name}.pth")
    assert not list(tmp_path.iterdir())


def test_files_that_do_not_exist(tmp_path):
    with pytest.raises(MissingFile, match="no.pth"):
        read_torch_file(tmp_path / "no.pth")


def test_the_content_is_mapped_not_copied(tmp_path):
    """Python allocates only the objects of the dictionary, not the numbers."""
    raw = saved({"a": torch.ones(4 * 2**20)})
    tracemalloc.start()
    found = read(tmp_path, raw)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found["a"].sum() == 4 * 2**20
    assert peak < 2**20, (size, peak)


@st.composite
def damaged(draw, raw: bytes) -> bytes:
    """Draw a file with flipped bytes, a cut, a repeated part or a removed part."""
    places = st.integers(0, len(raw) - 1)
    a, b = sorted((draw(places), draw(places)))
    kind = draw(st.sampled_from(["bytes", "cut", "repeat", "remove"]))
    if kind == "bytes":
        return raw[:a] + draw(st.binary(min_size=1, max_size=8)) + raw[a + 1 :]
    return {"cut": raw[:b], "repeat": raw[:b] + raw[a:], "remove": raw[:a] + raw[b:]}[kind]


def either_loads_or_is_refused(folder: Path, raw: bytes) -> None:
    tracemalloc.start()
    with seconds(5), contextlib.suppress(DamagedFile):
        found = read(folder, raw)
        assert sum(x.numel() * x.itemsize for x in found.values()) <= len(raw)
        # Every number lies inside the mapping: a number outside would end the process.
        assert all(x.sum() is not None for x in found.values())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24
    assert [p.name for p in folder.iterdir()] == ["weights.pth"]


@examples(1000)
@given(data=st.data())
def test_damaged_files(tmp_path_factory, data):
    either_loads_or_is_refused(tmp_path_factory.mktemp("damaged"), data.draw(damaged(GOOD)))


@examples(1000)
@given(data=st.data())
def test_damaged_programs(tmp_path_factory, data):
    """The pickle is damaged, and its checksum matches, so the machine runs the damaged program."""
    good = data.draw(st.sampled_from([GOOD, saved(TENSORS, pickle_protocol=4)]))
    raw = with_program(good, lambda program: data.draw(damaged(program)))
    either_loads_or_is_refused(tmp_path_factory.mktemp("damaged"), raw)


LENGTHS = st.sampled_from([0, 1, 2, 2**10, 2**18, 2**20])


@examples(200)
@given(st.lists(st.tuples(LENGTHS, LENGTHS), max_size=9))
def test_any_sizes_and_strides(tmp_path_factory, pairs):
    sizes, strides = [size for size, _ in pairs], [stride for _, stride in pairs]
    either_loads_or_is_refused(tmp_path_factory.mktemp("sizes"), saved({"a": Claim(sizes, strides)}))


OPERATIONS = [each.code.encode("latin-1") for each in pickletools.opcodes if each.arg is None]


@examples(1000)
@given(st.lists(st.sampled_from([*OPERATIONS, b"K\x01", b"h\x00", b"q\x00", b"ctorch\nFloatStorage\n"]), max_size=60))
def test_any_program(tmp_path_factory, operations):
    raw = with_program(GOOD, lambda program: b"".join([*operations, b"."]))
    either_loads_or_is_refused(tmp_path_factory.mktemp("program"), raw)
