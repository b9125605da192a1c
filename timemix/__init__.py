"""timemix: train, compare and run RWKV language models."""

__version__ = "0.1.0"
