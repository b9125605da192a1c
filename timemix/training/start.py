"""Runs: a new one from a config, an old one from its newest checkpoint."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from timemix.config.run import RunConfig, check_budget, read_toml, to_toml
from timemix.data.config import DataConfig, TokenizerKind, Unknown
from timemix.data.corpus import Corpus, is_corpus, open_corpus, open_run_corpus
from timemix.data.prepare import prepare
from timemix.errors import AlreadyExists, CannotWrite, DamagedFile, InvalidValue
from timemix.models.config import ModelConfig
from timemix.runs.folder import checkpoints, newest, warn_of_unfinished
from timemix.runs.load import Loaded, empty_model, load
from timemix.runtime.distributed import ALONE, World
from timemix.runtime.progress import ShowProgress, show
from timemix.storage.files import cannot_write, check_name, remove_unfinished, write_text
from timemix.storage.locks import FolderLock
from timemix.storage.settings import from_dict, to_dict
from timemix.training.budget import steps_of_tokens, with_steps
from timemix.training.memory import refuse_too_large
from timemix.training.parallel import check_shares
from timemix.training.saving import fill
from timemix.training.signals import signals_raised
from timemix.training.trainer import Trainer

FIXED = ("batch_size", "contexts", "seed", "optimizer")
"""Settings of training that a resumed run keeps: its data order and its optimizer's state depend on them."""


def new_run(
    config: RunConfig,
    out: Path,
    world: World = ALONE,
    *,
    start: Loaded | None = None,
    progress: ShowProgress = True,
) -> Trainer:
    """Create a run folder: prepare its tokens, count its steps and write config.toml; nothing is trained yet.

    Where `config.start` names a trained model, training starts from its weights, with its tokenizer. The config's
    model must be that model, but for dropout and ctx_len, to which its tables are cut or extended (`Block.resized`).

    Args:
        config: Of the run; seconds or tokens of `train` are replaced by the steps that they allow.
        out: The folder, which must not exist.
        world: The processes of the run.
        start: A model made of that of `config.start`, to begin with instead.
        progress: Shows how far the tokens are prepared, and the counted steps.

    Raises:
        TimemixError: `out` exists, text or start are not supported, or the machine lacks the memory.
    """
    if start is None and config.start is not None:
        start = load(config.start)
    if start is not None:
        _check_start(config.model, start)
    check_shares(config.train, world)
    refuse_too_large(config, world)
    world.first_does(lambda: _make_folder(out))
    try:
        with signals_raised():
            return _begun(config, out, world, start, progress)
    except BaseException:
        if world.first:
            shutil.rmtree(out, ignore_errors=True)
        raise


def _begun(config: RunConfig, out: Path, world: World, start: Loaded | None, progress: ShowProgress) -> Trainer:
    """Fill a new run folder, and return its trainer."""
    lock = world.first_does(lambda: _locked(out))
    corpus = world.first_does(lambda: _corpus(config, out, start, progress))
    corpus = corpus or open_run_corpus(out, config.data.source)
    config = resolved(config, corpus)
    world.first_does(lambda: refuse_too_large(config, world))
    config = with_steps(config, corpus, out, world, lambda sentence: show(progress, sentence))
    world.first_does(lambda: write_text(out / "config.toml", to_toml(config)))
    trainer = Trainer(config, out, corpus, lock, world)
    if start is not None:
        weights = start.model.block.resized(start.model.state_dict(), start.config.model, config.model.ctx_len)
        fill(trainer.model, weights.__getitem__)
        # So that a run killed before its first checkpoint begins with them again.
        trainer.save()
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
    check_name(out)
    try:
        out.mkdir(parents=True)
    except FileExistsError as error:
        raise AlreadyExists(f"{out} exists already; choose another folder, or resume it with resume_run") from error
    except OSError as error:
        raise CannotWrite(cannot_write(out, error)) from error


def _locked(folder: Path) -> FolderLock:
    lock = FolderLock(folder)
    lock.take()
    return lock


