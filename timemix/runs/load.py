"""Loading of trained models from run folders and checkpoints, with checks that the files belong together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from timemix.config.run import RunConfig, read_toml
from timemix.data.corpus import Corpus, open_run_corpus
from timemix.errors import DamagedFile, MissingFile
from timemix.models.config import ModelConfig
from timemix.models.hashes import model_hash
from timemix.models.language_model import LanguageModel
from timemix.models.layers.lora import with_lora
from timemix.runs.folder import read_checkpoint, read_progress
from timemix.runs.tuning import frozen_weights, prepare, trained
from timemix.runtime.device import choose_device
from timemix.storage.sharded import open_stored
from timemix.tokenizers.base import Tokenizer
from timemix.tokenizers.make import load_tokenizer


@dataclass(repr=False)
class Loaded:
    """A trained model with its tokenizer and the config of its run.

    Args:
        model: The model.
        tokenizer: The tokenizer of the model.
        config: The config of the run.
        folder: The checkpoint folder from which the model was loaded.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    config: RunConfig
    folder: Path

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        return f"Loaded({self.config.model.arch}, {parameters:,} parameters, from {str(self.folder)!r})"

    def corpus(self) -> Corpus:
        """Open the tokens on which the model was trained and validated.

        Raises:
            InvalidValue: The run has no text, because its weights were imported.
            MissingFile: The tokens do not exist.
            DamagedFile: A file is damaged, or the tokens have changed since training.
        """
        run = self.folder.parent.parent
        corpus = open_run_corpus(run, self.config.data.source)
        if corpus.tokenizer.hash != self.tokenizer.hash:
            raise DamagedFile(
                f"the data of {run} have another tokenizer than the model in {self.folder}; restore them from a copy"
            )
        progress = self.folder / "training.json"
        known = read_progress(self.folder).data.get("valid") if progress.exists() else None
        if known not in (None, corpus.info.valid.sha256):
            raise DamagedFile(f"the held-out text of {run} has changed since training; restore its data from a copy")
        return corpus


def check_weights(model: LanguageModel, folder: Path) -> None:
    """Check that the weights of a checkpoint have the names, shapes and types of the trained parameters of a model.

    The check reads no weights.

    Args:
        model: The model, which may be on the "meta" device.
        folder: The checkpoint.

    Raises:
        DamagedFile: The names, shapes or types of the weights do not match the model.
    """
    ours = trained(model)
    with open_stored(folder, "model") as stored:
        if other := sorted(stored.shapes.keys() ^ ours.keys()):
            where = "missing in the file" if other[0] in ours else "only in the file"
            raise DamagedFile(
                f"{stored.path} does not have the architecture of its config.toml: {other[0]} is {where};"
                " restore both from one copy"
            )
        for name, own in ours.items():
            if not stored.fits(name, own.shape):
                raise DamagedFile(
                    f"{stored.path} does not fit its config.toml: {name} is {stored.dtype(name)}"
                    f" {list(stored.shapes[name])}, not {list(own.shape)}; restore both from one copy"
                )


def empty_model(config: ModelConfig, folder: Path) -> LanguageModel:
    """Return the model of a config on the "meta" device, and check that the weights fit the model.

    On the "meta" device, tensors take no memory. So a damaged config cannot cause a large allocation.

    Args:
        config: Config of the model.
        folder: The checkpoint.

    Raises:
        DamagedFile: The names, shapes or types of the weights do not match the model.
    """
    with open_stored(folder, "model") as stored:
        layers = len({name.split(".")[1] for name in stored.shapes if name.startswith("blocks.")})
    if layers != config.layers:
        raise DamagedFile(
            f"{stored.path} does not fit its config.toml: it has {layers} layers, not {config.layers};"
            " restore both from one copy"
        )
    with torch.device("meta"):
        model = LanguageModel(config)
    check_weights(model, folder)
    return model


