"""Evaluation by document: each document is read alone, and has equal weight in the mean."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import timemix
from tests.helpers.commands import run_command
from tests.helpers.models import VARIANTS, build
from tests.helpers.runs import TEXT, small_config, write_text_file
from tests.helpers.tiers import examples, slow
from timemix.errors import InvalidValue
from timemix.evaluation.documents import DocumentLosses
from timemix.evaluation.loss import loss_per_token
from timemix.evaluation.texts import evaluate_held_out, evaluate_text
from timemix.tokenizers.base import DOCUMENT_END
from timemix.training.start import new_run

END = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of rwkv7 on documents and on a text without documents, and of rwkv1_exp on documents."""
    folder = tmp_path_factory.mktemp("runs")
    write_text_file(folder)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT.splitlines()))
    for name, source, arch in (
        ("documents", "text.jsonl", "rwkv7"),
        ("plain", "text.txt", "rwkv7"),
        ("exponentials", "text.jsonl", "rwkv1_exp"),
    ):
        new_run(small_config(folder / source, arch, steps=4), folder / name).run()
    return folder


@examples(30)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=60), st.integers(1, 9))
def test_means_of_documents_do_not_depend_on_the_pieces(tokens, size):
    """`tokens[t]` precedes a target whose loss is t + 1; the token 3 begins a document."""
    losses, begins = np.arange(1.0, len(tokens) + 1), np.array(tokens) == END
    documents = DocumentLosses()
    for i in range(0, len(tokens), size):
        documents.add(losses[i : i + size], begins[i : i + size], np.ones(len(losses[i : i + size]), bool))
    parts = [part.mean() for part in np.split(losses, begins.nonzero()[0]) if len(part)]
    assert documents.count == len(parts)
    assert documents.mean == pytest.approx(np.mean(parts))


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("rwkv1", {}),
        slow("rwkv1", {"stride": 5}),
        ("rwkv7", {}),
        ("rwkv7", {"stride": 5}),
        ("rwkv7", {"carry_state": True}),
    ],
)
@pytest.mark.parametrize("tail", [slow([]), slow([END]), [END, END], [END, 5]])
def test_each_document_counts_once_with_the_loss_that_it_has_alone(arch, options, tail):
    """All documents fit into a window or, with a carried state, are longer."""
    longest = 30 if options.get("carry_state") else 6
    generator = np.random.default_rng(1)
    texts = [generator.choice([0, 1, 2, 4, 5], n) for n in (*generator.integers(0, longest, 20), 0, 1)]
    tokens = np.concatenate([*(np.append(text, END) for text in texts), tail]).astype(np.uint8)
    model, documents = build(VARIANTS[arch], ctx_len=longest), DocumentLosses()
    if not options:
        # Every window begins with a document.
        tokens = np.concatenate([np.append(np.resize(text, longest - 1), END) for text in texts if len(text)])
        tokens = np.concatenate([[END], tokens, tail]).astype(np.uint8)
    elif "stride" in options:
        model = build(VARIANTS[arch], ctx_len=longest + 5)
    loss = loss_per_token(model, tokens, document_start=END, documents=documents, **options)
    borders, losses = (tokens[:-1] == END).nonzero()[0], []
    for part in np.split(np.arange(len(tokens) - 1), borders):
        if len(part):
            x, y = (torch.from_numpy(tokens[part + i].astype(np.int64)) for i in (0, 1))
            with torch.no_grad():
                losses.append(F.cross_entropy(model(x[None])[0][0], y, reduction="none"))
    assert documents.count == len(losses)
    assert documents.mean == pytest.approx(float(torch.stack([x.mean() for x in losses]).mean()), rel=1e-6)
    assert loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-6)


def test_evaluate_reports_documents(runs):
    result = timemix.evaluate(runs / "documents", by_document=True)
    plain = timemix.evaluate(runs / "documents")
    loaded = timemix.load(runs / "documents")
    corpus = loaded.corpus()
    assert result.documents == corpus.info.valid.documents == 6
    assert abs(result.nats_per_token_by_document - result.nats_per_token) > 1e-5
    assert (plain.documents, plain.nats_per_token_by_document) == (None, None)
    assert result.nats_per_token != plain.nats_per_token
    separate = evaluate_held_out(loaded.model, corpus, cross_documents=False)
    assert separate.nats_per_token == pytest.approx(result.nats_per_token, abs=1e-6)
    # The held-out documents as a text in memory
    ids, end = corpus.valid[:], corpus.tokenizer.end_of_text
    texts = [corpus.tokenizer.decode(part) for part in np.split(ids, (ids == end).nonzero()[0] + 1)]
    text = "".join(text + DOCUMENT_END for text in texts[:6])
    assert evaluate_text(loaded.model, loaded.tokenizer, text, by_document=True) == result


def test_a_text_without_documents_is_one_document(runs):
    assert timemix.evaluate(runs / "documents", "the cat sat", by_document=True).documents == 1


def test_a_vocabulary_without_documents_is_refused(runs):
    with pytest.raises(InvalidValue, match="by_document is True, but the vocabulary has no end-of-text token; leave"):
        timemix.evaluate(runs / "plain", TEXT, by_document=True)


def test_the_verb_reports_documents(runs, capsys):
    run, records = runs / "documents", runs / "text.jsonl"
    status, out, _ = run_command(capsys, "eval", run, "--by-document")
    assert status == 0
    assert out.splitlines()[-1].endswith("nats per token, mean over 6 documents of equal weight")

    def report(*arguments):
        return json.loads(run_command(capsys, "eval", *arguments, "--json")[1])

    found = report(run, "--by-document")
    assert found["documents"] == 6
    assert f"{found['nats_per_token_by_document']:.4f}" == out.splitlines()[-1].split()[0]
    assert "documents" not in report(run)
    assert report(run, "--data", records, "--by-document")["documents"] == 60
    assert report(run, "--data", runs / "text.txt", "--by-document")["documents"] == 1
    assert report(run, "--data", records)["tokens"] == report(run, "--data", records, "--by-document")["tokens"]
    error = run_command(capsys, "eval", runs / "exponentials", "--by-document", "--carry-state")[2]
    sentence = "--carry-state is True, which this rwkv1_exp does not support for separate documents; leave it out"
    assert error == f"timemix: {sentence}\n"
    error = run_command(capsys, "eval", run, "--tasks", "t", "--by-document")[2]
    assert error == "timemix: --by-document is for a text, not for tasks; leave out --by-document or --tasks\n"