def resolved(config: RunConfig, corpus: Corpus) -> RunConfig:
    """The config with what the tokens decide: vocabulary and tokenizer, and where a prepared folder lies."""
    made = corpus.tokenizer
    data = replace(config.data, tokenizer=cast(TokenizerKind, made.kind), unknown=cast(Unknown, made.unknown))
    if is_corpus(Path(data.source)):
        data = replace(data, source=str(Path(data.source).resolve()))
    return replace(config, model=replace(config.model, vocab_size=made.vocab_size), data=data)


def _corpus(config: RunConfig, out: Path, start: Loaded | None, progress: ShowProgress) -> Corpus:
    """Tokens of a run: a prepared folder where it lies, else the text, prepared in the run folder."""
    source = Path(config.data.source)
    tokenizer = None if start is None else start.tokenizer
    if not is_corpus(source):
        return prepare(out / "data", config.data, tokenizer=tokenizer, progress=progress)
    corpus = open_corpus(source)
    for name in ("valid", "valid_fraction", "valid_tokens"):
        if getattr(config.data, name) != getattr(DataConfig, name):
            raise InvalidValue(
                f"data.{name} cannot change what {source} holds out, which is prepared; leave it out, or name the text"
            )
    if tokenizer is not None and corpus.tokenizer.hash != tokenizer.hash:
        raise InvalidValue(
            f"{source} was prepared with another vocabulary than that of {config.start}:"
            f" {corpus.tokenizer.differences(tokenizer)}; name the text instead"
        )
    return corpus


def resume_run(out: Path, world: World = ALONE, train: Mapping[str, Any] | None = None) -> Trainer:
    """A run as its newest checkpoint left it, or at its start where it has none yet.

    Any number of processes can resume a run.

    Args:
        out: The run folder.
        world: The processes of the run.
        train: Settings of training to change from here on, such as `{"steps": 300}`; config.toml then has them. The
            learning rate follows the schedule that the new settings describe. None of `FIXED` can change.

    Raises:
        InUse: Another process works on the run.
        FileError: Something in the folder is missing or damaged, or its data are not those that it began with.
        InvalidValue: A setting cannot change.
    """
    lock = world.first_does(lambda: _take(out))
    try:
        return _resumed(out, world, lock, train or {})
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def _resumed(out: Path, world: World, lock: FolderLock | None, train: Mapping[str, Any]) -> Trainer:
    old = read_toml(out / "config.toml")
    config = _changed(old, train, out)
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
    if trainer.step > config.train.steps:
        raise InvalidValue(
            f"train.steps is {config.train.steps}, but {out} has had {trainer.step} steps; give a larger number"
        )
    world.first_does(trainer.tidy)
    if config != old:
        world.first_does(lambda: write_text(out / "config.toml", to_toml(config)))
    return trainer


def _changed(config: RunConfig, train: Mapping[str, Any], out: Path) -> RunConfig:
    """Return the config of a run with other settings of training."""
    check_budget(train)
    if train.get("seconds") is not None:
        raise InvalidValue(
            f"train.seconds={train['seconds']} is for a new run, whose steps it sets; to resume {out}, give train.steps"
        )
    tables = to_dict(config)
    config = from_dict(RunConfig, tables | {"train": tables["train"] | dict(train)})
    if config.train.tokens is not None:
        config = replace(config, train=replace(config.train, steps=steps_of_tokens(config), tokens=None))
    for name in FIXED:
        if (wanted := getattr(config.train, name)) != (old := tables["train"][name]):
            raise InvalidValue(
                f"train.{name}={wanted} cannot change when {out} is resumed: it has {old}; start a new run from its"
                f" weights instead: timemix train --from {out} --out NEXT"
            )
    return config


def _take(out: Path) -> FolderLock:
    """Holds a run folder, free of what a killed process left half-written."""
    if not (out / "config.toml").exists():
        newest(out)
    lock = FolderLock(out)
    lock.take()
    remove_unfinished(out / "checkpoints")
    warn_of_unfinished(out)
    return lock
