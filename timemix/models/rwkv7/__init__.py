"""The RWKV-7 architecture."""
