"""The cache folder of the user, also without a home folder."""

from pathlib import Path

import pytest

from tests.helpers.users import without_home
from timemix.cli.main import main
from timemix.runtime.cache import cache_folder


def test_the_environment_sets_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "timemix"


def test_a_download_without_a_home_is_refused_in_one_sentence(monkeypatch, tmp_path, capsys):
    without_home(monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["data", "tinyshakespeare", "--out", "tokens"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error == (
        "timemix: the cache folder cannot be found, since this user has no home folder;"
        " set XDG_CACHE_HOME to a folder\n"
    )
    assert not list(Path.cwd().iterdir())
