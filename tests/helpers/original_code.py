"""Values of the original training code of RWKV-4 to RWKV-7 (tests/golden/README.md), and models with its weights."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from timemix.models.language_model import LanguageModel
from timemix.models.registry import find_architecture, load_part, model_config

GOLDEN = Path(__file__).parents[1] / "golden"
ARCHS = ("rwkv4", "rwkv5", "rwkv6", "rwkv7")
_KINDS = ("logits", "gradients", "state", "losses", "final logits", "extreme", "extreme state")
_FLOAT32 = {"logits": 1e-5, "gradients": 1e-6, "state": 5e-5, "losses": 1e-5, "final logits": 5e-5, "extreme": 2e-5}
# In the extreme case, the state of rwkv4 holds exponents of about 100, that of rwkv5 and rwkv6 numbers of about 40.
_EXTREME = {
    "rwkv4": {"extreme state": 2e-4},
    "rwkv5": {"extreme state": 1e-4},
    "rwkv6": {"extreme state": 1e-4},
    "rwkv7": {"extreme": 1e-4, "extreme state": 1e-4},
}


def weights_module(arch):
    """Return the module that converts weights from and to the original code."""
    return load_part(find_architecture(arch).weights)


class Golden:
    """Values of the original code, and a model with its weights in a given dtype."""

    def __init__(self, arch: str, dtype: torch.dtype) -> None:
        with safe_open(GOLDEN / f"{arch}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.meta = {key: json.loads(value) for key, value in file.metadata().items()}
        self.arch, self.dtype = arch, dtype
        is_double = dtype == torch.float64
        self.tolerance = dict.fromkeys(_KINDS, 1e-9) if is_double else _FLOAT32 | _EXTREME[arch]
        self.converter = weights_module(arch)
        self.input, self.target = self.tensors["input"].long(), self.tensors["target"].long()

    def published(self, prefix: str) -> dict[str, torch.Tensor]:
        start = f"{prefix}."
        return {name.removeprefix(start): x for name, x in self.tensors.items() if name.startswith(start)}

    def our_names(self, name: str) -> list[str]:
        """Return the names in timemix of the parameters that one tensor of the original code holds."""
        weights = self.published("weights")
        names = self.converter.from_published(weights)
        weights.pop(name)
        return list(names.keys() - self.converter.from_published(weights).keys())

    def model(self, case: str = "") -> LanguageModel:
        """Return the model, whose weights are replaced by the extreme weights for the case "extreme."."""
        weights = self.published("weights") | (self.published("extreme.weights") if case else {})
        meta = self.meta
        sizes = {"layers": meta["n_layer"], "channels": meta["n_embd"], "ffn_ratio": meta["dim_ffn"] / meta["n_embd"]}
        if meta["n_head"]:
            sizes |= {"heads": meta["n_head"], "group_norm_eps": meta["group_norm_eps"]}
        config = model_config(self.arch, vocab_size=meta["vocab_size"], ctx_len=meta["ctx_len"], **sizes)
        model = LanguageModel(config).to(self.dtype)
        model.load_state_dict(self.converter.from_published(weights))
        return model

    def close(self, found: torch.Tensor, expected: str, kind: str) -> None:
        tolerance = self.tolerance[kind]
        torch.testing.assert_close(found.double(), self.tensors[expected].squeeze(), atol=tolerance, rtol=0)

    def check_step(self, step, case: str = "", tolerance: float = 1e-5) -> None:
        """Compare the logits of a decode step for a prompt, and for five more tokens."""
        prompts, slots = self.input, torch.arange(3)
        counts = torch.full((3,), prompts.shape[1])
        found, state = step(prompts.flatten(), step.model.init_state(3), slots, counts, torch.arange(prompts.numel()))
        logits = found.view(*prompts.shape, -1)
        expected = self.tensors[f"{case}logits"].squeeze()
        torch.testing.assert_close(logits[0, ::2].double(), expected, atol=tolerance, rtol=0)
        if case:
            return
        steps = []
        for tokens in self.tensors["next.tokens"].unbind(1):
            found, state = step(tokens, state, slots)
            steps.append(found)
        expected = self.tensors["next.logits"].squeeze()
        torch.testing.assert_close(torch.stack(steps, 1).double(), expected, atol=1e-5, rtol=0)


def digest(x):
    """Return 22 entries of a tensor at equal distances, the sum and the norm, as the golden file stores gradients."""
    flat = x.double().flatten()
    return torch.stack([*flat[torch.linspace(0, len(flat) - 1, 22).long()], flat.sum(), flat.norm()])
