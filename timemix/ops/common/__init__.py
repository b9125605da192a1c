"""What the ops of several architectures share: convolutions, histories, kernels between matrix products."""
