"""Vocabulary files of the World tokenizer."""

BYTES = [bytes([byte]) for byte in range(256)]


def vocabulary_lines(tokens):
    """Return the content of a vocabulary file: tokens that are UTF-8 as literals of str, other tokens as bytes."""
    lines = []
    for number, token in enumerate(tokens, 1):
        try:
            literal = repr(token.decode())
        except UnicodeDecodeError:
            literal = repr(token)
        lines.append(f"{number} {literal} {len(token)}\n")
    return "".join(lines).encode()
