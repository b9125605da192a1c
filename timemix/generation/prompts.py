"""The default prompt."""

from timemix.tokenizers.base import Tokenizer


def default_prompt(tokenizer: Tokenizer) -> str:
    """Return a newline, or the text of token 0 if the vocabulary has no newline."""
    ids, _ = tokenizer.encode_lenient("\n")
    return "\n" if len(ids) else tokenizer.decode([0])
