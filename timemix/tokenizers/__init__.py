"""Tokenizers: characters, bytes, words and subwords, trained on a text or loaded from a file."""
