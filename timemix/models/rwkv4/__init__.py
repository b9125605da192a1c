"""The RWKV-4 architecture."""
