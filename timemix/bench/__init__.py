"""Benchmarks of the op wkv1, of a training step and of generation. Each benchmark times baselines in the same run."""
