"""The 2021 RWKV (RWKV-LM 0.01), and a variant with a state of constant size."""
