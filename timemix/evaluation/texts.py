"""Loss of a model on a text in nats per token, and in bits per character and per byte."""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np

from timemix.data.corpus import Corpus
from timemix.data.shards import Tokens, counted_targets
from timemix.errors import InvalidValue, NotFinite
from timemix.evaluation.documents import DocumentLosses, document_start
from timemix.evaluation.loss import loss_per_token
from timemix.models.language_model import LanguageModel
from timemix.runs.load import Loaded, load
from timemix.storage.json_files import OPTIONAL
from timemix.tokenizers.base import DOCUMENT_END, Tokenizer, refuse_surrogates


@dataclass(frozen=True)
class TextSize:
    """Counts of a text: characters, bytes in UTF-8, and characters or words outside the vocabulary."""

    characters: int
    bytes: int
    unknown: int


@dataclass(frozen=True)
class Evaluation:
    """Loss of a text in three units, with the numbers of tokens, characters and bytes."""

    nats_per_token: float
    bits_per_character: float
    bits_per_byte: float
    tokens: int
    """Number of tokens of the text."""
    characters: int
    """Number of characters of the text."""
    bytes: int
    """Number of bytes of the text in UTF-8."""
    unknown: int
    """Number of characters or words outside the vocabulary."""
    predicted_tokens: int
    """Number of tokens that the loss counts: all tokens but the first, or the counted tokens of a loss mask."""
    predicted_characters: int
    """Number of predicted characters: all characters except skipped characters and the characters of the first token.
    With a loss mask, only the characters of counted tokens."""
    predicted_bytes: int
    """Number of predicted bytes: all bytes except the bytes of skipped characters and of the first token. With a loss
    mask, only the bytes of counted tokens."""
    documents: int | None = field(default=None, metadata=OPTIONAL)
    """Number of documents, or None without `by_document`."""
    nats_per_token_by_document: float | None = field(default=None, metadata=OPTIONAL)
    """Mean over the documents of their loss in nats per token, or None without `by_document`. Each document has equal
    weight."""


class Options(TypedDict, total=False):
    """Options of an evaluation."""

    precision: str
    """Precision of matrix products: "float32" (default) or "bfloat16"."""
    stride: int | None
    """Distance between the starts of windows in tokens, from 1 to ctx_len. Default: adjacent windows."""
    carry_state: bool
    """Whether to carry the state from window to window, so that every token has the whole text before it as its
    context. Default: False. The value True needs an architecture with unbounded context, and excludes `stride`."""
    cross_documents: bool
    """Whether tokens depend on the documents before their own document. Default: True. The value False needs a
    tokenizer with an end-of-text token."""
    by_document: bool
    """Whether to count the documents and average their losses. Default: False. The value True implies
    `cross_documents` False."""


def evaluate(
    run: str | Path | Loaded,
    text: str | None = None,
    *,
    precision: str = "float32",
    stride: int | None = None,
    carry_state: bool = False,
    by_document: bool = False,
) -> Evaluation:
    """Measure the loss of a trained model on a text.

    Args:
        run: Run folder, checkpoint folder, or a model from `load`.
        text: Text of at least two tokens. Default: the held-out text of the run.
        precision: Precision of matrix products: "float32" or "bfloat16".
        stride: Distance between the starts of windows in tokens, from 1 to ctx_len. Default: adjacent windows.
        carry_state: Whether to carry the state from window to window, so that every token has the whole text before it
            as its context. This needs an architecture with unbounded context, and excludes `stride`.
        by_document: Whether to count the documents and average their losses. Tokens then depend only on their own
            document, as in runs with `data.cross_documents` false.

    Returns:
        The loss in nats per token, bits per character and bits per byte (UTF-8), with the numbers of tokens, characters
        and bytes.

    Raises:
        InvalidValue: The text has fewer than two tokens, `stride` is out of range, `carry_state` or `by_document` is
            not supported, or `precision` is unknown.
        NotFinite: The loss is not finite.
        FileError: The run, or its data, cannot be loaded.
    """
    if precision not in ("float32", "bfloat16"):
        raise InvalidValue(f"precision={precision!r} is not supported; known: float32, bfloat16")
    if not isinstance(text, str | None):
        raise InvalidValue(f"text is {type(text).__name__}; it must be a str")
    loaded = run if isinstance(run, Loaded) else load(run)
    options: Options = {
        "precision": precision,
        "stride": stride,
        "carry_state": carry_state,
        "cross_documents": loaded.config.data.cross_documents,
        "by_document": by_document,
    }
    if text is None:
        return evaluate_held_out(loaded.model, loaded.corpus(), **options)
    return evaluate_text(loaded.model, loaded.tokenizer, text, **options)


