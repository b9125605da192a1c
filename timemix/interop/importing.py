"""Import of published weights: a run folder with a checkpoint of step 0, which holds the weights in their own types."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import Tensor

from timemix.config.presets import DEFAULT_PRESET, preset
from timemix.config.run import RunConfig, to_toml
from timemix.data.config import DataConfig, Template, TokenizerKind, Unknown
from timemix.data.vocabulary import PACKAGES, PUBLISHED, world_tokenizer
from timemix.errors import DamagedFile, InvalidValue, Unavailable
from timemix.interop.chat_template import template_in
from timemix.interop.published import Published, read_published
from timemix.runs.folder import Progress
from timemix.runs.save import save_checkpoint
from timemix.storage.files import check_name, new_folder, refuse_existing
from timemix.storage.settings import check_range
from timemix.tokenizers.base import Tokenizer
from timemix.tokenizers.hugging_face import HuggingFaceTokenizer
from timemix.tokenizers.make import load_tokenizer
from timemix.tokenizers.world import VOCAB_SIZE, read_world

CTX_LEN = 1024
"""Default context length in tokens. It is the length of windows in training and eval, since the context has no end."""


NAMES = (PUBLISHED.file, "tokenizer.json")
"""Names of tokenizer files in the folder of the weights, in order of preference."""


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    Args:
        config: Config of the run.
        parameters: Number of parameters.
        formats: Number formats of the weights, such as "bfloat16".
    """

    config: RunConfig
    parameters: int
    formats: str


def import_run(path: Path, out: Path, tokenizer: Path | None = None, *, ctx_len: int = CTX_LEN) -> Imported:
    """Import published weights as a run, which is complete at step 0.

    Args:
        path: A `.pth` file, a safetensors file, or a folder of Hugging Face.
        out: Run folder, which must not exist.
        tokenizer: A `tokenizer.json` of timemix, a byte-level `tokenizer.json` of the `tokenizers` library such as that
            of GPT-NeoX, or a vocabulary file of the World tokenizer. None: the first file of
            NAMES in the folder `path` or beside the file `path`, or for 65,536 tokens the vocabulary file of an
            installed package.
        ctx_len: Context length in tokens.

    Returns:
        The config of the run, with the number and the formats of the weights.

    Raises:
        AlreadyExists: `out` exists.
        InvalidValue: The tokenizer is missing or of another model, or `ctx_len` is out of range.
        FileError: A file cannot be read, is damaged, or is of a model that timemix does not support.
        CannotWrite: The run cannot be written.
    """
    check_name(out)
    refuse_existing(out)
    check_range("ctx_len", ctx_len, 1, 2**20)
    published = read_published(path, ctx_len)
    own = _tokenizer(path, tokenizer, published.config.vocab_size)
    config = _config(published, own, template_in(path if path.is_dir() else path.parent))
    save_imported(out, published.weights, config, own, published.unused)
    formats = sorted({str(x.dtype).removeprefix("torch.") for x in published.weights.values()})
    return Imported(config, sum(x.numel() for x in published.weights.values()), ", ".join(formats))


def save_imported(
    out: Path,
    weights: dict[str, Tensor],
    config: RunConfig,
    tokenizer: Tokenizer,
    unused: dict[str, Tensor] | None = None,
) -> None:
    """Write a run that is complete at step 0, with one checkpoint.

    Args:
        out: Run folder, which must not exist.
        weights: Weights by name.
        config: Config of the run.
        tokenizer: Tokenizer of the model.
        unused: Tensors of the imported file that the model does not use, for a later export.

    Raises:
        CannotWrite: The run cannot be written.
    """
    tensors = {"model": weights} | ({"unused": unused} if unused else {})
    progress = Progress(step=0, seconds=0.0, valid_loss=None, valid_step=None, data={"tokenizer": tokenizer.hash})
    with new_folder(out) as temporary:
        save_checkpoint(temporary, tensors, config, tokenizer, progress)
        (temporary / "config.toml").write_text(to_toml(config), encoding="utf-8")


def _tokenizer(path: Path, given: Path | None, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a model with a vocabulary of `vocab_size` tokens."""
    folder = path if path.is_dir() else path.parent
    file = given or next((each for name in NAMES if (each := folder / name).exists()), None)
    if file is None:
        return _world_of_a_package(path, vocab_size)
    try:
        tokenizer = load_tokenizer(file) if file.suffix == ".json" else read_world(file, vocab_size)
    except DamagedFile as error:
        if given is not None or file.suffix != ".json":
            raise
        # Many folders of Hugging Face contain the tokenizer.json of another program.
        raise InvalidValue(
            f"tokenizer is missing: {file} is no tokenizer file of timemix; give {PUBLISHED.file}, or a tokenizer.json"
            " of timemix"
        ) from error
    # A model may have more rows than its tokenizer has tokens.
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.vocab_size < vocab_size:
        tokenizer = tokenizer.padded(vocab_size)
    if tokenizer.vocab_size != vocab_size:
        raise InvalidValue(
            f"tokenizer {str(file)!r} has {tokenizer.vocab_size:,} tokens, but the model in {path} has {vocab_size:,};"
            " give the tokenizer of this model"
        )
    return tokenizer


def _world_of_a_package(path: Path, vocab_size: int) -> Tokenizer:
    """Return the World tokenizer of an installed package, for a model with the vocabulary size of the World models."""
    try:
        if vocab_size == VOCAB_SIZE:
            return world_tokenizer()
    except Unavailable as error:
        raise InvalidValue(
            f"tokenizer is missing: {path} has no {PUBLISHED.file}; give this file, or install a package with the file:"
            f" pip install {PACKAGES[0]}"
        ) from error
    raise InvalidValue(
        f"tokenizer is missing: the model in {path} has {vocab_size:,} tokens, not the {VOCAB_SIZE:,} of the World"
        f" tokenizer; give a tokenizer.json of timemix with {vocab_size:,} tokens"
    )


def _config(published: Published, tokenizer: Tokenizer, template: str | None) -> RunConfig:
    """Return the config of the run, without a text. Its settings of training are the defaults of `train --from RUN`."""
    train = replace(
        preset(DEFAULT_PRESET, published.config.arch).train,
        steps=0,
        batch_size=4,
        lr=1e-5,
        lr_final=1e-6,
        weight_decay=0.0,
        valid_every=50,
    )
    kind, unknown = cast(TokenizerKind, tokenizer.kind), cast(Unknown, tokenizer.unknown)
    data = DataConfig(source="", tokenizer=kind, unknown=unknown, template=cast(Template | None, template))
    return RunConfig(model=published.config, data=data, train=train)
