"""Files: atomic writes, locks, tensors, checked JSON and TOML."""