def load(run: str | Path, *, checkpoint: str | int = "best", device: str = "cpu", mapped: bool = False) -> Loaded:
    """Load a trained model with its tokenizer and config.

    Args:
        run: Run folder, or a checkpoint folder.
        checkpoint: "best" (lowest validation loss), "newest", or a step. `checkpoint` has no effect if `run` is a
            checkpoint folder.
        device: PyTorch device, such as "cpu" or "cuda:1".
        mapped: Whether the weights may stay mapped from their file, in the types of the file, which saves memory. Such
            a model is for `Engine` and `build_step`, which copy the weights in the format of generation. While the
            model is in use, its file must not be overwritten. Only a model on the CPU, in one file, without weights in
            float64, is mapped.

    Returns:
        The model in eval mode, with the tokenizer, the config and the checkpoint folder.

    Raises:
        MissingFile: The run or the checkpoint does not exist.
        DamagedFile: A file is damaged, or the files do not belong together.
        Unavailable: The device does not exist on this machine.
    """
    where, _ = choose_device(device)
    return read_checkpoint(run, checkpoint, lambda folder: _loaded(folder, where, mapped))


def _loaded(folder: Path, device: torch.device, mapped: bool) -> Loaded:
    config = read_toml(folder / "config.toml")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if tokenizer.vocab_size != config.model.vocab_size:
        raise DamagedFile(
            f"{folder / 'tokenizer.json'} is not the tokenizer of this model: it has {tokenizer.vocab_size} tokens, not"
            f" {config.model.vocab_size}; restore it from a copy"
        )
    progress = folder / "training.json"
    known = read_progress(folder).data.get("tokenizer") if progress.exists() else None
    if known not in (None, tokenizer.hash):
        raise DamagedFile(
            f"{folder / 'tokenizer.json'} is damaged: its content differs from its hash; restore it from a copy"
        )
    if config.train.tune != "all":
        return Loaded(_tuned(folder, config, device, mapped=mapped).eval(), tokenizer, config, folder)
    model = empty_model(config.model, folder)
    with open_stored(folder, "model") as stored:
        stored.check_content()
        weights = {name: stored.tensor(name) for name in model.state_dict()}
        # A decode step needs weights of float32 or less.
        is_wide = any(x.dtype == torch.float64 for x in weights.values())
        model.is_mapped = mapped and device.type == "cpu" and stored.is_mapped and not is_wide
        if not model.is_mapped:
            # The content of mapped memory changes with the file, so the tensors are copied.
            dtype = torch.float64 if config.train.precision == "float64" else torch.float32
            weights = {name: x.to(device, dtype, copy=True) for name, x in weights.items()}
    model.load_state_dict(weights, assign=True)
    return Loaded(model.eval(), tokenizer, config, folder)


def load_start(config: RunConfig, known: str | None = None, **options: Any) -> Loaded:
    """Load the model whose weights a run keeps frozen (`train.tune`).

    Args:
        config: Config of the run, whose `start` names a checkpoint.
        known: Hash of the model when the run began; None: no check.
        **options: Arguments of `load`.

    Raises:
        MissingFile: The checkpoint does not exist.
        DamagedFile: The checkpoint is damaged, or its weights have changed since the run began.
    """
    start = str(config.start)
    if not Path(start).is_dir():
        raise MissingFile(
            f"the frozen weights of this run do not exist: {start} is missing; restore the folder, or write its new"
            " place as start into the config.toml of the run and of its checkpoints"
        )
    loaded = load(start, **options)
    if known is not None and model_hash(loaded.model) != known:
        raise DamagedFile(f"the weights in {start} have changed since they were tuned; restore them from a copy")
    return loaded


def _tuned(folder: Path, config: RunConfig, device: torch.device, *, mapped: bool) -> LanguageModel:
    """Return the model of a run that trains a state or low-rank terms beside the weights of another run."""
    is_state = config.train.tune == "state"
    known = read_progress(folder).data.get("start")
    start = load_start(config, known, device=str(device), mapped=mapped and is_state)
    weights = start.model.block.resized(start.model.state_dict(), start.config.model, config.model.ctx_len)
    with torch.device("meta"):
        model, plain = LanguageModel(config.model), LanguageModel(config.model)
        prepare(model, config.train)
    check_weights(model, folder)
    # A state is in at least float32.
    dtype = torch.promote_types(weights["head.weight"].dtype, torch.float32)
    with open_stored(folder, "model") as stored:
        stored.check_content()
        own = {name: stored.tensor(name).to(device, dtype, copy=True) for name in trained(model)}
    if is_state:
        model.load_state_dict(frozen_weights(model, weights) | own, assign=True)
        model.is_mapped = start.model.is_mapped
    else:
        model = plain
        model.load_state_dict(with_lora(weights, own, config.train.lora_alpha), assign=True)
    if config.train.precision == "float64":
        model.double().is_mapped = False
    return model
