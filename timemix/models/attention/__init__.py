"""Attention baselines."""
