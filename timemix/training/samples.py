"""Samples from a model in training, appended to samples.txt in its run folder."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from timemix.errors import CannotWrite, InvalidValue
from timemix.generation.generate import generate
from timemix.generation.prompts import default_prompt, prompt_ids
from timemix.generation.sampler import Sampler
from timemix.models.language_model import LanguageModel
from timemix.runs.load import Loaded
from timemix.runtime.distributed import World
from timemix.storage.files import append, explained, read_lines
from timemix.tokenizers.base import Tokenizer
from timemix.training.progress import Sample
from timemix.training.saving import gathered

SAMPLES = "samples.txt"

_HEADING = re.compile(rb"--- step (\d{1,18})(?:, prompt \".*\")?\n")
"""`Sample.heading` as a line of samples.txt."""


def whole_model(model: LanguageModel, strategy: str, world: World) -> LanguageModel:
    """Return a model that process 0 can call alone: the model itself, or an unsharded copy of a sharded model.

    All processes must call this function. Processes other than process 0 get the model itself, because only process 0
    holds a copy.
    """
    if world.size == 1 or strategy != "shard":
        return model
    weights = gathered(model.state_dict(), world)
    if not world.first:
        return model
    with torch.device("meta"):
        whole = LanguageModel(model.config)
    whole.load_state_dict(weights, assign=True)
    return whole


def check_prompts(prompts: Sequence[str], tokenizer: Tokenizer) -> None:
    """Check that the model can continue each prompt of `train.sample_prompts`.

    Raises:
        InvalidValue: A prompt has no tokens, or has text outside the vocabulary.
    """
    for prompt in prompts:
        try:
            ids = prompt_ids(tokenizer, prompt)
        except InvalidValue as error:
            raise InvalidValue(f"the prompt {prompt!r} in train.sample_prompts cannot be encoded: {error}") from error
        if not ids:
            raise InvalidValue(f"the prompt {prompt!r} in train.sample_prompts has no tokens; give a longer prompt")


def write_sample(
    loaded: Loaded, step: int, prompt: str | None = None, sampler: Sampler | None = None, tokens: int = 300
) -> Sample:
    """Generate a text, append it to samples.txt and return it.

    The random seed is always 0, so that equal weights give equal texts.

    Args:
        loaded: The model, with the run folder as its folder.
        step: Step of the model, for the heading above the text.
        prompt: Start of the text. Default: as in `default_prompt`.
        sampler: Sampler of the tokens. Default: temperature 1, no filter.
        tokens: Number of generated tokens.

    Raises:
        CannotWrite: samples.txt cannot be written, and `train.full_disk` is "stop".
    """
    start = default_prompt(loaded.tokenizer) if prompt is None else prompt
    sample = Sample(step, prompt, start + generate(loaded, start, tokens=tokens, sampler=sampler)[0])
    try:
        append(loaded.folder / SAMPLES, f"{sample.heading}\n{sample.text}\n\n".encode())
    except CannotWrite:
        # A run with `train.full_disk` "continue" reports a full disk only once, when metrics.jsonl cannot be written.
        if loaded.config.train.full_disk == "stop":
            raise
    return sample


def cut_samples(folder: Path, step: int) -> None:
    """Remove the texts of all steps after a step from samples.txt.

    Args:
        folder: Run folder.
        step: Number of finished steps.

    Raises:
        FileError: samples.txt is not a regular file, or cannot be read or written.
    """
    path, size = folder / SAMPLES, 0
    if not path.exists():
        return
    for line in read_lines(path):
        heading = _HEADING.fullmatch(line)
        if heading and int(heading[1]) > step:
            with explained(path):
                os.truncate(path, size)
            return
        size += len(line)
