"""The 2021 RWKV (RWKV-LM 0.01), and its form with a constant state."""
