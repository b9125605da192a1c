"""Speed side by side: the op, a training step, generation."""
