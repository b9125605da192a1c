"""Storage: atomic file writes, locks, tensors, and checked JSON and TOML."""
