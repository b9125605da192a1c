"""Run folders with the configs, checkpoints and metrics that training writes and all other parts read."""
