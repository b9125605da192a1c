"""Tensor files: round trip, detection of a single wrong bit, and the usual file permissions."""

import errno
import os
import stat

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from timemix.errors import DamagedFile, FileError
from timemix.storage import tensors
from timemix.storage.tensors import check_content, open_tensors, write_tensors

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "step": torch.tensor(3.0),
    "none": torch.zeros(0, 4),
    "turned": torch.arange(6, dtype=torch.float64).reshape(2, 3).T,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tensors") / "t.safetensors"
    write_tensors(path, TENSORS, {"format": "pt"})
    return path


def check(path):
    with open_tensors(path) as file:
        check_content(file, path)


def test_tensors_come_back_with_a_checksum(path):
    check(path)
    with open_tensors(path) as file:
        assert file.metadata().keys() == {"format", "crc32"}
        for name, tensor in TENSORS.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_one_flipped_bit_of_the_content_is_found(path, place, bit):
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start + place % (len(raw) - start)] ^= 1 << bit
    damaged = path.with_name("damaged.safetensors")
    damaged.write_bytes(raw)
    with pytest.raises(DamagedFile, match="its content differs from its checksum"):
        check(damaged)


def test_tensors_that_changed_places_are_found(path, tmp_path):
    raw = path.read_bytes()
    assert raw.count(b'"none"') == raw.count(b'"step"') == 1
    swapped = raw.replace(b'"none"', b'"x---"').replace(b'"step"', b'"none"').replace(b'"x---"', b'"step"')
    (tmp_path / "s").write_bytes(swapped)
    with pytest.raises(DamagedFile, match="differs from its checksum"):
        check(tmp_path / "s")


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    # The order of the library's metadata differs from call to call.
    metadata = {name: name.upper() for name in "abcdefgh"} | {'é"\n': "ü"}
    for name in ("one", "two", "three"):
        write_tensors(tmp_path / name, TENSORS, metadata)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == (tmp_path / "three").read_bytes()
    with open_tensors(tmp_path / "one") as file:
        assert metadata.items() < file.metadata().items()
        assert torch.equal(file.get_tensor("b"), TENSORS["b"])


def test_a_file_without_a_checksum_is_read(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "old")
    check(tmp_path / "old")
    save_file({}, tmp_path / "nothing", {"format": "pt"})
    check(tmp_path / "nothing")


def test_the_checksum_is_that_of_zlib(tmp_path):
    # The CRC-32 of "123456789" is published with the polynomial.
    write_tensors(tmp_path / "t", {"1": torch.from_numpy(np.frombuffer(b"23456789", np.uint8).copy())}, {})
    with open_tensors(tmp_path / "t") as file:
        assert file.metadata() == {"crc32": "cbf43926"}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_the_mode_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "t", TENSORS, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_the_number_of_a_failed_write_is_kept(tmp_path, monkeypatch, number):
    def fail(*args):
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    monkeypatch.setattr(tensors, "save_file", fail)
    with pytest.raises(OSError, match=os.strerror(number)) as error:
        write_tensors(tmp_path / "t", TENSORS, {})
    assert error.value.errno == number


def test_a_file_that_may_not_be_read_is_not_called_damaged(path, monkeypatch):
    def refuse(self, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(FileError, match=r"cannot read .*t.safetensors: Permission denied; check its permissions"):
        check(path)
