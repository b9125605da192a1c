"""Run folders: configs, checkpoints and metrics, as training writes and all other parts read them."""
