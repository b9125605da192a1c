"""Training: one loop for every architecture."""
