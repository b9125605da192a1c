"""Engines on small models, and generation that recomputes the whole context for every token."""

import torch

from tests.helpers.draws import draw
from tests.helpers.models import VARIANTS, build
from timemix.generation.engine import Engine
from timemix.tokenizers.character import CharacterTokenizer

CHARACTERS = CharacterTokenizer(list("abcdefghijk"), "error")
KINDS = {
    "rwkv1, compiled": lambda: build(VARIANTS["rwkv1"], torch.float32),
    "rwkv1, float64": lambda: build(VARIANTS["rwkv1"]),
    "rwkv1_exp": lambda: build(VARIANTS["rwkv1_exp"], torch.float32),
    "rwkv4": lambda: build(VARIANTS["rwkv4"], torch.float32),
    "rwkv5": lambda: build(VARIANTS["rwkv5"], torch.float32),
    "rwkv6": lambda: build(VARIANTS["rwkv6"], torch.float32),
    "rwkv7": lambda: build(VARIANTS["rwkv7"], torch.float32),
    "mha_pro": lambda: build(VARIANTS["mha_pro"]),
}


class Scripted:
    """A decode step that continues every prompt of one byte with the bytes of a script."""

    compiled, reason = True, ""

    def __init__(self):
        self.script = b""

    def looks_back(self, position):
        return 0

    def __call__(self, tokens, state, rows, counts=None, wanted=None):
        logits = torch.zeros(len(rows), 256)
        for row, position in enumerate(state.position[rows].tolist()):
            logits[row, self.script[position]] = 100
        state.position[rows] += 1
        return logits, state


def finish(engine):
    """Run an engine to its end; return all events by request."""
    events = {}
    while engine.busy:
        for event in engine.step():
            events.setdefault(event.id, []).append(event)
    return events


def alone(model, request, tokenizer=CHARACTERS):
    engine = Engine(model, tokenizer)
    engine.add(request)
    return finish(engine)[0]


def recomputed(model, prompt, tokens, sampler, seed, window):
    """Generate by the naive method: recompute all of `window(text, limit)` for every token."""
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
    """Return the window of re-anchoring: it grows to the limit, then falls back to the newest `keep` tokens."""
    held = min(length_at_start, limit)

    def window(text, state={"seen": length_at_start, "held": held}):  # noqa: B006
        for _ in range(len(text) - state["seen"]):
            state["held"] = keep if state["held"] == limit else state["held"] + 1
        state["seen"] = len(text)
        return text[-state["held"] :]

    return window
