"""Published weights for tests: the golden file, its tokenizer, and runs and files that hold its weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from timemix.interop.importing import import_run
from timemix.tokenizers.make import train_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden/published"
PTH = GOLDEN / "rwkv7.pth"
TEXT = "the cat sat on the mat, and the dog ran to the hut on the hill!\n" * 40


def published_weights() -> dict[str, torch.Tensor]:
    """Return the weights of the golden file, as PyTorch reads them."""
    weights: dict[str, torch.Tensor] = torch.load(PTH, weights_only=True)
    return weights


def expected() -> dict[str, torch.Tensor]:
    """Return the tokens `input` and the `logits` of the original code."""
    found = load_file(GOLDEN / "rwkv7-expected.safetensors")
    return {"input": found["input"].long(), "logits": found["logits"]}


def tokenizer_file(folder: Path) -> Path:
    """Write a tokenizer of 50 tokens, the vocabulary size of the golden file."""
    letters = sorted(set(TEXT)) + [chr(code) for code in range(0x3B1, 0x3B1 + 50)]
    train_tokenizer("character", "".join(letters[:50])).save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


def imported(folder: Path, path: Path = PTH, name: str = "imported") -> Path:
    """Import weights with the size of the golden file as a run in a folder."""
    import_run(path, folder / name, tokenizer_file(folder), ctx_len=32)
    return folder / name


def hugging_face_document() -> dict[str, object]:
    """Return the config.json that the converter of another program wrote for the golden file."""
    document: dict[str, object] = json.loads((GOLDEN / "rwkv7-hf.json").read_text())["config"]
    return document
