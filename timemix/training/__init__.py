"""Training of all architectures by one loop."""
