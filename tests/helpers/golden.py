"""Values of the original 2021 code (tests/golden/README.md)."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from timemix.models.language_model import LanguageModel
from timemix.models.registry import model_config
from timemix.models.rwkv1.weights import from_published, our_name

GOLDEN = Path(__file__).parents[1] / "golden"
ARCHITECTURES = {"RWKV": "rwkv1", "MHA_rotary": "mha_rotary", "MHA_shift": "mha_shift", "MHA_pro": "mha_pro"}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


class Golden:
    def __init__(self, name: str, dtype: torch.dtype) -> None:
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            meta = file.metadata()
        arch = ARCHITECTURES[name]
        fields = {} if name in ("MHA_rotary", "MHA_shift") else {"activation": "mish"}
        config = model_config(
            arch,
            vocab_size=int(meta["vocab_size"]),
            ctx_len=int(meta["ctx_len"]),
            layers=int(meta["n_layer"]),
            heads=int(meta["n_head"]),
            channels=int(meta["n_embd"]),
            ffn_ratio=int(meta["ffn_hidden"]) / int(meta["n_embd"]),
            **fields,
        )
        self.decayed = {our_name(n) for n in json.loads(meta["decay_params"])}
        self.model = LanguageModel(config).to(dtype)
        self.model.load_state_dict(self.group("weights"))

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        return from_published(self.published(prefix))

    def published(self, prefix: str) -> dict[str, torch.Tensor]:
        start = f"{prefix}."
        return {n.removeprefix(start): x for n, x in self.tensors.items() if n.startswith(start)}
