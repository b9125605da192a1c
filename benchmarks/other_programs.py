"""Models of other programs, which benchmarks/rwkv7.py compares with timemix."""

import ctypes
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timemix.models.language_model import LanguageModel
from timemix.models.rwkv4 import hugging_face as rwkv4_form
from timemix.models.rwkv4 import weights as rwkv4_weights
from timemix.models.rwkv7 import hugging_face
from timemix.models.rwkv7.weights import to_published
from timemix.storage.tensors import write_tensors


def differs(found: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """Return a message if logits differ by more than a tolerance, otherwise None."""
    found, expected = found.detach().float(), expected.detach().float()
    worst = float((found - expected).abs().max() / expected.abs().max())
    return None if worst <= tolerance else f"parity failed: the logit error is {worst:.1e} times the largest logit"


def write_hf(model: LanguageModel, folder: Path) -> None:
    """Write a model as a Hugging Face folder, which rwkv7-hf and the converter of llama.cpp read."""
    folder.mkdir(parents=True)
    weights = hugging_face.to_hugging_face(to_published(model.state_dict()))
    (folder / "config.json").write_text(json.dumps(hugging_face.document(model.config, None)))
    write_tensors(folder / "model.safetensors", weights, {"format": "pt"})


def hf_model(model: LanguageModel) -> nn.Module:
    """Return the model of the package rwkv7-hf with the weights of a model.

    Raises:
        ImportError: The package is not installed.
    """
    from rwkv7_hf import RWKV7ForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        write_hf(model, Path(folder) / "hf")
        found: nn.Module = RWKV7ForCausalLM.from_pretrained(Path(folder) / "hf", dtype=torch.float32)
    return found.train()


def rwkv4_of_transformers(model: LanguageModel) -> nn.Module:
    """Return RwkvForCausalLM of transformers with the weights of a model of rwkv4.

    Raises:
        ImportError: The package transformers is not installed.
    """
    from transformers import RwkvConfig, RwkvForCausalLM

    document = rwkv4_form.document(model.config, None)
    # A model in training rescales nothing.
    found: nn.Module = RwkvForCausalLM(RwkvConfig(**{k: v for k, v in document.items() if k != "architectures"}))
    found.load_state_dict(rwkv4_form.to_hugging_face(rwkv4_weights.to_published(model.state_dict())))
    return found.train()


class RwkvPackage:
    """A model in the package rwkv, in float32.

    Args:
        model: Model that gives the weights.

    Raises:
        ImportError: The package is not installed.
    """

    def __init__(self, model: LanguageModel) -> None:
        os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
        from rwkv.model import RWKV

        published = to_published(model.state_dict())
        # The package reads these tensors, which have no effect.
        unused = {f"blocks.0.att.v{i}": published[f"blocks.1.att.v{i}"] for i in range(3)}
        with tempfile.TemporaryDirectory() as folder:
            torch.save({name: x.clone() for name, x in (published | unused).items()}, f"{folder}/model.pth")
            self._runner = RWKV(model=f"{folder}/model", strategy="cpu fp32")
        self._state: Any = None

    def clear(self) -> None:
        self._state = None

    def __call__(self, tokens: list[int]) -> Tensor:
        """Feed tokens, and return the logits (V,) after the last token."""
        logits, self._state = self._runner.forward(tokens, self._state)
        found: Tensor = logits
        return found


class LlamaCpp:
    """A model in llama.cpp, with a state for each row.

    Args:
        file: GGUF file.
        rows: Number of rows.
        threads: Number of threads.
    """

    def __init__(self, file: Path, rows: int, threads: int) -> None:
        from llama_cpp import llama_cpp

        self.lib, self.rows, self.name = llama_cpp, rows, file.stem
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {file}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = 8192, 4096, 512, rows
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        self._batch = llama_cpp.llama_batch_init(4096, 0, 1)
        self._positions = [0] * rows

    def __call__(self, tokens: list[list[int]]) -> None:
        """Feed the same number of tokens to each row. The last token of each row gets logits."""
        n = 0
        for row, own in enumerate(tokens):
            for i, token in enumerate(own):
                self._batch.token[n], self._batch.pos[n] = token, self._positions[row] + i
                self._batch.n_seq_id[n], self._batch.seq_id[n][0] = 1, row
                self._batch.logits[n] = i == len(own) - 1
                n += 1
            self._positions[row] += len(own)
        self._batch.n_tokens = n
        if fault := self.lib.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode returns {fault}")

    def logits(self, vocab_size: int) -> Tensor:
        """Return the logits (V,) after the last token of the last row."""
        found = self.lib.llama_get_logits_ith(self._context, -1)
        return torch.tensor(found[:vocab_size])

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self._context), True)
        self._positions = [0] * self.rows

    def close(self) -> None:
        self.lib.llama_batch_free(self._batch)
        self.lib.llama_free(self._context)
        self.lib.llama_model_free(self._model)
