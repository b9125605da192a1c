"""Start of a run: a new run from a config, or an old run from its newest checkpoint."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any, cast

from timemix.config.run import BUDGETS, RunConfig, TrainConfig, check_budget, read_toml, to_toml
from timemix.data.config import DataConfig, Template, TokenizerKind, Unknown
from timemix.data.corpus import Corpus, is_corpus, open_prepared, open_run_corpus
from timemix.data.prepare import prepare
from timemix.errors import AlreadyExists, CannotWrite, DamagedFile, InvalidValue
from timemix.generation.session import Session
from timemix.models.config import ModelConfig
from timemix.runs.folder import (
    check_resumable,
    check_run,
    checkpoints,
    read_progress,
    warn_of_unfinished,
)
from timemix.runs.load import Loaded, empty_model, load, load_start
from timemix.runtime.distributed import ALONE, World
from timemix.runtime.progress import ShowProgress, show
from timemix.storage.files import cannot_write, check_name, remove_unfinished, write_text
from timemix.storage.locks import FolderLock
from timemix.storage.settings import from_dict, to_dict
from timemix.training.budget import with_counted_steps, with_steps
from timemix.training.carried import check_documents
from timemix.training.memory import memory_note, refuse_too_large
from timemix.training.parallel import check_shares
from timemix.training.signals import signals_raised
from timemix.training.trainer import Trainer
from timemix.training.tuning import fill_start, first_state, hash_released, with_frozen

FIXED = ("batch_size", "contexts", "seed", "optimizer", "tune", "lora_rank", "lora_alpha", "lora_modules")
"""Settings that cannot change when a run is resumed, because the data order or the optimizer state depends on them."""

WITHOUT_EFFECT = (
    "valid",
    "valid_fraction",
    "valid_tokens",
    "hold_out",
    "keep_nul",
    "text_key",
    "end_of_text",
    "shuffle",
    "drop_duplicates",
    "vocab_size",
    "vocabulary",
)
"""Settings of how a text is prepared, which have no effect on a folder that is prepared already."""


def new_run(
    config: RunConfig,
    out: Path,
    world: World = ALONE,
    *,
    start: Loaded | None = None,
    progress: ShowProgress = True,
) -> Trainer:
    """Create a run folder: prepare the tokens, count the steps and write config.toml, without training yet.

    If `config.start` names a trained model, training starts from its weights, with its tokenizer. `config.model` must
    equal the config of the trained model, except for dropout and ctx_len. `Block.resized` cuts or extends the tables of
    the trained model to ctx_len. With `config.start_state`, the learned state begins with the state of a session.

    Args:
        config: Config of the run. The resulting number of steps replaces `train.seconds`, `train.tokens` or
            `train.epochs`.
        out: Run folder, which must not exist.
        world: The processes of the run.
        start: A model to start from in place of `config.start`, such as a converted model.
        progress: Whether to show progress and the number of steps on standard error, or a function for the messages.

    Returns:
        A trainer at step 0, which holds the lock of the folder.

    Raises:
        AlreadyExists: `out` exists.
        InvalidValue: A setting, the text or the starting model is not supported.
        Unavailable: The machine lacks the device or the memory.
        TimemixError: The run cannot start for another reason, such as a damaged file or a full disk.
    """
    if not config.data.source:
        raise InvalidValue("data.source is missing, because imported weights have no text; name a text")
    if start is None:
        _check_length(config.train)
        start = None if config.start is None else load(config.start, mapped=True)
    if start is not None:
        _check_start(config.model, start)
    session = first_state(config, start)
    config = with_frozen(config, start)
    check_shares(config.train, world)
    check_documents(config, world)
    # Free memory differs between the processes, so a single process may refuse the run.
    world.all_check(lambda: refuse_too_large(config, world))
    world.first_does(lambda: _make_folder(out))
    try:
        with signals_raised():
            return _begun(config, out, world, start, session, progress)
    except BaseException:
        if world.first:
            shutil.rmtree(out, ignore_errors=True)
        raise


def _begun(
    config: RunConfig, out: Path, world: World, start: Loaded | None, session: Session | None, progress: ShowProgress
) -> Trainer:
    """Fill a new run folder, and return its trainer."""
    lock = world.first_does(lambda: _locked(out))
    corpus = world.first_does(lambda: _corpus(config, out, start, progress))
    corpus = corpus or open_run_corpus(out, config.data.source)
    config = resolved(config, corpus)
    world.first_does(lambda: refuse_too_large(config, world))
    if start is not None and (note := memory_note(start, config, world)):
        world.first_does(lambda: show(progress, note))
    config = with_steps(config, corpus, out, world, lambda sentence: show(progress, sentence))
    trainer = Trainer(config, out, corpus, lock, world)
    if start is not None:
        fill_start(trainer, start, session)
        # With this checkpoint, a run that is killed before its next checkpoint can start from the same weights again.
        trainer.save()
    # A folder with config.toml can be resumed, so this file comes last.
    world.first_does(lambda: write_text(out / "config.toml", to_toml(config)))
    return trainer


def _check_length(train: TrainConfig) -> None:
    """Check that a new run has at least 1 step. Only a converted run without fine-tuning has 0 steps."""
    if not any(getattr(train, name) for name in BUDGETS):
        raise InvalidValue("train.steps is 0; give a new run at least 1 step")


def _check_start(model: ModelConfig, start: Loaded) -> None:
    ours, theirs = to_dict(model), to_dict(start.config.model)
    for name in sorted((ours.keys() | theirs.keys()) - {"ctx_len", "dropout", "vocab_size", "initial"}):
        if ours.get(name) != theirs.get(name):
            raise InvalidValue(
                f"model.{name}={ours.get(name)!r} differs from {theirs.get(name)!r} in {start.folder};"
                f" leave model.{name} out: only ctx_len and dropout may differ"
            )


def _make_folder(out: Path) -> None:
    check_name(out)
    try:
        out.mkdir(parents=True)
    except FileExistsError as error:
        raise AlreadyExists(f"{out} exists already; choose another folder, or resume the run in it") from error
    except OSError as error:
        raise CannotWrite(cannot_write(out, error)) from error


def _locked(folder: Path) -> FolderLock:
    lock = FolderLock(folder)
    lock.take()
    return lock


def resolved(config: RunConfig, corpus: Corpus) -> RunConfig:
    """Return the config, completed with the fields that the tokens determine.

    The tokens determine the vocabulary size, the tokenizer, the chat template and, for a prepared folder, its absolute
    path.
    """
    made = corpus.tokenizer
    data = replace(
        config.data,
        tokenizer=cast(TokenizerKind, made.kind),
        unknown=cast(Unknown, made.unknown),
        template=cast(Template | None, corpus.info.template),
    )
    if is_corpus(Path(data.source)):
        data = replace(data, source=str(Path(data.source).resolve()))
    return replace(config, model=replace(config.model, vocab_size=made.vocab_size), data=data)


def _corpus(config: RunConfig, out: Path, start: Loaded | None, progress: ShowProgress) -> Corpus:
    """Open the prepared folder that is the source of a run, or prepare the source text in the run folder."""
    source = Path(config.data.source)
    tokenizer = None if start is None else start.tokenizer
    if not is_corpus(source):
        return prepare(out / "data", config.data, tokenizer=tokenizer, progress=progress)
    corpus = open_prepared(config.data)
    for name in WITHOUT_EFFECT:
        # Old files name the place `end` of the held-out share.
        if getattr(config.data, name) not in (getattr(DataConfig, name), "end"):
            raise InvalidValue(
                f"data.{name} has no effect on {source}, which is prepared; leave data.{name} out, or name the text"
                " instead"
            )
    if tokenizer is not None and corpus.tokenizer.hash != tokenizer.hash:
        raise InvalidValue(
            f"the vocabulary of {source} is not that of {config.start}: {corpus.tokenizer.differences(tokenizer)};"
            " name the text instead of the prepared folder"
        )
    return corpus


def resume_run(out: Path, world: World = ALONE, train: Mapping[str, Any] | None = None) -> Trainer:
    """Return a trainer at the newest checkpoint of a run, or at step 0 if the run has none.

    The number of processes may differ from the number of processes that started the run.

    Args:
        out: The run folder.
        world: The processes of the run.
        train: Settings of training to change in the resumed run, such as `{"steps": 300}`. The new settings
            are saved in config.toml, and determine the schedule of the learning rate. The settings of `FIXED` cannot
            change.

    Returns:
        A trainer, which holds the lock of the folder.

    Raises:
        InUse: Another process works on the run.
        FileError: A file of the run is missing or damaged, or the data have changed since the run started.
        InvalidValue: A setting cannot change, or has an unsupported value.
        Unavailable: The machine lacks the device or the memory.
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
    if not old.data.source:
        raise InvalidValue(
            f"{out} cannot be resumed, because its weights were imported without a text; fine-tune the model on a text:"
            f" timemix train --from {quote(str(out))} --data TEXT --out NEXT"
        )
    corpus = open_run_corpus(out, old.data.source)
    config = _changed(old, train, out, len(corpus.train))
    if corpus.tokenizer.vocab_size != config.model.vocab_size:
        raise DamagedFile(
            f"the vocabulary of the data of {out} has {corpus.tokenizer.vocab_size} tokens, but its config.toml names"
            f" {config.model.vocab_size}; restore both from one copy"
        )
    saved = checkpoints(out)
    if saved and config.train.tune == "all":
        # Check the weights first, because a damaged config.toml may name a model size that takes too much memory.
        empty_model(config.model, saved[-1])
    # Free memory differs between the processes, so a single process may refuse the run.
    world.all_check(lambda: refuse_too_large(config, world))
    start = None
    if config.train.tune != "all":
        known = read_progress(saved[-1]).data.get("start") if saved else None
        start = load_start(config, known, mapped=True)
        hash_released(start)
    trainer = Trainer(config, out, corpus, lock, world)
    if start is not None:
        fill_start(trainer, start)
    if saved:
        trainer.restore(saved[-1])
    if trainer.step > config.train.steps:
        raise InvalidValue(
            f"train.steps={config.train.steps} is less than the {trainer.step} steps that {out} has finished;"
            " give a larger number"
        )
    world.first_does(trainer.tidy)
    if config != old:
        world.first_does(lambda: write_text(out / "config.toml", to_toml(config)))
    return trainer


