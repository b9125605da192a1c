"""Run folders: training writes configs, checkpoints and metrics, and all other parts of timemix read these files."""
