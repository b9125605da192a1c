"""Files with any content: their code never runs, reading ends and takes little memory, an error is one sentence."""

import contextlib
import json
import math
import os
import pickle
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import timemix
from tests.helpers.limits import a_gibibyte_more, seconds
from tests.helpers.runs import small_config, write_text_file
from timemix.data.corpus import open_corpus
from timemix.data.prepare import prepare
from timemix.errors import LONGEST, FileError, TimemixError
from timemix.runs import folder as run_folder
from timemix.runs.metrics import read_metrics
from timemix.tokenizers.make import load_tokenizer
from timemix.training.start import new_run, resume_run

PACKAGE = Path(timemix.__file__).parent


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A run on a prepared folder."""
    folder = tmp_path_factory.mktemp("good")
    prepare(folder / "tokens", small_config(write_text_file(folder)).data)
    new_run(small_config(folder / "tokens", steps=4), folder / "run").run()
    return folder


@pytest.fixture
def run(good, tmp_path):
    shutil.copytree(good / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def tokens(good, tmp_path):
    shutil.copytree(good / "tokens", tmp_path / "tokens")
    return tmp_path / "tokens"


def refused(action, name: str) -> None:
    with pytest.raises(FileError) as error:
        action()
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


class Payload:
    """Code that unpickling would run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def header(raw: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(raw: bytes, change) -> bytes:
    head, body = header(raw)
    changed = json.dumps(change(head) or head).encode()
    return struct.pack("<Q", len(changed)) + changed + body


def entry(head: dict, **fields) -> None:
    head["head.weight"] |= fields


WEIGHTS = {
    "empty": lambda raw: b"",
    "seven bytes": lambda raw: raw[:7],
    "half a header": lambda raw: raw[:50],
    "half the weights": lambda raw: raw[: len(raw) // 2],
    "a byte less": lambda raw: raw[:-1],
    "a byte more": lambda raw: raw + b"\0",
    "noise": lambda raw: np.random.default_rng(0).bytes(4096),
    "header length 0": lambda raw: struct.pack("<Q", 0) + raw[8:],
    "header length 2^63": lambda raw: struct.pack("<Q", 2**63) + raw[8:],
    "header past the end": lambda raw: struct.pack("<Q", len(raw)) + raw[8:],
    "header no JSON": lambda raw: raw[:8] + b"x" + raw[9:],
    "header a list": lambda raw: struct.pack("<Q", 2) + b"[]" + raw,
    "header deep": lambda raw: struct.pack("<Q", 200_000) + b"[" * 100_000 + b"]" * 100_000 + raw,
    "offsets past the end": lambda raw: with_header(raw, lambda h: entry(h, data_offsets=[0, 2**40])),
    "offsets backwards": lambda raw: with_header(raw, lambda h: entry(h, data_offsets=[8, 0])),
    "offsets negative": lambda raw: with_header(raw, lambda h: entry(h, data_offsets=[-4, 0])),
    "a shape of 2^80": lambda raw: with_header(raw, lambda h: entry(h, shape=[2**40, 2**40])),
    "an unknown dtype": lambda raw: with_header(raw, lambda h: entry(h, dtype="F31")),
    "integers": lambda raw: with_header(raw, lambda h: entry(h, dtype="I32")),
    "another name": lambda raw: with_header(raw, lambda h: {k.replace("head.w", "had.w"): v for k, v in h.items()}),
    "swapped with the optimizer": lambda raw: None,
}


@pytest.mark.parametrize("damage", WEIGHTS)
def test_weights(run, damage):
    path = run_folder.newest(run) / "model.safetensors"
    raw = WEIGHTS[damage](path.read_bytes())
    path.write_bytes(path.with_name("training.safetensors").read_bytes() if raw is None else raw)
    refused(lambda: timemix.load(run), "model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "tokenizer.json", "training.json"])
@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_pickles_are_never_run(run, tmp_path, name, kind):
    path, marker = run_folder.newest(run) / name, tmp_path / "marker"
    if kind == "torch":
        torch.save(Payload(marker), path)
    else:
        path.write_bytes(pickle.dumps(Payload(marker)))
    refused(lambda: resume_run(run) and timemix.load(run), name)
    assert not marker.exists()


def test_the_package_unpickles_nothing():
    unsafe = r"^\s*(import|from) (pickle|marshal|shelve|dill|joblib)\b|torch\.load\(|allow_pickle=True"
    found = [p.name for p in PACKAGE.rglob("*.py") if re.search(unsafe, p.read_text(), re.MULTILINE)]
    assert not found


CONFIG = {
    "layers": ("layers = 2", "layers = 1000000000000"),
    "channels": ("channels = 16", "channels = 4611686018427387904"),
    "ctx_len": ("ctx_len = 16", "ctx_len = 4611686018427387904"),
    "ctx_len of another model": ("ctx_len = 16", "ctx_len = 100000000"),
    "heads 0": ("heads = 4", "heads = 0"),
    "vocab_size": ("vocab_size = ", "vocab_size = -"),
    "ffn_ratio": ("ffn_ratio = 3.0", "ffn_ratio = nan"),
    "infinite ffn_ratio": ("ffn_ratio = 3.0", "ffn_ratio = inf"),
    "a text for a number": ("layers = 2", 'layers = "2"'),
    "a list for a number": ("layers = 2", "layers = [2]"),
    "an unknown field": ("layers = 2", "layers = 2\nlayer = 2"),
    "twice": ("layers = 2", "layers = 2\nlayers = 2"),
    "token_shift": ("token_shift = [", "token_shift = [" + "0.0, " * 100_000),
    "deep": ("layers = 2", "layers = " + "[" * 100_000),
    "NUL": ("layers = 2", "layers = 2\0"),
}


@pytest.mark.parametrize("damage", CONFIG)
def test_configs(run, damage):
    path = run_folder.newest(run) / "config.toml"
    old, new = CONFIG[damage]
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    refused(lambda: timemix.load(run), "config.toml")


PROGRESS = {
    "step": -1,
    "seconds": "long",
    "valid_loss": "low",
    "losses_since_line": [1.0, "x"],
    "usual_loss": [1.0, 2.0],
    "data": {},
}


@pytest.mark.parametrize("field", PROGRESS)
def test_training_progress(run, field):
    path = run_folder.newest(run) / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: PROGRESS[field]}))
    refused(lambda: resume_run(run), "run")