def _changed(config: RunConfig, train: Mapping[str, Any], out: Path, training_tokens: int) -> RunConfig:
    """Return the config of a run of `training_tokens` training tokens, with changed settings of training."""
    check_budget(train)
    if train.get("seconds") is not None:
        raise InvalidValue(
            f"train.seconds={train['seconds']} cannot be given to resume {out}: it sets the steps of a new run;"
            " give train.steps"
        )
    tables = to_dict(config)
    config = from_dict(RunConfig, tables | {"train": tables["train"] | dict(train)})
    config, _ = with_counted_steps(config, training_tokens)
    for name in FIXED:
        if (wanted := getattr(config.train, name)) != (old := tables["train"][name]):
            wanted, old = (" ".join(each) if isinstance(each, tuple) else each for each in (wanted, old))
            raise InvalidValue(
                f"train.{name}={wanted} cannot change when {out} is resumed: the run has {old}; start a new run from"
                f" its weights instead: timemix train --from {quote(str(out))} --out NEXT"
            )
    return config


def _take(out: Path) -> FolderLock:
    """Take the lock of a run folder, and remove files that a killed process left unfinished."""
    check_run(out)
    lock = FolderLock(out)
    lock.take()
    try:
        remove_unfinished(out / "checkpoints")
        check_resumable(out, read_toml(out / "config.toml").start)
    except BaseException:
        lock.release()
        raise
    warn_of_unfinished(out)
    return lock
