"""Loss of a model on a text, with every token predicted once."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from timemix.data.batches import validation_windows
from timemix.data.shards import IGNORED, Tokens, counted_targets, targets_of
from timemix.errors import InvalidValue
from timemix.evaluation.documents import DocumentLosses
from timemix.models.language_model import LanguageModel, evaluating
from timemix.models.registry import list_architectures
from timemix.runtime.device import autocast
from timemix.runtime.distributed import ALONE, World


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
        stride: Distance between the starts of windows in tokens, from 1 to ctx_len; None: adjacent windows.
        carry_state: Whether to carry the state from window to window, so that every token has the whole text before it
            as its context. This needs an architecture with unbounded context, and excludes `stride`.
        document_start: Id of the token that is the first of each document; None: tokens depend on earlier documents.
        documents: Object that gets the loss of each token, with `document_start` and one process.
        tokens_per_batch: Number of tokens in a batch.
        world: Processes that share the batches. All processes must call this function, and each process gets the loss
            of the whole text.

    Raises:
        InvalidValue: `stride` is out of range, or `carry_state` or `document_start` is not supported.
    """
    if stride is not None and not (type(stride) is int and 1 <= stride <= model.config.ctx_len):
        raise InvalidValue(f"stride is {stride}; it must be a whole number from 1 to ctx_len ({model.config.ctx_len})")
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
    position 0. Generation also restarts from the newest half, but predicts the first token after a restart with one
    token less.

    Args:
        model: The model.
        tokens: Token ids, (tokens,). Tokens at the end that fill no window are ignored.
        contexts: Length of a window, as a multiple of ctx_len.
        precision: Precision of matrix products: "float32", "bfloat16" or "float64".
        tokens_per_batch: Number of tokens in a batch.

    Returns:
        Losses, (contexts * ctx_len,). A position without a counted target has the loss NaN.

    Raises:
        InvalidValue: The text has fewer than `contexts` * ctx_len + 1 tokens.
    """
    length = contexts * model.config.ctx_len
    if len(tokens) < length + 1:
        raise InvalidValue(
            f"the text has {len(tokens)} tokens, but a window of {length} needs {length + 1}; give a longer text"
        )
    total = np.zeros(length)
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
    counted = counted_by_position(tokens, length)
    losses_found: np.ndarray = np.divide(total, counted, out=np.full(length, np.nan), where=counted > 0)
    return losses_found


def counted_by_position(tokens: np.ndarray | Tokens, length: int) -> np.ndarray:
    """Return the number of counted targets at each position of adjacent windows.

    Args:
        tokens: Token ids, (tokens,). Tokens at the end that fill no window are ignored.
        length: Number of tokens in a window.

    Returns:
        Numbers, (length,) int64.
    """
    count = (len(tokens) - 1) // length
    if not isinstance(tokens, Tokens) or tokens.counted is None:
        return np.full(length, count)
    counted: np.ndarray = (tokens.counted[1 : count * length + 1].reshape(count, length) != 0).sum(0)
    return counted
