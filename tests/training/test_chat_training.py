"""A model trained on conversations: it answers and stops in a chat and over HTTP, and learns nothing of the user."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import timemix
from tests.helpers.commands import run_command
from tests.helpers.runs import small_config
from tests.helpers.serving import served
from timemix.config.run import read_toml
from timemix.data.batches import Batches
from timemix.data.config import DataConfig
from timemix.data.corpus import Corpus
from timemix.data.prepare import prepare
from timemix.data.shards import Tokens
from timemix.data.templates import WORLD, template_of
from timemix.errors import DamagedFile, InvalidValue
from timemix.evaluation.loss import loss_per_token
from timemix.evaluation.texts import bits_per_byte, evaluate_held_out
from timemix.experiments.identity import run_keys
from timemix.generation.conversation import Conversation
from timemix.interop.chat_template import to_jinja
from timemix.interop.export import export_run
from timemix.interop.importing import import_run
from timemix.server.engine_thread import Served
from timemix.training.start import new_run, resume_run
from timemix.training.trainer import Trainer

SUMS = {f"{a}+{a}": str(a + a) for a in range(1, 5)}
GREEDY = timemix.Sampler(temperature=0)


def conversation(questions):
    messages = []
    for question in questions:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": SUMS[question]}]
    return {"messages": messages}


def config_of(source, **train):
    settings = {"steps": 140, "batch_size": 8, "lr": 1e-2, "valid_every": 140, "save_every": 1000, "seed": 3} | train
    config = small_config(source, "rwkv7", **settings)
    data = DataConfig(source=str(source), template="world")
    return replace(config, model=replace(config.model, channels=32, ctx_len=40), data=data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with 50 conversations of one or two questions, and a run that was trained on them."""
    folder = tmp_path_factory.mktemp("chat")
    generator = np.random.default_rng(0)
    asked = [generator.permutation(list(SUMS))[: 1 + number % 2].tolist() for number in range(50)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(conversation(each)) + "\n" for each in asked))
    new_run(config_of(folder / "chat.jsonl"), folder / "run", progress=False).run()
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return timemix.load(folder / "run", checkpoint="newest")


def test_the_model_answers_and_stops_in_a_conversation(loaded):
    engine = timemix.Engine(loaded.model, loaded.tokenizer)
    right = 0
    for question in SUMS:
        talk = Conversation(engine, WORLD, tokens=20, sampler=GREEDY)
        for each in (question, "2+2"):
            right += "".join(talk.say(each)) == SUMS[each]
            assert not talk.is_unfinished
    assert right == 2 * len(SUMS)


def test_chat_and_server_use_the_template_of_the_training(folder, loaded, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("3+3\n1+1\n"))
    status, out, _ = run_command(
        capsys, "chat", folder / "run", "--checkpoint", "newest", "--temperature", 0, "--tokens", 20
    )
    assert (status, out) == (0, "6\n2\n")
    engine = timemix.Engine(loaded.model, loaded.tokenizer)
    with served([Served("mine", engine, "float32", 1, trained=loaded.config.data.template)]) as server:
        assert server.call("/v1/models").json["data"][0]["chat_template"] == "world"
        assert server.call("/tokenizer_info").json["chat_template"] == to_jinja(WORLD)
        messages = [{"role": "user", "content": "2+2"}]
        answer = server.call("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 20}).json
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("4", "stop")


def test_the_tokens_of_the_user_have_no_influence_on_gradients(folder):
    """Other tokens as targets of the user change no gradient. Other tokens as targets of the assistant change it."""
    trainer = Trainer(read_toml(folder / "run/config.toml"), folder / "run", open_of(folder))
    tokens = trainer.corpus.train
    inputs, _ = trainer.batches(0)

    def gradient(ids):
        masked = Tokens([ids], ids.dtype, tokens.counted)
        targets = Batches(masked, batch_size=8, ctx_len=40, seed=3, order=trainer.config.data.order)(0)[1]
        trainer.model.zero_grad()
        trainer.batch_loss(torch.from_numpy(inputs), torch.from_numpy(targets)).backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])

    own = gradient(tokens[:])
    counted = tokens.counted[:] == 1
    others = (tokens[:] + 1) % trainer.corpus.tokenizer.vocab_size
    assert torch.equal(gradient(np.where(counted, tokens[:], others).astype(tokens.dtype)), own)
    assert not torch.equal(gradient(np.where(counted, others, tokens[:]).astype(tokens.dtype)), own)
    trainer.lock.release()


