"""Measure the speed of the World tokenizer on texts, beside other implementations that are installed.

    python benchmarks/world_tokenizer.py TEXT [TEXT ...] [--vocabulary FILE] [--rounds 9]

The implementations are the C code and the Python code of timemix, the Rust code of the package pyrwkv-tokenizer, and
the Python code of the package rwkv. The Python codes encode only the first MB of a text. The script first checks that
all implementations give the same ids. Then the implementations run in turn. Speeds are MB of UTF-8 per second of
processor time, on one core: median and range of all rounds.
"""

import argparse
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from timemix.data.sources import read_source
from timemix.data.vocabulary import world_tokenizer
from timemix.reporting.markdown import markdown_table
from timemix.runtime.machine import processor_name
from timemix.tokenizers.longest_match import LongestMatch
from timemix.tokenizers.world import WorldTokenizer

Encode = Callable[[str], Sequence[int] | np.ndarray]

START = 1_000_000
"""Number of bytes of a text that the Python codes encode."""


def implementations(tokenizer: WorldTokenizer) -> dict[str, tuple[Encode, bool]]:
    """Return the function of each implementation, and whether the function encodes the whole text."""
    match = LongestMatch([tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)])
    found: dict[str, tuple[Encode, bool]] = {
        "timemix, C": (lambda text: match.encode_in_c(text.encode()), True),
        "timemix, Python": (lambda text: match.encode_in_python(text.encode()), False),
    }
    try:
        from pyrwkv_tokenizer import RWKVTokenizer

        name = f"pyrwkv-tokenizer {importlib.metadata.version('pyrwkv-tokenizer')}, Rust"
        found[name] = (RWKVTokenizer().encode, True)
    except ImportError:
        pass
    try:
        from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

        (file,) = (
            each for each in importlib.metadata.files("rwkv") or [] if each.suffix == ".txt" and "vocab" in each.name
        )
        found[f"rwkv {importlib.metadata.version('rwkv')}, Python"] = (TRIE_TOKENIZER(str(file.locate())).encode, False)
    except ImportError:
        pass
    return found


def start_of(text: str) -> str:
    """Return about the first START bytes of a text."""
    return text.encode()[:START].decode(errors="ignore")


def measure(text: str, tokenizer: WorldTokenizer, rounds: int) -> list[list[str]]:
    """Return a row of the table for each implementation."""
    start = start_of(text)
    expected = {True: tokenizer.encode(text), False: tokenizer.encode(start)}
    speeds: dict[str, list[float]] = {}
    running = implementations(tokenizer)
    for name, (encode, whole) in running.items():
        if not np.array_equal(np.array(encode(text if whole else start)), expected[whole]):
            raise SystemExit(f"{name} gives other ids")
    for _ in range(rounds):
        for name, (encode, whole) in running.items():
            given = text if whole else start
            began = time.process_time()
            encode(given)
            speeds.setdefault(name, []).append(len(given.encode()) / 1e6 / (time.process_time() - began))
    return [
        [name, f"{statistics.median(own):.3g}", f"{min(own):.3g} to {max(own):.3g}"] for name, own in speeds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="text, as for timemix data")
    parser.add_argument("--vocabulary", help="vocabulary, as for --data.vocabulary")
    parser.add_argument("--rounds", type=int, default=9, help="rounds; default: 9")
    options = parser.parse_args()
    tokenizer = world_tokenizer(options.vocabulary)
    print(processor_name())
    for source in options.texts:
        read = read_source(source)
        size, tokens = len(read.text.encode()), len(tokenizer.encode(read.text))
        print(f"\n{read.name}: {size / 1e6:.1f} MB, {size / tokens:.2f} bytes per token; all ids are equal\n")
        print(markdown_table([["implementation", "MB/s", "range"], *measure(read.text, tokenizer, options.rounds)]))


if __name__ == "__main__":
    main()
