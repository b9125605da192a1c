"""Datasets of Hugging Face as sources: names on the Hub, and local folders, read by the package datasets.

A dataset on the Hub is streamed once. Its texts are saved as a Parquet file in the cache of timemix, which later
readings use. The file belongs to one commit of the dataset, so each reading gives the same text.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from timemix.data.datasets_package import Unreachable, opened_datasets
from timemix.data.readers import CHUNK
from timemix.data.records import DEFAULT_KEY, is_text_type, parquet, record_text
from timemix.errors import DamagedFile, FileError, InvalidValue, MissingFile, nearest
from timemix.runtime.cache import cache_folder
from timemix.runtime.progress import ShowProgress, meter
from timemix.storage.files import atomic_file, write_text
from timemix.storage.json_files import parse_json

logger = logging.getLogger("timemix")

PREFIX = "hf:"
"""Beginning of a source that is a dataset of Hugging Face."""
TRAIN, VALID = "train", "validation"
"""Split that is read unless the source names another split, and the split that is then the validation text."""
TIMEOUT = 10.0
"""Number of seconds without an answer after which the Hub counts as unreachable."""


@dataclass(frozen=True)
class Split:
    """A split of a dataset, whose texts can be read any number of times."""

    name: str
    """Name of the dataset, for messages."""
    reference: str
    """Source that names exactly this text: dataset, commit, config and split."""
    size: int
    """Number of bytes to read. For a local folder, the size of all its files."""
    texts: Callable[[Callable[[float], object]], Iterator[str]]
    """Function that yields the texts. Its argument is a function that receives the share that was read so far."""


@dataclass(frozen=True)
class Reference:
    """The parts of a source `hf:NAME[@REVISION][:CONFIG][:SPLIT]`. A part that is left out is None."""

    place: str
    """Name of the dataset on the Hub, or path of a folder."""
    is_folder: bool
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        place = self.place + (f"@{self.revision}" if self.revision else "")
        parts = [place, self.config or "", self.split or ""]
        return PREFIX + ":".join(parts).rstrip(":")

    def opened(self) -> contextlib.AbstractContextManager[Any]:
        """Open the package datasets, with this source in the messages of its errors."""
        return opened_datasets(str(self), self.place, self.revision)


def parsed(source: str) -> Reference:
    """Return the parts of a source that begins with PREFIX.

    Raises:
        InvalidValue: The source names no dataset, or has too many parts.
        MissingFile: The source is the path of a folder that does not exist.
    """
    whole = os.path.expanduser(source.removeprefix(PREFIX))
    parts = whole.split(":")
    for count in range(min(3, len(parts))):
        # The name of a folder may contain colons.
        folder, rest = ":".join(parts[: len(parts) - count]), parts[len(parts) - count :]
        if os.path.isdir(folder):
            config, split = (*rest, "", "")[:2]
            return Reference(folder, True, None, config or None, split or None)
    place, *rest = parts
    if os.path.exists(place) or place.startswith((".", "/")):
        raise MissingFile(f"{source} names {place}, which is not a folder; name a folder or a dataset on the Hub")
    name, _, revision = place.partition("@")
    if not name or len(rest) > 2:
        raise InvalidValue(f"{source!r} names no dataset; write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    config, split = (*rest, "", "")[:2]
    return Reference(name, False, revision or None, config or None, split or None)


def open_dataset(
    source: str, key: str | None, cache: Path | None, progress: ShowProgress
) -> tuple[Split, Split | None]:
    """Open a dataset, and save its texts in the cache if it is on the Hub.

    Args:
        source: `hf:NAME[@REVISION][:CONFIG][:SPLIT]`, with the path of a folder or the name of a dataset on the Hub.
        key: Name of the column with the texts; None: DEFAULT_KEY.
        cache: Folder of the cache. Default: the cache folder of the user.
        progress: Whether to show the progress of a download on standard error, or a function for progress lines.

    Returns:
        The split that the source names, TRAIN by default, and its validation text. The validation text is the split
        VALID if the dataset has this split and the source names no split, otherwise None.

    Raises:
        InvalidValue: The dataset has no such config, split or column, or a row has no text.
        MissingFile: The dataset or the folder does not exist.
        DamagedFile: The package datasets cannot read the dataset.
        Unavailable: The package datasets is not installed, the Hub does not answer, or the dataset needs a login.
    """
    reference = parsed(source)
    key = key or DEFAULT_KEY
    if reference.is_folder:
        return _local(reference, key)
    return _remote(reference, key, cache or cache_folder(), progress)


def _local(reference: Reference, key: str) -> tuple[Split, Split | None]:
    size = sum(path.stat().st_size for path in Path(reference.place).rglob("*") if path.is_file())
    with reference.opened() as datasets:
        splits = _splits(datasets, reference)

    def opened(split: str) -> Split:
        own = replace(reference, split=split)
        return Split(str(own), str(own), size, partial(_texts, own, splits[split], key, size))

    train, valid = _chosen(reference, list(splits))
    return opened(train), None if valid is None else opened(valid)


def _remote(reference: Reference, key: str, cache: Path, progress: ShowProgress) -> tuple[Split, Split | None]:
    folder = cache / "hugging_face" / reference.place.replace("/", "--")
    revision = reference.revision
    is_commit = revision is not None and re.fullmatch("[0-9a-f]{40}", revision)
    if is_commit and (found := _saved(reference, folder / str(revision), key)):
        return found
    try:
        commit = _commit(reference)
    except Unreachable as error:
        for saved in sorted(folder.glob("*/"), key=os.path.getmtime, reverse=True) if revision is None else []:
            if found := _saved(reference, saved, key):
                reason = str(error).partition(";")[0]
                logger.warning("%s; reading the texts of commit %s, which are in the cache", reason, saved.name)
                return found
        raise
    if found := _saved(reference, folder / commit, key):
        return found
    with reference.opened() as datasets:
        splits = _splits(datasets, reference, commit)
    for split in filter(None, _chosen(reference, list(splits))):
        own = replace(reference, split=split)
        path = _path(folder / commit, own, key)
        if not path.exists():
            pinned = replace(own, revision=commit)
            _save(path, _texts(own, splits[split], key, 0), str(pinned), progress)
    write_text(_path(folder / commit, reference), json.dumps(list(splits)))
    found = _saved(reference, folder / commit, key)
    if found is None:
        raise DamagedFile(f"{folder / commit} was changed during the download of {reference}; try again")
    return found


def _path(folder: Path, reference: Reference, key: str | None = None) -> Path:
    """Return the path of the texts of a split, or without a key, of the list of all splits."""
    names = [reference.config or "default"] + ([] if key is None else [reference.split or TRAIN, key])
    # A double dash separates the names, so a quoted name has no dash.
    name = "--".join(quote(name, safe="").replace("-", "%2D") for name in names)
    return folder / f"{name}.{'json' if key is None else 'parquet'}"


def _saved(reference: Reference, folder: Path, key: str) -> tuple[Split, Split | None] | None:
    """Return the split that a source names and its validation text, or None if they are not in the cache.

    Args:
        reference: The source.
        folder: Folder of a commit in the cache. The name of the folder is the commit.
        key: Name of the column with the texts.
    """
    try:
        splits = [str(name) for name in parse_json(_path(folder, reference))]
    except FileError:
        return None
    found: list[Split | None] = []
    for split in _chosen(reference, splits):
        own = replace(reference, revision=folder.name, split=split)
        path = _path(folder, own, key)
        if split is not None and not path.exists():
            return None
        read = partial(_cached_texts, path)
        found.append(None if split is None else Split(own.place, str(own), path.stat().st_size, read))
    train, valid = found
    return None if train is None else (train, valid)


def _cached_texts(path: Path, advance: Callable[[float], object]) -> Iterator[str]:
    """Yield the texts of a file in the cache."""
    try:
        yield from parquet(path, DEFAULT_KEY, None, advance)
    except DamagedFile as error:
        raise DamagedFile(f"{path} is damaged; delete it to download the dataset again") from error


def _commit(reference: Reference) -> str:
    """Return the commit of a dataset on the Hub."""
    with reference.opened() as datasets:
        from huggingface_hub import HfApi

        hub = HfApi(endpoint=datasets.config.HF_ENDPOINT)
        return str(hub.dataset_info(reference.place, revision=reference.revision, timeout=TIMEOUT).sha)


def _splits(datasets: Any, reference: Reference, commit: str | None = None) -> dict[str, Any]:
    """Return the splits of a dataset by name, without reading their rows.

    Args:
        datasets: The module datasets.
        reference: The source.
        commit: Commit of a dataset on the Hub.
    """
    # The package datasets takes the name of a dataset from the last part of its path, which "." does not have.
    place = os.path.abspath(reference.place) if reference.is_folder else reference.place
    if reference.is_folder and any(
        os.path.isfile(os.path.join(place, name)) for name in ("dataset_dict.json", "state.json")
    ):
        if reference.config is not None:
            raise InvalidValue(
                f"{reference} names a config, but it has none; for a split, write hf:{reference.place}::SPLIT"
            )
        found = datasets.load_from_disk(place)
        return dict(found) if isinstance(found, dict) else {TRAIN: found}
    try:
        builder = datasets.load_dataset_builder(place, reference.config, revision=commit)
        if hasattr(builder.config, "fragment_scan_options"):
            from pyarrow.dataset import ParquetFragmentScanOptions

            # Otherwise, a Parquet file is held in memory while it is read.
            builder.config.fragment_scan_options = ParquetFragmentScanOptions(pre_buffer=False)
        return dict(builder.as_streaming_dataset())
    except ValueError as error:
        configs = datasets.get_dataset_config_names(place, revision=commit)
        if reference.config in configs or (configs == ["default"] and reference.config is None):
            raise
        if reference.config is None:
            raise InvalidValue(
                f"{reference} has several configs: {', '.join(configs)}; write one of them, as in"
                f" {PREFIX}{reference.place}:{configs[0]}"
            ) from error
        raise InvalidValue(
            f"{reference} has no config {reference.config!r}{nearest(reference.config, configs)}; for a split, write"
            f" {PREFIX}{reference.place}::SPLIT"
        ) from error


def _chosen(reference: Reference, splits: list[str]) -> tuple[str, str | None]:
    """Return the name of the split to read, and the name of the split with its validation text."""
    split = reference.split or TRAIN
    if split not in splits:
        example = replace(reference, split=splits[0])
        raise InvalidValue(f"{reference} has no split {split!r}; its splits: {', '.join(splits)}; write one: {example}")
    return split, VALID if reference.split is None and VALID in splits else None


def _texts(
    reference: Reference, rows: Any, key: str, size: int, advance: Callable[[float], object] = lambda share: None
) -> Iterator[str]:
    """Yield the text of each row of a split.

    Args:
        reference: The split, for messages.
        rows: A Dataset or an IterableDataset.
        key: Name of the column.
        size: Number of bytes of the dataset, from which the share that was read so far is estimated.
        advance: Function that receives this share.
    """
    done = characters = 0
    with reference.opened():
        if rows.column_names is not None:
            _check_column(reference, rows.column_names, key)
            rows = rows.select_columns([key])
        for table in rows.with_format("arrow").iter(batch_size=1024):
            _check_column(reference, table.column_names, key)
            column = table.column(key)
            # A column whose rows of one batch are all null has the type null.
            if str(column.type) != "null" and not is_text_type(column.type):
                raise InvalidValue(
                    f"{reference} has the column {key!r} of type {column.type}; it must be a column of texts"
                )
            for row, text in enumerate(column.to_pylist(), done + 1):
                yield record_text({key: text}, key, f"{reference}, row {row},")
                characters += len(text)
            done += table.num_rows
            advance(min(1.0, characters / max(1, size)))


def _check_column(reference: Reference, names: list[str], key: str) -> None:
    if key not in names:
        raise InvalidValue(f"{reference} has no column {key!r}{nearest(key, names)}; set data.text_key")


def _save(path: Path, texts: Iterator[str], what: str, progress: ShowProgress) -> None:
    """Save texts in a Parquet file with one column, DEFAULT_KEY."""
    import pyarrow
    from pyarrow import parquet as format_

    kind = pyarrow.schema([(DEFAULT_KEY, pyarrow.large_string())])
    with (
        meter(progress, f"downloading {what}", 0, None) as advance,
        atomic_file(path) as temporary,
        format_.ParquetWriter(temporary, kind, compression="zstd", use_dictionary=False) as writer,
    ):
        done = characters = 0
        group: list[str] = []

        def write() -> None:
            nonlocal done, characters
            writer.write_table(pyarrow.table({DEFAULT_KEY: group}, schema=kind))
            done, characters = done + characters, 0
            group.clear()
            advance(done)

        for text in texts:
            group.append(text)
            characters += len(text)
            if characters >= 8 * CHUNK:
                write()
        write()
