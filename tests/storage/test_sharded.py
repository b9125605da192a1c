"""Tensors of a checkpoint in several files: any rows of any cut, and each way in which the files can disagree."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timemix.errors import DamagedFile, FileError, MissingFile
from timemix.storage.index import index_path, shard_name, write_index
from timemix.storage.sharded import open_stored
from timemix.storage.tensors import open_tensors, write_tensors

WHOLE = {"matrix": torch.arange(21.0).reshape(7, 3), "vector": torch.arange(5.0), "step": torch.tensor(4.0)}


def write_shards(folder, cuts):
    """Write WHOLE with the rows of each tensor cut at the same shares."""
    bounds = [0, *sorted(cuts), 12]
    size, checksums = len(bounds) - 1, []
    for rank in range(size):
        rows = {}
        for name, tensor in WHOLE.items():
            if tensor.ndim:
                low, high = (len(tensor) * bound // 12 for bound in bounds[rank : rank + 2])
                rows[name] = tensor[low:high]
            elif rank == 0:
                rows[name] = tensor
        checksums.append(write_tensors(folder / shard_name("model", rank, size), rows, {}))
    write_index(folder, "model", checksums, {name: tensor.shape for name, tensor in WHOLE.items()})
    return size


@given(cuts=st.lists(st.integers(0, 12), max_size=4), rows=st.tuples(st.integers(0, 7), st.integers(0, 7)))
def test_any_rows_of_any_cut_are_read(tmp_path_factory, cuts, rows):
    folder = tmp_path_factory.mktemp("cut")
    write_shards(folder, cuts)
    begin, end = sorted(rows)
    with open_stored(folder, "model") as stored:
        stored.check_content()
        assert {name: list(x.shape) for name, x in WHOLE.items()} == stored.shapes
        for name, tensor in WHOLE.items():
            assert torch.equal(stored.tensor(name), tensor)
            assert stored.fits(name, tensor.shape)
            assert not stored.fits(name, [*tensor.shape, 1])
        assert torch.equal(stored.rows("matrix", begin, end), WHOLE["matrix"][begin:end])


def test_one_file_is_read_the_same_way(tmp_path):
    write_tensors(tmp_path / "model.safetensors", WHOLE, {})
    with open_stored(tmp_path, "model") as stored:
        assert torch.equal(stored.tensor("step"), WHOLE["step"])
        assert torch.equal(stored.rows("matrix", 2, 5), WHOLE["matrix"][2:5])
        assert not stored.fits("other", [1])


def test_a_missing_shard_is_named(tmp_path):
    size = write_shards(tmp_path, [4, 8])
    (tmp_path / shard_name("model", 1, size)).unlink()
    with pytest.raises(MissingFile, match="model-1-of-3.safetensors is missing"), open_stored(tmp_path, "model"):
        pass


def test_a_shard_of_another_checkpoint_is_refused(tmp_path):
    size = write_shards(tmp_path, [6])
    write_tensors(tmp_path / shard_name("model", 1, size), {"matrix": torch.ones(9, 3), "vector": torch.ones(3)}, {})
    with pytest.raises(DamagedFile, match=r"model-1-of-2.safetensors is not the file that model.index.json describes"):
        open_stored(tmp_path, "model").__enter__()


def test_shards_of_another_step_or_rank_are_refused_though_their_shapes_fit(tmp_path):
    size = write_shards(tmp_path, [6])
    first, second = (tmp_path / shard_name("model", rank, size) for rank in range(size))
    with open_tensors(second) as file:
        rows = {name: file.get_tensor(name) + 1 for name in file.keys()}  # noqa: SIM118
    write_tensors(second, rows, {})
    with pytest.raises(DamagedFile, match=r"model-1-of-2.safetensors is not the file that"):
        open_stored(tmp_path, "model").__enter__()
    write_shards(tmp_path, [6])
    content = first.read_bytes(), second.read_bytes()
    for path, other in zip((second, first), content, strict=True):
        path.write_bytes(other)
    with pytest.raises(DamagedFile, match=r"model-0-of-2.safetensors is not the file that"):
        open_stored(tmp_path, "model").__enter__()


def test_an_index_without_checksums_is_read_and_its_shapes_are_checked(tmp_path):
    size = write_shards(tmp_path, [6])
    index = json.loads(index_path(tmp_path, "model").read_text())
    index_path(tmp_path, "model").write_text(json.dumps(index | {"checksums": []}))
    with open_stored(tmp_path, "model") as stored:
        assert torch.equal(stored.tensor("matrix"), WHOLE["matrix"])
    write_tensors(tmp_path / shard_name("model", 1, size), {"matrix": torch.ones(9, 3), "vector": torch.ones(3)}, {})
    with pytest.raises(DamagedFile, match=r"model.index.json does not fit its files: .*matrix"):
        open_stored(tmp_path, "model").__enter__()


def test_a_flipped_bit_is_found_in_the_process_that_checks_the_file(tmp_path):
    size = write_shards(tmp_path, [6])
    path = tmp_path / shard_name("model", 1, size)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with open_stored(tmp_path, "model") as stored:
        stored.check_content(0, 2)
        with pytest.raises(DamagedFile, match=r"model-1-of-2.safetensors is damaged"):
            stored.check_content(1, 2)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "{}",
        '{"files": [], "shapes": {}}',
        '{"files": ["../model-0-of-1.safetensors"], "shapes": {}}',
        '{"files": ["model-0-of-1.safetensors"], "shapes": {"matrix": [-7, 3]}}',
        '{"files": ["model-0-of-1.safetensors"], "shapes": {"matrix": "x"}}',
        '{"files": ["model-0-of-1.safetensors"], "shapes": {}}',
        json.dumps({"files": ["model-0-of-1.safetensors"], "shapes": {"matrix": [7, 3], "vector": [5], "step": [1]}}),
        json.dumps({"files": ["model-0-of-1.safetensors"], "shapes": {"matrix": [7, 4], "vector": [5], "step": []}}),
    ],
)
def test_a_damaged_index_is_one_sentence(tmp_path, index):
    write_shards(tmp_path, [])
    index_path(tmp_path, "model").write_text(index)
    with pytest.raises(FileError, match="model.index.json") as error:
        open_stored(tmp_path, "model").__enter__()
    assert "\n" not in str(error.value)
