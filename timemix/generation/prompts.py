"""The token ids of a prompt, and the default prompt."""

from timemix.errors import InvalidValue
from timemix.tokenizers.base import Tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Encode a prompt. An empty prompt is the beginning of a document, if the tokenizer has an end of text.

    Args:
        tokenizer: The tokenizer.
        prompt: The prompt.

    Returns:
        Token ids. Empty only if the prompt is empty and the tokenizer has no `end_of_text`.

    Raises:
        InvalidValue: The prompt has characters or words outside the vocabulary,
            or only spaces for a tokenizer of words.
    """
    if not prompt and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    ids: list[int] = tokenizer.encode(prompt).tolist()
    if prompt and not ids:
        raise InvalidValue(f"the prompt {prompt!r} has no token; give at least one word")
    return ids


def default_prompt(tokenizer: Tokenizer) -> str:
    """Return the empty prompt if it begins a document, else a newline, else the text of token 0."""
    if tokenizer.end_of_text is not None:
        return ""
    ids, _ = tokenizer.encode_lenient("\n")
    return "\n" if len(ids) else tokenizer.decode([0])