def evaluate_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    text: str,
    **options: Unpack[Options],
) -> Evaluation:
    """Measure the loss of a model on a text.

    Characters or words outside the vocabulary become <unk>, or bytes if the vocabulary has bytes for them. If the
    vocabulary has neither, characters outside the vocabulary are skipped. The losses per character and per byte count
    neither skipped characters nor the first token, which is not predicted.

    Args:
        model: The model.
        tokenizer: Tokenizer of the model.
        text: The text. If the tokenizer has an end-of-text token, DOCUMENT_END may end each document.
        options: Options of the evaluation.

    Raises:
        InvalidValue: The text gives fewer than two tokens, `stride` is out of range, or `carry_state` is not supported.
        NotFinite: The loss is not finite.
    """
    plain = text if tokenizer.end_of_text is None else text.replace(DOCUMENT_END, "")
    whole_bytes = len(refuse_surrogates(plain))
    tokens, unknown = tokenizer.encode_documents(text)
    left_out = unknown if tokenizer.unknown == "error" else Counter[str]()
    whole = TextSize(len(plain), whole_bytes, unknown.total())
    first = tokenizer.first_size(text.partition(DOCUMENT_END)[0])
    predicted = (
        whole.characters - sum(len(each) * count for each, count in left_out.items()) - first[0],
        whole.bytes - sum(len(each.encode("utf-8")) * count for each, count in left_out.items()) - first[1],
    )
    return in_units(
        model,
        tokenizer,
        tokens,
        whole,
        predicted,
        **options,
    )


def bits_per_byte(nats_per_token: float, corpus: Corpus) -> float | None:
    """Convert a loss on the validation tokens of a prepared folder to bits per byte of their text in UTF-8.

    Args:
        nats_per_token: Mean loss over all counted tokens but the first, in nats.
        corpus: The prepared folder.

    Returns:
        The loss in bits per byte, as `evaluate` gives it, or None if data.json counts no bytes after the first token.
    """
    _, bytes_ = _predicted_size(corpus)
    if bytes_ < 1:
        return None
    return nats_per_token * counted_targets(corpus.valid) / math.log(2) / bytes_


def _predicted_size(corpus: Corpus) -> tuple[int, int]:
    """Return the numbers of characters and bytes of the validation text that the loss counts."""
    valid = corpus.info.valid
    if valid.counted is not None:
        return valid.counted.characters, valid.counted.bytes
    # Folders that earlier versions of timemix prepared do not store the size of the first token. Without a stored size,
    # <unk> counts as one character of one byte.
    first = valid.first or corpus.tokenizer.spelled_size([corpus.valid[:1]])
    return valid.characters - first[0], valid.bytes - first[1]


def evaluate_held_out(
    model: LanguageModel,
    corpus: Corpus,
    **options: Unpack[Options],
) -> Evaluation:
    """Measure the loss of a model on the validation tokens of a prepared folder.

    Args:
        model: The model.
        corpus: The prepared folder.
        options: Options of the evaluation.

    Raises:
        InvalidValue: Fewer than two tokens are held out, `stride` is out of range, or `carry_state` is not supported.
        NotFinite: The loss is not finite.
    """
    if len(corpus.valid) < 2:
        raise InvalidValue(
            f"a loss needs at least 2 tokens, but the held-out text of the run has {len(corpus.valid)}; name a text"
        )
    valid = corpus.info.valid
    whole = TextSize(valid.characters, valid.bytes, valid.unknown)
    predicted = _predicted_size(corpus)
    return in_units(
        model,
        corpus.tokenizer,
        corpus.valid,
        whole,
        predicted,
        **options,
    )


def in_units(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tokens: np.ndarray | Tokens,
    whole: TextSize,
    predicted: tuple[int, int],
    **options: Unpack[Options],
) -> Evaluation:
    """Measure the loss on the tokens of a text.

    Args:
        model: The model.
        tokenizer: Tokenizer of the model.
        tokens: Token ids, (tokens,).
        whole: Numbers of characters, bytes and unknown characters or words of the whole text.
        predicted: Numbers of characters and bytes that the counted tokens after the first token encode.
        options: Options of the evaluation.
    """
    by_document, carry_state = options.get("by_document", False), options.get("carry_state", False)
    if len(tokens) < 2:
        raise InvalidValue(f"a loss needs at least 2 tokens, but the text has {len(tokens)}; give a longer text")
    start = None
    if by_document or not options.get("cross_documents", True):
        clause = "by_document is True" if by_document else "cross_documents is False"
        start = document_start(tokenizer, clause)
        if carry_state and not model.resets_in_rows and model.max_position is None:
            raise InvalidValue(
                f"carry_state is True, which this {model.config.arch} does not support for separate documents; leave it"
                " out"
            )
    documents = DocumentLosses() if by_document else None
    nats = loss_per_token(
        model,
        tokens,
        precision=options.get("precision", "float32"),
        stride=options.get("stride"),
        carry_state=carry_state,
        document_start=start,
        documents=documents,
    )
    if not math.isfinite(nats):
        raise NotFinite(f"the loss is {nats}: the weights are damaged, or training diverged; use another checkpoint")
    count = counted_targets(tokens)
    bits = nats * count / math.log(2)
    characters, bytes_ = (max(size, 1) for size in predicted)
    return Evaluation(
        nats_per_token=nats,
        bits_per_character=bits / characters,
        bits_per_byte=bits / bytes_,
        tokens=len(tokens),
        characters=whole.characters,
        bytes=whole.bytes,
        unknown=whole.unknown,
        predicted_tokens=count,
        predicted_characters=characters,
        predicted_bytes=bytes_,
        documents=None if documents is None else documents.count,
        nats_per_token_by_document=None if documents is None else documents.mean,
    )
