"""Loss of a model on a text, with every token predicted once."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from timemix.data.batches import validation_windows
from timemix.data.corpus import Corpus
from timemix.data.shards import IGNORED, Tokens, counted_targets, targets_of
from timemix.errors import InvalidValue
from timemix.evaluation.documents import DocumentLosses, document_start
from timemix.models.language_model import LanguageModel, evaluating
from timemix.models.registry import list_architectures
from timemix.runs.load import Loaded, load
from timemix.runtime.device import autocast
from timemix.runtime.distributed import ALONE, World
from timemix.storage.json_files import OPTIONAL
from timemix.tokenizers.base import DOCUMENT_END, Tokenizer, refuse_surrogates


def windows(
    tokens: np.ndarray | Tokens, ctx_len: int, batch_size: int, stride: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Cut a text into batches of windows, so that every token but the first counts as a target exactly once.

    With a stride, a window begins every `stride` tokens. Each window after the first counts only the targets that no
    earlier window counts. A counted target after the first window has at least ctx_len - stride tokens of context.

    Args:
        tokens: Token ids, (tokens,).
        ctx_len: Number of tokens in a window.
        batch_size: Largest number of windows in a batch.
        stride: Distance between the starts of windows in tokens; None: adjacent windows.

    Yields:
        Inputs and targets, each (batch, T) int64, and a number n for each row: the last n targets of the row count in
        the loss.
    """
    if stride is None or stride >= ctx_len:
        for inputs, targets in validation_windows(tokens, ctx_len, batch_size):
            yield inputs, targets, targets.shape[1]
        return
    last = max(len(tokens) - 1 - ctx_len, 0)
    head = tokens[: ctx_len + 1].astype(np.int64)
    yield head[None, :-1], targets_of(tokens, slice(1, ctx_len + 1))[None], len(head) - 1
    starts = list(range(stride, last + 1, stride))
    for i in range(0, len(starts), batch_size):
        group = starts[i : i + batch_size]
        inputs = np.stack([tokens[s : s + ctx_len] for s in group]).astype(np.int64)
        yield inputs, np.stack([targets_of(tokens, slice(s + 1, s + ctx_len + 1)) for s in group]), stride
    scored = (starts[-1] if starts else 0) + ctx_len
    if (rest := len(tokens) - 1 - scored) > 0:
        first = max(0, len(tokens) - (ctx_len + 1))
        row = tokens[first:].astype(np.int64)[None]
        yield row[:, :-1], targets_of(tokens, slice(first + 1, None))[None], rest


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy in nats, computed in at least float32.

    Args:
        logits: Logits (B, T, V).
        targets: Token ids, (B, T) int64. The loss of a target with the value IGNORED is 0, and does not count in the
            mean. At least one target must count in a mean.
        reduction: Reduction of the losses: "mean", "sum", or "none", which returns all losses (B * T,).
    """
    wide = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction=reduction, ignore_index=IGNORED)


@torch.no_grad()
def loss_per_token(
    model: LanguageModel,
    tokens: np.ndarray | Tokens,
    *,
    precision: str = "float32",
    stride: int | None = None,
    carry_state: bool = False,
    document_start: int | None = None,
    documents: DocumentLosses | None = None,
    tokens_per_batch: int = 8192,
    world: World = ALONE,
) -> float:
    """Return the mean loss in nats over all counted tokens of a text but the first, each predicted once.

    Args:
        model: The model.
        tokens: Token ids, (tokens,), at least 2. If the loss counts none of the tokens, the result is 0.
        precision: Precision of matrix products: "float32", "bfloat16" or "float64".
        stride: Distance between the starts of windows in tokens, at least 1; None: adjacent windows.
        carry_state: Whether to carry the state from window to window, so that every token has the whole text before it
            as its context. This needs an architecture with unbounded context, and excludes `stride`.
        document_start: Id of the token that is the first of each document; None: tokens depend on earlier documents.
        documents: Object that gets the loss of each token, with `document_start` and one process.
        tokens_per_batch: Number of tokens in a batch.
        world: Processes that share the batches. All processes must call this function, and each process gets the loss
            of the whole text.

    Raises:
        InvalidValue: `stride` is below 1, or `carry_state` or `document_start` is not supported.
    """
    if stride is not None and stride < 1:
        raise InvalidValue(f"stride is {stride}; it must be at least 1 token")
    if carry_state:
        return _loss_with_carried_state(model, tokens, precision, stride, document_start, documents)
    ctx_len = model.config.ctx_len
    total = 0.0
    batches = windows(tokens, ctx_len, max(1, tokens_per_batch // ctx_len), stride)
    with evaluating(model):
        while turns := list(itertools.islice(batches, world.size)):
            # All processes must call a sharded model. In the last round, processes without a batch repeat the batch of
            # another process.
            inputs, targets, scored = turns[world.rank % len(turns)]
            x, y = (torch.from_numpy(a).to(model.device) for a in (inputs, targets))
            with autocast(precision, model.device):
                logits, _ = model(x, resets=_resets(x, document_start))
            loss = _summed(logits[:, -scored:], y[:, -scored:], _resets(x[:, -scored:], document_start), documents)
            total += loss if world.rank < len(turns) else 0.0
    (total,) = world.sum(total)
    return total / max(1, counted_targets(tokens))


@torch.no_grad()
def _loss_with_carried_state(
    model: LanguageModel,
    tokens: np.ndarray | Tokens,
    precision: str,
    stride: int | None,
    document_start: int | None,
    documents: DocumentLosses | None,
) -> float:
    """Return the mean loss in nats over all tokens but the first, with the state carried through the whole text."""
    if model.max_position is not None:
        raise InvalidValue(
            f"carry_state is True, but the context of {model.config.arch} is bounded by ctx_len; leave it out, or use"
            f" a run of {', '.join(list_architectures(bounded=False))}"
        )
    if stride is not None:
        raise InvalidValue(f"stride={stride} excludes carry_state=True; leave one of them out")
    total, state = 0.0, model.init_state(1)
    with evaluating(model):
        for inputs, targets in validation_windows(tokens, model.config.ctx_len, 1):
            x, y = (torch.from_numpy(a).to(model.device) for a in (inputs, targets))
            with autocast(precision, model.device):
                logits, state = model(x, state, resets=_resets(x, document_start))
            total += _summed(logits, y, _resets(x, document_start), documents)
    return total / max(1, counted_targets(tokens))


def _resets(inputs: Tensor, document_start: int | None) -> Tensor | None:
    return None if document_start is None else torch.eq(inputs, document_start)


def _summed(logits: Tensor, targets: Tensor, resets: Tensor | None, documents: DocumentLosses | None) -> float:
    """Return the summed loss of tokens in nats, and add the loss of each token to `documents`.

    Args:
        logits: Logits (B, T, V).
        targets: Token ids (B, T).
        resets: Whether the token before each target is the first of a document (B, T).
        documents: Object that gets the losses, or None.
    """
    if documents is None or resets is None:
        return cross_entropy(logits, targets, reduction="sum").item()
    losses = cross_entropy(logits, targets, reduction="none").double().cpu().numpy()
    documents.add(losses, resets.flatten().cpu().numpy(), (targets != IGNORED).flatten().cpu().numpy())
    return float(losses.sum())


@torch.no_grad()
def loss_by_position(
    model: LanguageModel,
    tokens: np.ndarray | Tokens,
    *,
    contexts: int = 1,
    precision: str = "float32",
    tokens_per_batch: int = 8192,
) -> np.ndarray:
    """Return the mean loss in nats at each position of adjacent windows.

    Whenever a bounded context ends within a window, the model processes the newest half of that context again from
    position 0, as in generation.

    Args:
        model: The model.
        tokens: Token ids, (tokens,). Tokens at the end that fill no window are ignored.
        contexts: Length of a window, as a multiple of ctx_len.
        precision: Precision of matrix products: "float32", "bfloat16" or "float64".
        tokens_per_batch: Number of tokens in a batch.

    Returns:
        Losses, (contexts * ctx_len,). A position without a counted target has the loss 0.

    Raises:
        InvalidValue: The text has fewer than `contexts` * ctx_len + 1 tokens.
    """
    length = contexts * model.config.ctx_len
    if len(tokens) < length + 1:
        raise InvalidValue(
            f"the text has {len(tokens)} tokens, but a window of {length} needs {length + 1}; give a longer text"
        )
    total, counted = np.zeros(length), np.zeros(length)
    with evaluating(model):
        for inputs, targets in validation_windows(tokens, length, max(1, tokens_per_batch // length)):
            if inputs.shape[1] == length:
                x, y = (torch.from_numpy(a).to(model.device) for a in (inputs, targets))
                limit = model.max_position or length
                for begin in range(0, max(1, length - limit // 2), limit - limit // 2):
                    end, known = begin + limit, limit // 2 if begin else 0
                    with autocast(precision, model.device):
                        logits, _ = model(x[:, begin:end])
                    new = y[:, begin + known : end]
                    losses = cross_entropy(logits[:, known:], new, reduction="none").view(new.shape)
                    total[begin + known : end] += losses.double().sum(0).cpu().numpy()
                counted += (targets != IGNORED).sum(0)
    return total / np.maximum(counted, 1)


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
        stride: Distance between the starts of windows in tokens, at least 1. Default: adjacent windows.
        carry_state: Whether to carry the state from window to window, so that every token has the whole text before it
            as its context. This needs an architecture with unbounded context, and excludes `stride`.
        by_document: Whether to count the documents and average their losses. Tokens then depend only on their own
            document, as in runs with `data.cross_documents` false.

    Returns:
        The loss in nats per token, bits per character and bits per byte (UTF-8), with the numbers of tokens, characters
        and bytes.

    Raises:
        InvalidValue: The text has fewer than two tokens, `stride` is below 1, `carry_state` or `by_document` is not
            supported, or `precision` is unknown.
        FileError: The run, or its data, cannot be loaded.
    """
    if precision not in ("float32", "bfloat16"):
        raise InvalidValue(f"precision={precision!r} is not supported; known: float32, bfloat16")
    if not isinstance(text, str | None):
        raise InvalidValue(f"text is {type(text).__name__}; it must be a str")
    loaded = run if isinstance(run, Loaded) else load(run)
    options: dict[str, Any] = {
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
    *,
    precision: str = "float32",
    stride: int | None = None,
    carry_state: bool = False,
    cross_documents: bool = True,
    by_document: bool = False,
) -> Evaluation:
    """Measure the loss of a model on a text.

    Characters or words outside the vocabulary become <unk>. If the vocabulary has no <unk>, characters outside the
    vocabulary are skipped. The losses per character and per byte count neither skipped characters nor the first token,
    which is not predicted.

    Args:
        model: The model.
        tokenizer: Tokenizer of the model.
        text: The text. If the tokenizer has an end-of-text token, DOCUMENT_END may end each document.
        precision: Precision of matrix products: "float32" or "bfloat16".
        stride: Distance between the starts of windows in tokens, at least 1. Default: adjacent windows.
        carry_state: Whether to carry the state from window to window, so that every token has the whole text before it
            as its context. This needs an architecture with unbounded context, and excludes `stride`.
        cross_documents: Whether tokens depend on the documents before their own document. The value False needs a
            tokenizer with an end-of-text token.
        by_document: Whether to count the documents and average their losses. The value True implies `cross_documents`
            False.

    Raises:
        InvalidValue: The text gives fewer than two tokens, `stride` is below 1, or `carry_state` is not supported.
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
        precision=precision,
        stride=stride,
        carry_state=carry_state,
        cross_documents=cross_documents,
        by_document=by_document,
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
    *,
    precision: str = "float32",
    stride: int | None = None,
    carry_state: bool = False,
    cross_documents: bool = True,
    by_document: bool = False,
) -> Evaluation:
    """Measure the loss of a model on the validation tokens of a prepared folder.

    Args:
        model: The model.
        corpus: The prepared folder.
        precision: Precision of matrix products: "float32" or "bfloat16".
        stride: Distance between the starts of windows in tokens, at least 1. Default: adjacent windows.
        carry_state: Whether to carry the state from window to window, so that every token has the whole text before it
            as its context. This needs an architecture with unbounded context, and excludes `stride`.
        cross_documents: Whether tokens depend on the documents before their own document. The value False needs a
            tokenizer with an end-of-text token.
        by_document: Whether to count the documents and average their losses. The value True implies `cross_documents`
            False.

    Raises:
        InvalidValue: Fewer than two tokens are held out, `stride` is below 1, or `carry_state` is not supported.
    """
    valid = corpus.info.valid
    whole = TextSize(valid.characters, valid.bytes, valid.unknown)
    predicted = _predicted_size(corpus)
    return in_units(
        model,
        corpus.tokenizer,
        corpus.valid,
        whole,
        predicted,
        precision=precision,
        stride=stride,
        carry_state=carry_state,
        cross_documents=cross_documents,
        by_document=by_document,
    )


def in_units(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tokens: np.ndarray | Tokens,
    whole: TextSize,
    predicted: tuple[int, int],
    *,
    precision: str,
    stride: int | None,
    carry_state: bool,
    cross_documents: bool,
    by_document: bool,
) -> Evaluation:
    """Measure the loss on the tokens of a text.

    Args:
        model: The model.
        tokens: Token ids, (tokens,).
        whole: Numbers of characters, bytes and unknown characters or words of the whole text.
        predicted: Numbers of characters and bytes that the counted tokens after the first token encode.
        precision: Precision of matrix products.
        stride: Distance between the starts of windows in tokens.
        carry_state: Whether to carry the state from window to window.
        cross_documents: Whether tokens depend on the documents before their own document.
        by_document: Whether to count the documents and average their losses.
    """
    if len(tokens) < 2:
        raise InvalidValue(f"the text has {len(tokens)} tokens, but a loss needs at least 2; give a longer text")
    start = None
    if by_document or not cross_documents:
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
        precision=precision,
        stride=stride,
        carry_state=carry_state,
        document_start=start,
        documents=documents,
    )
    bits = nats * counted_targets(tokens) / math.log(2)
    characters, bytes_ = (max(size, 1) for size in predicted)
    return Evaluation(
        nats_per_token=nats,
        bits_per_character=bits / characters,
        bits_per_byte=bits / bytes_,
        tokens=len(tokens),
        characters=whole.characters,
        bytes=whole.bytes,
        unknown=whole.unknown,
        predicted_characters=characters,
        predicted_bytes=bytes_,
        documents=None if documents is None else documents.count,
        nats_per_token_by_document=None if documents is None else documents.mean,
    )
