"""Benchmarks of the op, of a training step and of generation, each beside baselines in the same run."""
