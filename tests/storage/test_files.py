"""Writes and locks on file systems without sync or locks, and names that are not UTF-8."""

import errno
import fcntl
import os
import signal
import socket
import time
from pathlib import Path

import pytest

import timemix
from tests.helpers.runs import small_config, small_trainer, write_text_file
from timemix.data.config import DataConfig
from timemix.data.prepare import prepare
from timemix.data.sources import read_source
from timemix.errors import AlreadyExists, CannotWrite, FileError, InUse
from timemix.storage.files import (
    append,
    atomic_folder,
    new_file,
    new_folder,
    remove_folder,
    remove_unfinished,
    write_text,
)
from timemix.storage.locks import FolderLock, claimed, is_held
from timemix.training.start import new_run, resume_run


def failing(code):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_sync_can_be_written(tmp_path, monkeypatch, code):
    monkeypatch.setattr("os.fsync", failing(code))
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("a")
    write_text(tmp_path / "file", "b")
    small_trainer(tmp_path).save()
    assert (tmp_path / "folder" / "a").read_text() + (tmp_path / "file").read_text() == "ab"
    assert timemix.load(tmp_path / "run").model


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_other_failures_to_sync_are_reported(tmp_path, monkeypatch, code):
    monkeypatch.setattr("os.fsync", failing(code))
    with pytest.raises(CannotWrite), atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("a")
    assert not (tmp_path / "folder").exists()


def test_a_new_folder_removes_what_killed_processes_left_of_it(tmp_path):
    ended, running = 2**31 - 1, os.getppid()
    names = [f".a[1].partial-{ended}", f".a[1].partial-{running}", f".b.partial-{ended}", f".a1.partial-{ended}"]
    for name in names:
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "a[1]") as folder:
        (folder / "file").write_text("a")
    assert {path.name for path in tmp_path.iterdir()} == {"a[1]", *names[1:]}


def test_a_new_file_removes_what_killed_processes_left_of_it(tmp_path):
    dead, alive, other = (f".a.partial-{2**31 - 1}.gguf", f".a.partial-{os.getppid()}.gguf", ".a.partial-x.gguf")
    for name in (dead, alive, other):
        (tmp_path / name).write_text("part")
    with new_file(tmp_path / "a.gguf") as temporary:
        temporary.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.gguf", alive, other}


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_file_never_replaces_the_file_of_another_process(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(Path, "hardlink_to", failing(errno.EPERM))
    path = tmp_path / "a"

    def write_both():
        with new_file(path) as temporary:
            temporary.write_text("mine")
            path.write_text("theirs")

    with pytest.raises(AlreadyExists, match="exists already"):
        write_both()
    assert path.read_text() == "theirs"
    path.unlink()
    with new_file(path) as temporary:
        temporary.write_text("mine")
    assert path.read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_a_new_folder_leaves_nothing_after_ctrl_c(tmp_path):
    def interrupted(folder):
        (folder / "file").write_text("a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a") as folder:
        interrupted(folder)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_appears_at_the_last_moment_is_not_replaced(tmp_path, monkeypatch):
    def other_process(descriptor):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a/theirs").touch()

    # A folder without files is synced only once, between the check and the rename.
    monkeypatch.setattr("os.fsync", other_process)
    with pytest.raises(AlreadyExists, match="a exists already"), new_folder(tmp_path / "a"):
        pass
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["a", "a/theirs"]


def test_a_new_folder_never_replaces_a_folder(tmp_path):
    """The last block imitates a process that writes the same folder faster."""
    with new_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("first")
    with pytest.raises(AlreadyExists, match="a exists already"), new_folder(tmp_path / "a"):
        pass
    with pytest.raises(AlreadyExists, match="b exists already"), new_folder(tmp_path / "b"):
        (tmp_path / "a").rename(tmp_path / "b")
    assert (tmp_path / "b/file").read_text() == "first"
    (tmp_path / "link").symlink_to("missing")
    with pytest.raises(AlreadyExists, match="link exists already"), new_folder(tmp_path / "link"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"b", "link"}


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP], ids=errno.errorcode.get)
def no_locks(request, monkeypatch):
    """Imitate a file system without locks that has a lock file from an earlier lock."""
    monkeypatch.setattr(fcntl, "flock", failing(request.param))


def test_without_locks_a_folder_is_held_by_one_process(tmp_path, no_locks):
    (tmp_path / ".lock").touch()
    for _ in range(2):
        first, second = FolderLock(tmp_path), FolderLock(tmp_path)
        first.take()
        assert first.taken_over is None
        with pytest.raises(InUse, match=rf"in use by process {os.getpid()} .*; if it has ended, remove .*\.lock\.soft"):
            second.take()
        first.release()
        second.take()
        second.release()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_without_locks_the_folder_of_a_killed_process_is_taken_over(tmp_path, no_locks):
    child = os.fork()
    if not child:
        FolderLock(tmp_path).take()
        os._exit(0)
    os.waitpid(child, 0)
    lock = FolderLock(tmp_path)
    lock.take()
    assert lock.taken_over is not None
    assert f"process {child} on" in lock.taken_over


