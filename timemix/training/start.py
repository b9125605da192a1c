"""Runs: a new one from a config, an old one from its newest checkpoint."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

from timemix.config.run import RunConfig, read_toml, to_toml
from timemix.data.config import TokenizerKind, Unknown
from timemix.data.corpus import Corpus, is_corpus, open_corpus, open_run_corpus
from timemix.data.prepare import prepare
from timemix.errors import AlreadyExists, CannotWrite, DamagedFile, InvalidValue
from timemix.models.config import ModelConfig
from timemix.runs.folder import checkpoints, newest, warn_of_unfinished
from timemix.runs.load import Loaded, empty_model, load
from timemix.runtime.distributed import ALONE, World
from timemix.storage.files import cannot_write, remove_unfinished, write_text
from timemix.storage.locks import FolderLock
from timemix.storage.settings import to_dict
from timemix.training.memory import refuse_too_large
from timemix.training.saving import fill
from timemix.training.trainer import Trainer, check_shares, run_batches


def new_run(config: RunConfig, out: Path, world: World = ALONE, *, start: Loaded | None = None) -> "Trainer":
    """Run folder `out` for a config: prepares its tokens and writes config.toml; nothing is trained yet.

    Where `config.start` names a trained model, training starts from its weights, with its tokenizer. The config's
    model must be that model, but for dropout and ctx_len, to which its tables are cut or extended (`Block.resized`).
    `start`: a model made of it, to begin with instead.

    Raises TimemixError when `out` exists, text or start are not supported, or the machine lacks the memory.
    """
    if start is None and config.start is not None:
        start = load(config.start)
    if start is not None:
        _check_start(config.model, start)
    check_shares(config.train, world)
    refuse_too_large(config, world)
    world.first_does(lambda: _make_folder(out))
    try:
        made = world.first_does(lambda: _fill_folder(config, out, start, world))
        if made is None:
            made = read_toml(out / "config.toml"), out, open_run_corpus(out, config.data.source), None
        trainer = Trainer(*made, world)
        if start is not None:
            weights = start.model.block.resized(start.model.state_dict(), start.config.model, config.model.ctx_len)
            fill(trainer.model, weights.__getitem__)
            # So that a run killed before its first checkpoint begins with them again.
            trainer.save()
    except BaseException:
        if world.first:
            shutil.rmtree(out, ignore_errors=True)
        raise
    return trainer


def _check_start(model: ModelConfig, start: Loaded) -> None:
    ours, theirs = to_dict(model), to_dict(start.config.model)
    for name in sorted((ours.keys() | theirs.keys()) - {"ctx_len", "dropout", "vocab_size", "initial"}):
        if ours.get(name) != theirs.get(name):
            raise InvalidValue(
                f"model.{name}={ours.get(name)!r} is not that of {start.folder}, {theirs.get(name)!r}; leave it out:"
                " only ctx_len and dropout may differ"
            )


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True)
    except FileExistsError as error:
        raise AlreadyExists(f"{out} exists already; choose another folder, or resume it with resume_run") from error
    except OSError as error:
        raise CannotWrite(cannot_write(out, error)) from error


def _fill_folder(
    config: RunConfig, out: Path, start: Loaded | None, world: World
) -> tuple[RunConfig, Path, Corpus, FolderLock | None]:
    """Prepares the tokens of a run and writes its config."""
    lock = FolderLock(out)
    lock.take()
    corpus = _corpus(config, out, start)
    config = resolved(config, corpus)
    run_batches(config, corpus)
    refuse_too_large(config, world)
    write_text(out / "config.toml", to_toml(config))
    return config, out, corpus, lock


def resolved(config: RunConfig, corpus: Corpus) -> RunConfig:
    """The config with what the tokens decide: vocabulary and tokenizer, and where a prepared folder lies."""
    made = corpus.tokenizer
    data = replace(config.data, tokenizer=cast(TokenizerKind, made.kind), unknown=cast(Unknown, made.unknown))
    if is_corpus(Path(data.source)):
        data = replace(data, source=str(Path(data.source).resolve()))
    return replace(config, model=replace(config.model, vocab_size=made.vocab_size), data=data)


def _corpus(config: RunConfig, out: Path, start: Loaded | None) -> Corpus:
    """Tokens of a run: a prepared folder where it lies, else the text, prepared in the run folder."""
    source = Path(config.data.source)
    tokenizer = None if start is None else start.tokenizer
    if not is_corpus(source):
        return prepare(out / "data", config.data, tokenizer=tokenizer, progress=True)
    corpus = open_corpus(source)
    if tokenizer is not None and corpus.tokenizer.hash != tokenizer.hash:
        raise InvalidValue(
            f"{source} was prepared with another vocabulary than that of {config.start}:"
            f" {corpus.tokenizer.differences(tokenizer)}; name the text instead"
        )
    return corpus


def resume_run(out: Path, world: World = ALONE) -> "Trainer":
    """A run as its newest checkpoint left it, or at its start where it has none yet.

    Any number of processes can resume a run. Raises InUse when another process works on the run,
    FileError when something in the folder is missing or damaged, or its data are not those it began with.
    """
    lock = world.first_does(lambda: _take(out))
    config = read_toml(out / "config.toml")
    corpus = open_run_corpus(out, config.data.source)
    if corpus.tokenizer.vocab_size != config.model.vocab_size:
        raise DamagedFile(f"the data of {out} have another vocabulary than its config.toml")
    saved = checkpoints(out)
    if saved:
        # Before a model of the size that config.toml names is made.
        empty_model(config.model, saved[-1])
    refuse_too_large(config, world)
    trainer = Trainer(config, out, corpus, lock, world)
    if saved:
        trainer.restore(saved[-1])
    world.first_does(trainer.tidy)
    return trainer


def _take(out: Path) -> FolderLock:
    """Holds a run folder, free of what a killed process left half-written."""
    if not (out / "config.toml").exists():
        newest(out)
    lock = FolderLock(out)
    lock.take()
    remove_unfinished(out / "checkpoints")
    warn_of_unfinished(out)
    return lock
