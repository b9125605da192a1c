"""A decode step that makes a model generate given tokens."""

import torch

from timemix.generation.decode import build_step


class Scripted:
    """A decode step for one request: the model generates given tokens, and the step records what the model reads.

    Args:
        model: The model, whose state the step computes as usual.
        tokenizer: Tokenizer of the texts.
        script: Texts and token ids to generate, one after another.
    """

    compiled, reason = True, ""

    def __init__(self, model, tokenizer, script):
        tokens = [x for part in script for x in ([part] if isinstance(part, int) else tokenizer.encode(part).tolist())]
        self._step, self._tokens, self._vocab_size = build_step(model), iter(tokens), model.config.vocab_size
        self.read = []

    def looks_back(self, position):
        return 1

    def __call__(self, tokens, state, rows, counts=None, wanted=None):
        self.read += tokens.tolist()
        logits, state = self._step(tokens, state, rows, counts, wanted)
        if len(logits):
            logits = torch.full((1, self._vocab_size), -100.0)
            logits[0, next(self._tokens)] = 100.0
        return logits, state
