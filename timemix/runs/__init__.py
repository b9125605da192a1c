"""Run folders: what a training leaves, and what everything else reads."""