JSON = {
    "empty": b"",
    "cut": b'{"version": "1.0", ',
    "a number": b"3",
    "deep": b"[" * 100_000,
    "a huge number": b'{"model": ' + b"9" * 5000 + b"}",
    "not UTF-8": b"\xff\xfe{}",
    "NUL": b"{}\0",
}


@pytest.mark.parametrize("damage", JSON)
@pytest.mark.parametrize("name", ["tokenizer.json", "data.json"])
def test_json(tokens, name, damage):
    (tokens / name).write_bytes(JSON[damage])
    refused(lambda: open_corpus(tokens), name)


@pytest.mark.parametrize("name", ["train-00000.bin", "valid-00000.bin"])
@pytest.mark.parametrize("damage", ["empty", "cut", "longer", "flipped", "swapped"])
def test_token_files(tokens, name, damage):
    path = tokens / name
    raw = path.read_bytes()
    flipped = bytes([raw[0] ^ 1]) + raw[1:]
    other = (tokens / ("valid" + name[5:] if name.startswith("train") else "train" + name[5:])).read_bytes()
    path.write_bytes(
        {"empty": b"", "cut": raw[:-1], "longer": raw + b"\0", "flipped": flipped, "swapped": other}[damage]
    )
    refused(lambda: open_corpus(tokens), name)


@pytest.mark.parametrize("instead", ["folder", "pipe", "device", "dangling link", "loop of links"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.toml", "tokenizer.json", "training.json"])
def test_what_is_no_file(run, name, instead):
    path = run_folder.newest(run) / name
    path.unlink()
    if instead == "folder":
        path.mkdir()
    elif instead == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "dangling link": "nowhere", "loop of links": path.name}[instead])
    refused(lambda: timemix.load(run), name if instead != "loop of links" else "")


@pytest.mark.parametrize("lines", [b"\xff\xff\n{}\n", b"[1]\n{}\n", b"{\n{}\n", b"[" * 100_000 + b"\n{}\n"])
def test_metrics(run, lines):
    (run / "metrics.jsonl").write_bytes(lines)
    refused(lambda: read_metrics(run), "metrics.jsonl")


