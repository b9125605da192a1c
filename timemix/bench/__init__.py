"""Benchmarks: speed of the op, of a training step and of generation, beside baselines in the same run."""
