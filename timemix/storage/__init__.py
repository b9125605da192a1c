"""Atomic file writes, locks, tensor files, and checked reading of JSON and TOML."""
