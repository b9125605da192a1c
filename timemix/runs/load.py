"""Loading of trained models from run folders and checkpoints, and the check that the files fit together."""

from dataclasses import dataclass
from pathlib import Path

import torch

from timemix.config.run import RunConfig, read_toml
from timemix.data.corpus import Corpus, open_run_corpus
from timemix.errors import DamagedFile
from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel
from timemix.runs.folder import read_checkpoint, read_progress
from timemix.runtime.device import choose_device
from timemix.storage.sharded import open_stored
from timemix.tokenizers.base import Tokenizer
from timemix.tokenizers.make import load_tokenizer


@dataclass(repr=False)
class Loaded:
    """Hold a trained model with its tokenizer and the config of its run.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        config: Config of its run.
        folder: Checkpoint folder that it was loaded from.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    config: RunConfig
    folder: Path

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        return f"Loaded({self.config.model.arch}, {parameters:,} parameters, from {str(self.folder)!r})"

    def corpus(self) -> Corpus:
        """Tokens of its run. Raises FileError as `open_run_corpus` does, and for others than it was trained on."""
        run = self.folder.parent.parent
        corpus = open_run_corpus(run, self.config.data.source)
        if corpus.tokenizer.hash != self.tokenizer.hash:
            raise DamagedFile(f"the data of {run} were made with another tokenizer than the model in {self.folder}")
        progress = self.folder / "training.json"
        known = read_progress(self.folder).data.get("valid") if progress.exists() else None
        if known not in (None, corpus.info.valid.sha256):
            raise DamagedFile(f"the data of {run} changed after the training: they hold another held-out text")
        return corpus


def check_weights(model: LanguageModel, folder: Path) -> None:
    """Raises DamagedFile where the weights of a checkpoint do not fit the model, by names, shapes and types alone."""
    ours = model.state_dict()
    with open_stored(folder, "model") as stored:
        if other := sorted(stored.shapes.keys() ^ ours.keys()):
            where = "missing from it" if other[0] in ours else "only in the file"
            raise DamagedFile(
                f"{stored.path} holds another architecture than its config.toml names: {other[0]} is {where}"
            )
        for name, own in ours.items():
            if not stored.fits(name, own.shape):
                raise DamagedFile(
                    f"{stored.path} does not fit its config.toml: {name} is {stored.dtype(name)}"
                    f" {list(stored.shapes[name])}, not {list(own.shape)}"
                )


def empty_model(config: ModelConfig, folder: Path) -> LanguageModel:
    """The model of a config without memory, which the weights of a checkpoint fit.

    Raises DamagedFile where they do not, before work or memory of the size that the config names is taken.
    """
    with open_stored(folder, "model") as stored:
        layers = len({name.split(".")[1] for name in stored.shapes if name.startswith("blocks.")})
    if layers != config.layers:
        raise DamagedFile(f"{stored.path} does not fit its config.toml: it holds {layers} layers, not {config.layers}")
    with torch.device("meta"):
        model = LanguageModel(config)
    check_weights(model, folder)
    return model


def load(run: str | Path, *, checkpoint: str | int = "best", device: str = "cpu") -> Loaded:
    """Load a trained model with its tokenizer and config.

    Args:
        run: Run folder, or one of its checkpoint folders.
        checkpoint: "best" (lowest validation loss), "newest", or a step; of a run folder.
        device: PyTorch device, such as "cpu" or "cuda:1".

    Returns:
        The model in eval mode, the tokenizer, the config and the checkpoint folder.

    Raises:
        MissingFile: There is no such run or checkpoint.
        DamagedFile: A file is damaged, or the files do not fit together.
        Unavailable: The machine does not have the device.
    """
    where, _ = choose_device(device)
    return read_checkpoint(run, checkpoint, lambda folder: _loaded(folder, where))


def _loaded(folder: Path, device: torch.device) -> Loaded:
    config = read_toml(folder / "config.toml")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if tokenizer.vocab_size != config.model.vocab_size:
        raise DamagedFile(
            f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size} entries,"
            f" but the model was made for {config.model.vocab_size}: it is not this model's tokenizer"
        )
    progress = folder / "training.json"
    known = read_progress(folder).data.get("tokenizer") if progress.exists() else None
    if known not in (None, tokenizer.hash):
        raise DamagedFile(f"{folder / 'tokenizer.json'} is damaged: it is not the tokenizer that was saved")
    dtype = torch.float64 if config.train.precision == "float64" else torch.float32
    model = empty_model(config.model, folder)
    with open_stored(folder, "model") as stored:
        stored.check_content()
        # A copy: what the file gives may be the file itself, mapped into memory.
        weights = {name: stored.tensor(name).to(device, dtype, copy=True) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    return Loaded(model.eval(), tokenizer, config, folder)
