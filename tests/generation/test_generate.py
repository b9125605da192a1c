"""Generation: steps equal recomputing everything, rows are independent, and texts grow past the context."""

import math

import pytest
import torch

import timemix
from tests.helpers.engines import reanchored, recomputed
from tests.helpers.models import VARIANTS, build
from tests.helpers.pairwise import pairwise
from tests.helpers.runs import TEXT, small_trainer
from timemix.errors import InvalidValue, NotFinite
from timemix.generation.generate import generate_tokens, stream
from timemix.generation.prompts import default_prompt, prompt_ids
from timemix.generation.sampler import Sampler
from timemix.tokenizers.make import train_tokenizer

CTX = 12


def generated(model, prompts, tokens, sampler, **options):
    texts = generate_tokens(model, prompts, tokens, sampler, **options)
    assert [len(text) for text in texts] == [tokens] * len(prompts)
    return texts


@pytest.mark.parametrize(("variant", "prompt"), pairwise(VARIANTS, [[3], list(range(11)), [1, 2, 3] * 9], strength=1))
def test_steps_equal_recomputing_the_context(variant, prompt):
    model = build(VARIANTS[variant])
    sampler = Sampler(temperature=0.9, top_a=0.02, repetition_penalty=1.2)
    endless = model.max_position is None
    window = (lambda text: text) if endless else reanchored(len(prompt), CTX, CTX // 2)
    expected = recomputed(model, prompt, 27, sampler, 7, window)
    assert generated(model, [prompt], 27, sampler, seed=7) == [expected]


@pytest.mark.parametrize("variant", ["rwkv1", "mha_pro"])
def test_exact_context_is_a_sliding_window(variant):
    model = build(VARIANTS[variant])
    expected = recomputed(model, [1, 2], 30, Sampler(), 3, lambda text: text[-CTX:])
    assert generated(model, [[1, 2]], 30, Sampler(), seed=3, context="exact") == [expected]


def test_rows_of_any_length_do_not_depend_on_each_other():
    model = build(VARIANTS["rwkv1"])
    prompts = [[1], [2, 3, 4, 5, 6], list(range(11)), [7] * 20]
    together = generated(model, prompts, 30, Sampler(), seed=5)
    for row, prompt in enumerate(prompts):
        others = [[9, 9, 9]] * row
        assert generated(model, [*others, prompt], 30, Sampler(), seed=5)[row] == together[row]


def test_seeds_and_samples_differ_and_repeat():
    model = build(VARIANTS["rwkv1"])
    a, b = generated(model, [[1], [1]], 30, Sampler(), seed=1)
    assert a != b
    assert generated(model, [[1]], 30, Sampler(), seed=1) == [a]
    assert generated(model, [[1]], 30, Sampler(), seed=2) != [a]


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_an_empty_prompt_is_an_error(prompts):
    with pytest.raises(InvalidValue, match="prompts? is empty"):
        list(generate_tokens(build(VARIANTS["rwkv1"]), prompts, 3, Sampler()))


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0, 3.0)])
def test_a_sampler_has_a_number_for_each_prompt(temperatures):
    with pytest.raises(InvalidValue, match=f"temperature has {len(temperatures)} numbers for 2 prompts"):
        generate_tokens(build(VARIANTS["rwkv1"]), [[1], [2]], 3, Sampler(temperature=temperatures))


def test_keep_is_a_share():
    with pytest.raises(InvalidValue, match="keep is 0"):
        list(generate_tokens(build(VARIANTS["rwkv1"]), [[1]], 3, Sampler(), keep=0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trainer = small_trainer(tmp_path_factory.mktemp("run"), steps=60, valid_every=60, save_every=60)
    trainer.run()
    return trainer.out


def test_text_in_text_out(run):
    loaded = timemix.load(run)
    texts = timemix.generate(loaded, "the ", tokens=50, count=3, seed=1)
    assert [len(t) for t in texts] == [50] * 3
    assert len(set(texts)) == 3
    assert timemix.generate(run, "the ", tokens=50, count=2, seed=1) == texts[:2]
    for count in (0, 2.5, True):
        with pytest.raises(InvalidValue, match=f"count is {count}; it must be a whole number, at least 1"):
            timemix.generate(loaded, "the ", count=count)
    pieces = list(stream(loaded, "the ", tokens=50, seed=1))
    assert "".join(p for (p,) in pieces) == texts[0]
    assert all(len(p) <= 1 for (p,) in pieces)


def test_a_stream_has_no_empty_pieces(run):
    """The engine holds back each character that may begin a stop string."""
    stop = [f"{character}1234567890" for character in set(TEXT)]
    pieces = list(stream(run, "the ", tokens=50, seed=1, stop=stop))
    assert "" not in pieces
    assert "".join(pieces) == timemix.generate(run, "the ", tokens=50, seed=1)[0]


def test_a_prompt_outside_the_vocabulary_is_named(run):
    with pytest.raises(InvalidValue, match="Q"):
        timemix.generate(run, "the Q", tokens=3)


def test_greedy_takes_the_most_probable(run):
    loaded = timemix.load(run)
    ids = loaded.tokenizer.encode("the ").tolist()
    with torch.no_grad():
        logits, _ = loaded.model(torch.tensor([ids]), logits="last")
    (text,) = timemix.generate(loaded, "the ", tokens=1, sampler=Sampler(temperature=0))
    assert text == loaded.tokenizer.decode([int(logits.argmax())])
    assert math.isfinite(float(logits.max()))


def test_logits_that_are_not_finite_are_one_sentence(run):
    loaded = timemix.load(run)
    with torch.no_grad():
        loaded.model.norm.bias[0] = math.nan
    for call in (lambda: timemix.generate(loaded, "the "), lambda: list(stream(loaded, "the "))):
        with pytest.raises(NotFinite, match="sample 0 cannot continue: the model's logits are not finite; use another"):
            call()


def test_the_token_that_ends_a_text_ends_it(run, monkeypatch):
    loaded = timemix.load(run)
    (whole,) = timemix.generate(loaded, "the ", tokens=60)
    monkeypatch.setattr(loaded.tokenizer, "end_of_text", int(loaded.tokenizer.encode(".")[0]))
    assert timemix.generate(loaded, "the ", tokens=60) == [whole.partition(".")[0]]


def test_an_empty_prompt_begins_a_document():
    tokenizer = train_tokenizer("character", "ab", end_of_text=True)
    assert prompt_ids(tokenizer, "") == [tokenizer.end_of_text]
    assert default_prompt(tokenizer) == ""
    assert prompt_ids(tokenizer, "ba") == [1, 0]
    plain = train_tokenizer("character", "ab")
    assert prompt_ids(plain, "") == []
    assert default_prompt(plain) == "a"
    assert default_prompt(train_tokenizer("byte", "a")) == "\n"