def test_flipped_bits_in_a_header_are_named_or_harmless(run):
    path = run_folder.newest(run) / "model.safetensors"
    raw = path.read_bytes()
    draw = np.random.default_rng(5)
    for _ in range(60):
        place = int(draw.integers(0, 8 + struct.unpack("<Q", raw[:8])[0]))
        damaged = bytearray(raw)
        damaged[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(damaged)
        with contextlib.suppress(TimemixError):
            logits, _ = timemix.load(run).model(torch.zeros(1, 4, dtype=torch.int64))
            assert not math.isnan(logits.sum().item())


def test_names_in_a_tokenizer_are_no_paths(tokens):
    path = tokens / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"] = {"../../escape": 0, "/etc/passwd": 1}
    path.write_text(json.dumps(document))
    before = sorted(tokens.parent.rglob("*"))
    refused(lambda: load_tokenizer(path), "tokenizer.json")
    assert sorted(tokens.parent.rglob("*")) == before


VALUES = ["-1", "0", "1.5", "3e9", "9223372036854775808", "1e400", "NaN", "inf", "true", "null", '"x"', "[]", "{}"]
VALUES += ["9" * 5000, "[" * 5000, '{"a":' * 3000, '"' + "a" * 10**6 + '"', '"\\u0000"', '"\\ud800"', "99999", "'"]
PATHS = ["../../../../etc/passwd", "/dev/zero", "/etc", "", "~", "\\u0000", "file:///etc/passwd", "a/" * 3000]


def changed_text(raw: bytes, draw: np.random.Generator) -> bytes:
    """Return a JSON or TOML file with one value, text or line replaced, repeated or removed."""
    text = raw.decode()
    kind = draw.integers(4)
    pattern = [r"-?[\d.]+|true|false|null", r'(?<=")[^"\n]*(?=")', r"[^\n]*\n?", r"[\[\]{}:,=\"]"][kind]
    places = list(re.finditer(pattern, text))
    if not places:
        return raw + b"["
    place = places[draw.integers(len(places))]
    found = place.group()
    instead = [VALUES, [*PATHS, *VALUES], ["", found * 2, "# " + found], ["", found * 2, *VALUES]][kind]
    return (text[: place.start()] + str(draw.choice(instead)) + text[place.end() :]).encode()


def changed_header(raw: bytes, draw: np.random.Generator) -> bytes:
    """Return a safetensors file with one value of its header, or its length, replaced."""
    size = struct.unpack("<Q", raw[:8])[0]
    if draw.integers(5) == 0:
        return struct.pack("<Q", int(draw.choice([0, 1, size - 1, size + 1, len(raw), 2**31, 2**40, 2**63]))) + raw[8:]
    head = changed_text(raw[8 : 8 + size], draw)
    return struct.pack("<Q", len(head)) + head + raw[8 + size :]


def damaged(path: Path, others: list[Path], draw: np.random.Generator, pickled: bytes) -> bytes:
    """Damage a good file: cut it, flip bits, overwrite, shuffle, change a value, or replace the file."""
    raw = path.read_bytes()
    a, b = sorted(int(x) for x in draw.integers(0, len(raw) + 1, 2))
    kind = draw.integers(10)
    if kind == 0:
        return raw[:a]
    if kind == 1:
        return raw[:a] + raw[b:]
    if kind == 2:
        return raw[:a] + draw.bytes(min(b - a, 64)) + raw[a + min(b - a, 64) :]
    if kind == 3:
        return raw[:b] + raw[a:]
    if kind == 4:
        return others[draw.integers(len(others))].read_bytes()
    if kind == 5:
        return [pickled, b"", b"\0" * 10**6, draw.bytes(1000), b"PK\3\4" + raw, b"\xef\xbb\xbf" + raw][draw.integers(6)]
    if kind < 8 and path.suffix in (".json", ".jsonl", ".toml"):
        return changed_text(raw, draw)
    if kind < 8 and path.suffix == ".safetensors":
        return changed_header(raw, draw)
    flipped = bytearray(raw)
    for _ in range(draw.integers(1, 4)):
        # Half of the flips are in the first bytes, which have lengths and headers.
        place = draw.integers(len(raw) if draw.integers(2) else min(len(raw), 300))
        flipped[place] ^= 1 << int(draw.integers(8))
    return bytes(flipped)


@pytest.mark.slow
def test_two_thousand_damaged_files(good, tmp_path):
    """Each file loads or is rejected with one short sentence, without another error, a hang or a gibibyte of memory."""
    shutil.copytree(good / "run", tmp_path / "run")
    shutil.copytree(good / "tokens", tmp_path / "tokens")
    run = tmp_path / "run"
    config = run / "config.toml"
    config.write_text(config.read_text().replace(str(good), str(tmp_path)))
    files = sorted(p for p in tmp_path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
    assert {p.name for p in files} == NAMES
    pickled = pickle.dumps(Payload(tmp_path / "marker"))
    readers = (
        lambda: timemix.load(run, checkpoint="newest"),
        lambda: resume_run(run).lock.release(),
        lambda: read_metrics(run),
        lambda: open_corpus(tmp_path / "tokens"),
    )
    for reader in readers:
        reader()
    draw = np.random.default_rng(11)
    refusals = 0
    with a_gibibyte_more():
        for i in range(2000):
            path = files[i % len(files)]
            raw = path.read_bytes()
            path.write_bytes(damaged(path, files, draw, pickled))
            sentences = []
            for reader in readers:
                try:
                    with seconds(20):
                        reader()
                except TimemixError as error:
                    sentences.append(str(error))
                except BaseException as error:
                    shutil.copy(path, tmp_path / "failed")
                    raise AssertionError(f"file {i}, damaged {path.name}: {error!r}") from error
            assert all("\n" not in s and len(s) <= LONGEST for s in sentences), (i, path.name, sentences)
            refusals += bool(sentences)
            path.write_bytes(raw)
    assert not (tmp_path / "marker").exists()
    assert refusals > 1000


SUFFIXES = (".safetensors", ".json", ".jsonl", ".toml", ".bin")
NAMES = {"model.safetensors", "training.safetensors", "config.toml", "tokenizer.json", "training.json", "data.json"}
NAMES |= {"metrics.jsonl", "train-00000.bin", "valid-00000.bin"}
