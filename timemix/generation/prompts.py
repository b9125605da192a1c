"""The prompt of a text that is generated without one."""

from timemix.tokenizers.base import Tokenizer


def default_prompt(tokenizer: Tokenizer) -> str:
    """A line end, or the first token where the vocabulary has none."""
    ids, _ = tokenizer.encode_lenient("\n")
    return "\n" if len(ids) else tokenizer.decode([0])
