"""Tokenizers: a kind and its files."""
