"""Empty documents, duplicates and near-duplicates: counts, dropped documents, and signatures against brute force."""

import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.commands import run_command
from tests.helpers.tiers import examples
from timemix.data import duplicates, minhash
from timemix.data.config import DataConfig
from timemix.data.corpus import open_corpus
from timemix.data.describe import describe
from timemix.data.duplicates import DocumentCounts, Reading
from timemix.data.minhash import SHINGLE, VALUES, Signature, near_duplicates, signatures
from timemix.data.prepare import prepare
from timemix.data.sources import open_source
from timemix.errors import InvalidValue
from timemix.runtime.progress import untold
from timemix.tokenizers.base import DOCUMENT_END

RANDOM = random.Random(0)
WORDS = ["".join(RANDOM.choices("abcdefghijklmnopqrstuvwxyz", k=RANDOM.randint(2, 9))) for _ in range(3000)]


def generated(words=100):
    return " ".join(RANDOM.choices(WORDS, k=words))


def edited(text, share):
    """Replace a share of the words of a text."""
    return " ".join(RANDOM.choice(WORDS) if RANDOM.random() < share else word for word in text.split(" "))


def signature(*pieces):
    own = Signature()
    for piece in pieces:
        own.add(piece)
    return np.frombuffer(own.values(), np.uint8)


def shingles(text):
    text = text.ljust(SHINGLE).replace("\n", " ")
    return {text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)}


