"""Compare exported GGUF files in llama.cpp with timemix: token ids, logits and greedy tokens.

python benchmarks/gguf_files.py [--vocabulary rwkv_vocab_v20230424.txt] [--json runs/gguf.json]

Each case is a random model of RWKV-6 or RWKV-7 with one kind of vocabulary, in one number format. The script needs the
package llama_cpp, as benchmarks/rwkv7.py does. Without --vocabulary, the cases of the World tokenizer are skipped.
"""

import argparse
import ctypes
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from other_programs import LlamaCpp
from rwkv7_common import random_model

from timemix.config.run import RunConfig
from timemix.interop.gguf import export_gguf
from timemix.models.language_model import LanguageModel
from timemix.models.registry import model_config
from timemix.runs.folder import Progress
from timemix.runs.save import save_checkpoint
from timemix.tokenizers.base import Tokenizer
from timemix.tokenizers.make import train_tokenizer
from timemix.tokenizers.world import read_world

TEXT = (
    "The quick brown fox doesn't jump over 12,345 lazy dogs:\n\n    it walks.\t\"Why?\" she'll ask...  \n"
    "Ünïcödé, naïve café; Ελληνικά, русский язык, 日本語の文章、中文字符。 한국어 🙂👍🏽 e\u0301 \u00a0\u2003x\n"
    "def f(x):\n\treturn x**2  # [MASK] <s> </s> <|endoftext|> [PAD65530] ÿþ \\x41 \\n\n"
) * 3
ASCII = "".join(c for c in TEXT if c.isascii())
FORMATS = ("f32", "f16", "bf16", "q8_0")
STEPS = 64


def tokenizers(vocabulary: Path | None) -> Iterator[tuple[str, Tokenizer, str]]:
    """Yield the name of each kind of vocabulary, its tokenizer, and a text that it can encode."""
    yield "subword", train_tokenizer("subword", TEXT, vocab_size=400), TEXT
    yield "byte", train_tokenizer("byte", TEXT), TEXT
    yield "character, ASCII", train_tokenizer("character", ASCII), ASCII
    yield "character, bytes", train_tokenizer("character", TEXT[:120], unknown="byte"), TEXT
    if vocabulary is not None:
        yield "World", read_world(vocabulary), TEXT


def write_run(folder: Path, model: LanguageModel, tokenizer: Tokenizer) -> Path:
    """Write a model as a run."""
    progress = Progress(step=0, seconds=0.0, valid_loss=None, valid_step=None)
    weights = {name: x.detach() for name, x in model.state_dict().items()}
    save_checkpoint(folder, {"model": weights}, RunConfig(model=model.config), tokenizer, progress)
    return folder


class Reader(LlamaCpp):
    """A model in llama.cpp, with its tokenizer."""

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        data = text.encode()
        room = (self.lib.llama_token * (len(data) + 8))()
        vocabulary = self.lib.llama_model_get_vocab(self._model)
        count = self.lib.llama_tokenize(vocabulary, data, len(data), room, len(room), False, False)
        return list(room[:count])

    def text(self, ids: list[int]) -> bytes:
        """Return the bytes of tokens."""
        vocabulary, found = self.lib.llama_model_get_vocab(self._model), b""
        for token in ids:
            room = (ctypes.c_char * 512)()
            count = self.lib.llama_token_to_piece(vocabulary, token, room, len(room), 0, False)
            found += room.raw[:count]
        return found


def compare(model: LanguageModel, tokenizer: Tokenizer, text: str, file: Path) -> dict[str, Any]:
    """Compare a file in llama.cpp with a model: token ids, text, the largest difference of logits, greedy tokens."""
    reader = Reader(file, 1, 1)
    ours = tokenizer.encode(text).tolist()
    ids = reader.ids(text)
    prompt, state = ours[:200], model.init_state(1)
    with torch.no_grad():
        logits, state = model(torch.tensor([prompt]), state, logits="last")
    reader([prompt])
    worst, equal, V = 0.0, 0, model.config.vocab_size
    for _ in range(STEPS):
        own, other = logits[0].reshape(-1), reader.logits(V)
        worst = max(worst, float((own - other).abs().max() / own.abs().max()))
        token = int(own.argmax())
        equal += token == int(other.argmax())
        with torch.no_grad():
            logits, state = model(torch.tensor([[token]]), state, logits="last")
        reader([[token]])
    pieces = reader.text(ours)
    reader.close()
    return {
        "tokens": len(ours),
        "equal ids": ids == ours,
        "equal text": pieces == text.encode(),
        "logit error": worst,
        "equal greedy tokens": f"{equal} of {STEPS}",
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=Path, help="vocabulary file of the World tokenizer")
    parser.add_argument("--json", type=Path, default=Path("runs/gguf.json"), help="file of the results")
    asked = parser.parse_args(arguments)
    rows = []
    for arch in ("rwkv6", "rwkv7"):
        for name, tokenizer, text in tokenizers(asked.vocabulary):
            config = model_config(arch, layers=3, channels=128, heads=2, vocab_size=tokenizer.vocab_size, ctx_len=256)
            model = random_model(config).eval()
            with tempfile.TemporaryDirectory() as folder:
                run = write_run(Path(folder) / "run", model, tokenizer)
                for dtype in FORMATS:
                    file = Path(folder) / f"{dtype}.gguf"
                    export_gguf(run, file, dtype=dtype)
                    found = compare(model, tokenizer, text, file)
                    rows.append({"model": arch, "vocabulary": name, "format": dtype, **found})
                    print(json.dumps(rows[-1]), flush=True)
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