def test_without_locks_a_claim_is_of_one_process_and_ends(tmp_path, no_locks):
    path = tmp_path / "a.lock"
    path.touch()
    for _ in range(2):
        with claimed(path) as first, claimed(path) as second:
            assert (first, second) == (True, False)


def test_without_locks_a_finished_run_can_be_used(tmp_path, no_locks):
    trainer = small_trainer(tmp_path)
    trainer.run()
    trainer.lock.release()
    assert resume_run(tmp_path / "run").step == trainer.config.train.steps


BAD = os.fsdecode(b"caf\xe9")


def test_names_that_are_not_utf_8_are_refused_at_once(tmp_path):
    write_text_file(tmp_path).rename(tmp_path / BAD)
    good = write_text_file(tmp_path)
    refusals = [
        lambda: read_source(str(tmp_path / BAD)),
        lambda: prepare(tmp_path / "out", DataConfig(source=str(tmp_path / BAD))),
        lambda: prepare(tmp_path / f"{BAD}-out", DataConfig(source=str(good))),
        lambda: new_run(small_config(good), tmp_path / f"{BAD}-run"),
    ]
    for refused in refusals:
        with pytest.raises(FileError, match=r"the name of .*caf\\udce9.* is not UTF-8; rename it"):
            refused()


def test_a_run_in_a_folder_whose_name_is_not_utf_8_is_not_called_damaged(tmp_path):
    small_trainer(tmp_path).save()
    (tmp_path / "run").rename(tmp_path / BAD)
    with pytest.raises(FileError, match="is not UTF-8; rename it"):
        timemix.load(tmp_path / BAD)


def test_a_file_of_such_a_name_in_a_folder_is_read(tmp_path):
    folder: Path = tmp_path / "texts"
    folder.mkdir()
    (folder / BAD).write_text("some text\n")
    corpus = prepare(tmp_path / "out", DataConfig(source=str(folder)))
    assert corpus.info.files == (str(folder / r"caf\xe9"),)


def test_a_folder_whose_replacement_was_killed_gets_its_name_back(tmp_path, monkeypatch):
    """The process is killed between the two renames, or while it removes a folder."""
    with atomic_folder(tmp_path / "kept") as temporary:
        write_text(temporary / "a", "old")
    monkeypatch.setattr("timemix.storage.files.shutil.rmtree", lambda *arguments, **options: None)
    monkeypatch.setattr("timemix.storage.files.appear", failing(errno.EIO))
    with pytest.raises(CannotWrite), atomic_folder(tmp_path / "kept") as temporary:
        write_text(temporary / "a", "new")
    monkeypatch.undo()
    assert not (tmp_path / "kept").exists()
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept/a").read_text() == "old"


def test_a_folder_whose_removal_was_killed_stays_removed(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("timemix.storage.files.shutil.rmtree", lambda *arguments, **options: None)
        remove_folder(tmp_path / "gone")
    assert list(tmp_path.iterdir())
    remove_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket"])
def test_only_regular_files_are_replaced(tmp_path, kind):
    """A rename would replace a pipe or a device by a file."""
    path = tmp_path / "place"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        socket.socket(socket.AF_UNIX).bind(str(path))
    before = path.lstat()
    with pytest.raises(CannotWrite, match="place: it is a folder, a pipe or a device; name a file"):
        write_text(path, "text")
    assert path.lstat() == before
    assert [each.name for each in tmp_path.iterdir()] == ["place"]


def test_a_link_to_a_file_stays_a_link(tmp_path):
    link, target = tmp_path / "link", tmp_path / "folder/target"
    target.parent.mkdir()
    link.symlink_to(target)
    for text in ("one", "two"):
        write_text(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert {each.name for each in tmp_path.rglob("*")} == {"link", "folder", "target"}


def test_bytes_are_appended_whole_or_not_at_all(tmp_path):
    resource = pytest.importorskip("resource", reason="only POSIX limits the size of files")
    path = tmp_path / "lines"
    append(path, b"one\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6, hard))
        with pytest.raises(CannotWrite):
            append(path, b"two\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    append(path, b"three\n")
    assert path.read_bytes() == b"one\nthree\n"


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the system has no tzset")
def test_a_lock_in_a_file_names_the_file_and_not_the_hidden_lock(tmp_path):
    (tmp_path / "file").write_text("")
    for lock in (tmp_path / "file" / ".lock", tmp_path / "file" / "out" / ".lock"):
        with pytest.raises(CannotWrite, match=f"cannot write {lock.parent}:"), claimed(lock):
            pass


def test_a_lock_is_held_in_every_time_zone(tmp_path, monkeypatch):
    lock = FolderLock(tmp_path)
    try:
        for zone in ("UTC", "Asia/Tokyo", "America/Los_Angeles"):
            monkeypatch.setenv("TZ", "UTC")
            time.tzset()
            lock.take()
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            assert is_held(tmp_path)
            lock.release()
            assert not is_held(tmp_path)
    finally:
        monkeypatch.undo()
        time.tzset()
