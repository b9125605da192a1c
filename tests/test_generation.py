"""Generation: steps equal recomputing everything, rows are independent, the context's end is passed."""

import math

import pytest
import torch

import timemix
from tests.runs import small_trainer
from tests.test_models import VARIANTS, build
from timemix.errors import TimemixError
from timemix.generation.generate import generate_tokens, stream_text
from timemix.generation.sampler import Sampler, draw

CTX = 12


def recomputed(model, prompt, tokens, sampler, seed, window):
    """The slow way: for every token all of `window(text, limit)` anew."""
    text, new = list(prompt), []
    for number in range(tokens):
        with torch.no_grad():
            logits, _ = model(torch.tensor([window(text)]), logits="last")
        seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool)
        seen[0, text] = True
        token = draw(sampler.probabilities(logits, seen), seed=seed, sample=[0], position=[number]).item()
        text.append(token)
        new.append(token)
    return new


def reanchored(length_at_start, limit, keep):
    """The window that re-anchoring sees: it grows to the limit, then falls back to the newest `keep`."""
    held = min(length_at_start, limit)

    def window(text, state={"seen": length_at_start, "held": held}):  # noqa: B006
        for _ in range(len(text) - state["seen"]):
            state["held"] = keep if state["held"] == limit else state["held"] + 1
        state["seen"] = len(text)
        return text[-state["held"] :]

    return window


def generated(model, prompts, tokens, sampler, **options):
    columns = list(generate_tokens(model, prompts, tokens, sampler, **options))
    assert len(columns) == tokens
    return torch.stack(columns, 1).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompt", [[3], list(range(11)), [1, 2, 3] * 9])
def test_steps_equal_recomputing_the_context(variant, prompt):
    model = build(VARIANTS[variant])
    sampler = Sampler(temperature=0.9, top_a=0.02, repetition_penalty=1.2)
    endless = model.max_position is None
    window = (lambda text: text) if endless else reanchored(len(prompt), CTX, CTX // 2)
    expected = recomputed(model, prompt, 40, sampler, 7, window)
    assert generated(model, [prompt], 40, sampler, seed=7) == [expected]


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
    with pytest.raises(TimemixError, match="the prompt is empty"):
        list(generate_tokens(build(VARIANTS["rwkv1"]), prompts, 3, Sampler()))


def test_keep_is_a_share():
    with pytest.raises(TimemixError, match="keep is 0"):
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
    pieces = list(stream_text(loaded, "the ", tokens=50, seed=1))
    assert "".join(p for (p,) in pieces) == texts[0]
    assert all(len(p) <= 1 for (p,) in pieces)


def test_a_prompt_outside_the_vocabulary_is_named(run):
    with pytest.raises(TimemixError, match="Q"):
        timemix.generate(run, "the Q", tokens=3)


def test_greedy_takes_the_most_probable(run):
    loaded = timemix.load(run)
    ids = loaded.tokenizer.encode("the ").tolist()
    with torch.no_grad():
        logits, _ = loaded.model(torch.tensor([ids]), logits="last")
    (text,) = timemix.generate(loaded, "the ", tokens=1, sampler=Sampler(temperature=0))
    assert text == loaded.tokenizer.decode([int(logits.argmax())])
    assert math.isfinite(float(logits.max()))
