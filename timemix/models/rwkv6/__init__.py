"""The architectures RWKV-5 (5.2) and RWKV-6."""
