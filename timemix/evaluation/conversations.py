"""Loss of a model on conversations, of which only the answers count."""

from typing import Unpack

import numpy as np

from timemix.data.marks import encode_marked, without
from timemix.data.shards import MASK_TYPE, Tokens
from timemix.errors import InvalidValue
from timemix.evaluation.texts import Evaluation, Options, TextSize, in_units
from timemix.models.language_model import LanguageModel
from timemix.tokenizers.base import Tokenizer


def evaluate_conversations(
    model: LanguageModel,
    tokenizer: Tokenizer,
    text: str,
    **options: Unpack[Options],
) -> Evaluation:
    """Measure the loss of a model on the answers of conversations, and on the ends of text after them.

    Args:
        model: The model.
        tokenizer: Tokenizer of the model, with an `end_of_text`.
        text: The conversations with loss marks, as from `read_source` with a template.
        options: Options of the evaluation, in which each conversation is a document.

    Raises:
        InvalidValue: The tokenizer has no `end_of_text`, the text gives fewer than two tokens, `stride` is below 1, or
            `carry_state` is not supported.
    """
    tokens, unknown = encode_conversations(tokenizer, text)
    assert tokens.counted is not None
    plain = without(text)
    whole = TextSize(len(plain), len(plain.encode()), unknown)
    # No model predicts the first token.
    predicted = tokenizer.spelled_size([tokens[1:][np.flatnonzero(tokens.counted[1:])]])
    return in_units(
        model,
        tokenizer,
        tokens,
        whole,
        predicted,
        **options,
    )


def encode_conversations(tokenizer: Tokenizer, text: str) -> tuple[Tokens, int]:
    """Encode conversations, of which the loss counts only the answers and the ends of text after them.

    Args:
        tokenizer: Tokenizer of the model, with an `end_of_text`.
        text: The conversations with loss marks, as from `read_source` with a template.

    Returns:
        The tokens with their loss mask, and the number of unknown characters or words.

    Raises:
        InvalidValue: The tokenizer has no `end_of_text`.
    """
    if tokenizer.end_of_text is None:
        raise InvalidValue(
            f"data.template needs an end-of-text token, but the {tokenizer.kind} tokenizer of the model has none; leave"
            " data.template out"
        )
    ids, counted, unknown = encode_marked(tokenizer, text)
    assert counted is not None
    return Tokens([ids], ids.dtype, Tokens([counted], MASK_TYPE)), unknown.total()
