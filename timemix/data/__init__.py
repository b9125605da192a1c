"""Data: text sources, prepared folders of tokens, and batches."""