@pytest.mark.parametrize("to", ["hf", "pth"])
def test_an_exported_model_brings_its_template(folder, loaded, tmp_path, to):
    export_run(folder / "run", to, tmp_path / "exported", checkpoint="newest")
    if to == "hf":
        transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
        messages = [{"role": "user", "content": "2+2"}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ids == loaded.tokenizer.encode("User: 2+2\n\nAssistant:").tolist()
    import_run(tmp_path / "exported" / ("" if to == "hf" else "model.pth"), tmp_path / "run")
    again = timemix.load(tmp_path / "run")
    talk = Conversation(
        timemix.Engine(again.model, again.tokenizer),
        template_of(again.tokenizer, again.config.data.template),
        tokens=20,
        sampler=GREEDY,
    )
    assert "".join(talk.say("2+2")) == "4"
    assert not talk.is_unfinished


def open_of(folder) -> Corpus:
    return timemix.load(folder / "run").corpus()


def test_the_validation_counts_answers_in_every_unit(folder, loaded):
    corpus = open_of(folder)
    ids, counted = corpus.valid[:], corpus.valid.counted[:]
    nats = loss_per_token(loaded.model, corpus.valid)
    tokens = int(counted[1:].sum())
    text = corpus.tokenizer.decode(ids[counted == 1])
    assert bits_per_byte(nats, corpus) == pytest.approx(nats * tokens / np.log(2) / len(text.encode()))
    found = evaluate_held_out(loaded.model, corpus)
    assert found.nats_per_token == nats
    assert found.bits_per_byte == pytest.approx(bits_per_byte(nats, corpus))
    assert (found.predicted_tokens, found.tokens) == (tokens, len(ids))
    assert (found.predicted_bytes, found.bytes) == (len(text.encode()), len(corpus.tokenizer.decode(ids).encode()))
    line = json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert line["valid_loss"] == pytest.approx(nats, rel=1e-5)
    assert line["valid_bits_per_byte"] == pytest.approx(found.bits_per_byte, rel=1e-5)


def test_a_run_resumes_and_refuses_another_mask(folder, tmp_path):
    config = config_of(folder / "chat.jsonl", steps=1)
    new_run(config, tmp_path / "run", progress=False).run()
    trainer = resume_run(tmp_path / "run", train={"steps": 2})
    trainer.run()
    assert trainer.step == 2
    assert {"train-loss", "valid-loss"} < trainer.data_hashes.keys()
    info = trainer.corpus.info
    other = replace(info, train=replace(info.train, counted=replace(info.train.counted, sha256="0" * 64)))
    keys = [run_keys(config, replace(trainer.corpus, info=each)) for each in (info, other)]
    assert keys[0] != keys[1]
    trainer.corpus = replace(trainer.corpus, info=other)
    with pytest.raises(DamagedFile, match="the data differ from those that"):
        trainer.restore(sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1])


def test_a_prepared_folder_gives_its_template_to_the_run(folder, tmp_path):
    config = config_of(folder / "chat.jsonl", steps=1)
    prepare(tmp_path / "tokens", config.data)
    unset = replace(config, data=DataConfig(source=str(tmp_path / "tokens")))
    trainer = new_run(unset, tmp_path / "run", progress=False)
    assert trainer.config.data.template == read_toml(tmp_path / "run/config.toml").data.template == "world"
    trainer.lock.release()
    (tmp_path / "text.txt").write_text("the cat sat. " * 99)
    prepare(tmp_path / "plain", DataConfig(source=str(tmp_path / "text.txt")))
    asked = replace(config, data=DataConfig(str(tmp_path / "plain"), template="world"))
    with pytest.raises(InvalidValue, match=r"data.template='world' differs from that of .*plain, .*: None; leave"):
        new_run(asked, tmp_path / "other", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["lora", "state"])