def jaccard(a, b):
    return len(a & b) / len(a | b)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_near_duplicates_are_found_as_brute_force_finds_them():
    texts = []
    for _ in range(400):
        text = generated(RANDOM.choice([20, 50, 100, 300]))
        texts += [text, *(edited(text, RANDOM.choice([0.01, 0.03, 0.06, 0.12])) for _ in range(2))]
    order = RANDOM.sample(range(len(texts)), len(texts))
    sets = [shingles(texts[i]) for i in order]
    found = near_duplicates(np.stack([signature(texts[i]) for i in order]))
    similar = np.zeros(len(texts))
    family = {}
    for place, i in enumerate(order):
        for other in family.setdefault(i // 3, []):
            similar[place] = max(similar[place], jaccard(sets[place], sets[other]))
        family[i // 3].append(place)
    for low, high, least, most in ((0.9, 1, 0.99, 1), (0.85, 0.9, 0.95, 1), (0.75, 0.85, 0.3, 0.95), (0, 0.7, 0, 0.01)):
        share = found[(similar >= low) & (similar < high)].mean()
        assert least <= share <= most, (low, share)
    # Precision and recall at the threshold, and precision at a similarity of 0.7.
    assert (similar[found] >= 0.8).mean() > 0.85
    assert found[similar >= 0.8].mean() > 0.9
    assert (similar[found] >= 0.7).mean() > 0.99


@pytest.mark.slow
def test_the_estimate_has_the_stated_error():
    errors, scales = [], []
    for words in (30, 100, 1000):
        for share in (0.02, 0.1, 0.3):
            for _ in range(40):
                a = generated(words)
                b = edited(a, share)
                real = jaccard(shingles(a), shingles(b))
                equal = (signature(a) == signature(b)).mean()
                errors.append((equal - 1 / 256) / (1 - 1 / 256) - real)
                scales.append((real * (1 - real) / VALUES) ** 0.5)
    assert abs(np.mean(errors)) < 0.005
    assert 0.9 < np.std(errors) / np.sqrt(np.mean(np.square(scales))) < 1.1


def test_unrelated_documents_are_kept():
    assert not near_duplicates(np.stack([signature(generated(60)) for _ in range(3000)])).any()


def test_bands_of_many_equal_documents_end():
    same = np.tile(signature(generated()), (5000, 1))
    assert near_duplicates(same).tolist() == [False] + [True] * 4999
    assert near_duplicates(np.zeros((0, VALUES), np.uint8)).tolist() == []


@given(st.text(max_size=60), st.lists(st.integers(0, 60), max_size=4), st.integers(1, 40))
@examples(100, fast=8)
def test_hash_and_signature_do_not_depend_on_the_pieces(text, cuts, block):
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minhash, "BLOCK", block)
        expected = signature(text).tolist()
        assert signature(*pieces).tolist() == expected
        assert [row.tolist() for row in signatures([*pieces, text])] == [signature(t).tolist() for t in (*pieces, text)]
        patch.setattr(duplicates, "BLOCK", block)
        record, file = Reading(counts=True), Reading(counts=True)
        assert list(record.records(iter([text]))) == [text]
        assert list(file.file(iter(pieces))) == pieces
        assert record.hashes().tolist() == file.hashes().tolist()
        assert (record.hashes()[0] == 0) == (not text.strip())


def test_a_signature_is_that_of_the_formula():
    text = generated(50)
    hashes = np.unique(minhash.shingle_hashes(text)).tolist()
    expected = [min((h for h in hashes if h >= i * 2**64 // VALUES), default=hashes[0]) % 256 for i in range(VALUES)]
    assert signature(text).tolist() == expected
    assert signature(text).tolist() == signature(text.replace(" ", "\n")).tolist()


def planted(tmp_path):
    texts = [generated() for _ in range(40)]
    near = [" ".join([*text.split(" ")[:50], "edited", *text.split(" ")[51:]]) for text in texts[20:23]]
    rows = [*texts[:10], "", texts[3], *near, *texts[10:], " \n", texts[3], texts[0]]
    return texts, near, write(tmp_path / "a.jsonl", rows)


def test_documents_are_counted_and_kept(tmp_path):
    *_, path = planted(tmp_path)
    lines = []
    found = describe(DataConfig(source=path, tokenizer="byte"), progress=lines.append)
    assert found.documents == DocumentCounts(total=48, empty=2, duplicates=3, dropped=0)
    assert found.train.documents + found.valid.documents == 47
    assert lines == ["a.jsonl: 48 documents, 2 empty, 3 duplicates; kept the duplicates"]


@pytest.mark.parametrize("documents", [None, False])
def test_dropped_documents_are_missing_in_each_reading(tmp_path, documents):
    texts, near, path = planted(tmp_path)
    end = "\n" if documents is False else DOCUMENT_END
    for drop, kept, dropped in (
        ("exact", [*texts[:10], *near, *texts[10:]], 5),
        # The edited documents come first, so the originals are dropped.
        ("near", [*texts[:10], *near, *texts[10:20], *texts[23:]], 8),
    ):
        source = open_source(path, documents=documents, drop_duplicates=drop)
        for _ in range(3):
            text = "".join(text for _, text in source.read(untold))
            assert text.removesuffix(end) == end.join(kept)
        assert source.counted.counts.dropped == dropped


def test_files_of_a_folder_are_documents(tmp_path):
    for name, text in (("a", "one"), ("b", "two"), ("c", "one"), ("d", ""), ("e", "three")):
        (tmp_path / f"{name}.txt").write_text(text)
    write(tmp_path / "f.jsonl", ["two", "four"])
    source = open_source(str(tmp_path), drop_duplicates="exact", documents=True)
    pieces = list(source.read(untold))
    assert "".join(text for _, text in pieces) == "".join(
        text + DOCUMENT_END for text in ("one", "two", "three", "four")
    )
    assert [number for number, text in pieces if text != DOCUMENT_END] == [0, 1, 4, 5]
    assert source.counted.counts == DocumentCounts(total=7, empty=1, duplicates=2, dropped=3)


def test_a_prepared_folder_records_the_counts(tmp_path, caplog):
    texts, _, path = planted(tmp_path)
    valid = write(tmp_path / "valid.jsonl", [texts[0], texts[1], texts[1], generated()])
    config = DataConfig(source=path, valid=valid, tokenizer="byte", drop_duplicates="near")
    prepare(tmp_path / "tokens", config)
    info = open_corpus(tmp_path / "tokens").info
    assert info.documents == DocumentCounts(total=48, empty=2, duplicates=3, near_duplicates=3, dropped=8)
    assert info.valid_documents == DocumentCounts(
        total=4, empty=0, duplicates=1, near_duplicates=0, dropped=1, in_training=2
    )
    assert (info.train.documents, info.valid.documents) == (40, 3)
    assert (
        "2 of 4 documents of valid.jsonl are also training documents: the validation loss will be too low; remove them"
        " from one of the texts"
    ) in caplog.text


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planted(tmp_path)
    options = ("--data.tokenizer", "byte", "--data.drop-duplicates", "near")
    status, out, err = run_command(capsys, "data", "a.jsonl", *options)
    rows = {line[:32].strip(): line[32:] for line in out.splitlines()}
    assert status == 0
    names = ("total", "empty", "duplicates", "near duplicates", "dropped")
    assert [rows[f"documents {name}"] for name in names] == ["48", "2", "3", "3", "8"]
    assert err == "a.jsonl: 48 documents, 2 empty, 3 duplicates, 3 near-duplicates; dropped 8\n"
    assert run_command(capsys, "data", "a.jsonl", *options, "--out", "tokens")[0] == 0
    status, _, err = run_command(capsys, "data", "builtin", *options)
    assert status == 2
    assert err == (
        "timemix: --data.drop-duplicates='near' has no effect on builtin, which is one document; leave"
        " --data.drop-duplicates out, or name a folder or a file of records\n"
    )


def test_all_documents_empty(tmp_path):
    path = write(tmp_path / "a.jsonl", ["", " ", "\n"])
    with pytest.raises(InvalidValue, match=r"a\.jsonl is empty; name a source with text"):
        list(open_source(path, drop_duplicates="exact").read(untold))