def test_a_model_is_tuned_on_conversations(folder, tmp_path, tune):
    base = config_of(folder / "chat.jsonl", steps=3)
    new_run(base, tmp_path / "base", progress=False).run()
    tuned = replace(base, train=replace(base.train, tune=tune, steps=2), start=str(tmp_path / "base"))
    trainer = new_run(tuned, tmp_path / "tuned", progress=False)
    trainer.run()
    assert trainer.corpus.train.counted is not None
    assert timemix.load(tmp_path / "tuned").config.data.template == "world"


def test_eval_measures_the_answers_of_conversations(folder, loaded, capsys, tmp_path):
    lines = (folder / "chat.jsonl").read_text().splitlines(keepends=True)
    held_out = loaded.corpus().info.valid.documents
    (tmp_path / "valid.jsonl").write_text("".join(lines[-held_out:]))
    options = ("eval", folder / "run", "--checkpoint", "newest", "--json")
    status, out, _ = run_command(capsys, *options, "--data", tmp_path / "valid.jsonl", "--template", "world")
    assert status == 0
    expected = json.loads(run_command(capsys, *options)[1])
    assert {**json.loads(out), "data": expected["data"]} == expected
    counts = [f"{expected[f'predicted_{unit}']:,} {unit}" for unit in ("tokens", "characters", "bytes")]
    printed = run_command(capsys, *options[:-1])[1]
    assert f"the loss counts {', '.join(counts)}: those of the answers\n" in printed
    for extra, words in (
        (("--data", tmp_path / "valid.jsonl"), "has no 'text', but 'messages', as conversations have; set --data.temp"),
        (("--template", "world"), "--template is for the conversations of --data, which have no text key; add --data"),
        (("--template", "world", "--data", "builtin"), "builtin has no conversations; leave --data.template out"),
    ):
        status, _, errors = run_command(capsys, *options, *extra)
        assert (status, words in errors) == (2, True), errors


def test_eval_says_of_unknown_characters_only_that_they_are_skipped(folder, loaded, capsys, tmp_path):
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "1+1 Ω", "completion": "2"}) + "\n")
    options = ("eval", folder / "run", "--data", tmp_path / "other.jsonl", "--template", "world")
    assert loaded.tokenizer.unknown == "error"
    assert "1 unknown characters skipped, because the vocabulary has no <unk>\n" in run_command(capsys, *options)[1]


def test_inspect_reads_conversations_as_eval_does(folder, capsys, tmp_path):
    options = ("--checkpoint", "newest", "--data", folder / "chat.jsonl", "--template", "world", "--json")
    status, out, errors = run_command(capsys, "inspect", folder / "run", "--out", tmp_path, *options)
    assert status == 0, errors
    loss = json.loads(run_command(capsys, "eval", folder / "run", *options)[1])["nats_per_token"]
    assert json.loads(out)["loss"] == pytest.approx(loss, rel=1e-5)
    status, _, errors = run_command(capsys, "inspect", folder / "run", "--template", "world")
    assert (status, "--template is for the conversations of --data" in errors) == (2, True)


def test_each_conversation_has_equal_weight_by_document(loaded):
    """Without earlier conversations, the loss of each one is the mean of its counted tokens."""
    corpus = loaded.corpus()
    found = evaluate_held_out(loaded.model, corpus, by_document=True)
    ids, counted = corpus.valid[:].astype(np.int64), corpus.valid.counted[:]
    ends = np.flatnonzero(ids == corpus.tokenizer.end_of_text)
    assert found.documents == corpus.info.valid.documents == len(ends)
    # Windows begin at multiples of ctx_len, and the end-of-text token before a conversation is its first input.
    losses, means = [], []
    for begin in range(0, len(ids) - 1, loaded.model.config.ctx_len):
        window = torch.from_numpy(ids[begin : begin + loaded.model.config.ctx_len + 1])
        resets = window[None, :-1] == corpus.tokenizer.end_of_text
        with torch.no_grad():
            logits, _ = loaded.model(window[None, :-1], resets=resets)
        losses += torch.nn.functional.cross_entropy(logits[0], window[1:], reduction="none").tolist()
    for first, last in zip([0, *ends[:-1]], ends, strict=True):
        part = slice(int(first), int(last))
        means.append(np.array(losses)[part][counted[1:][part] == 1].mean())
    assert found.nats_per_token_by_document == pytest.approx(np.mean(means), rel=1e-5)
