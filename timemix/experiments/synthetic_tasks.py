"""Synthetic tasks that show what the state of a model can hold. Every batch is generated from a seed.

A generator returns inputs and targets, each (rows, length) int64. The target of a position is the token that a model
must predict at this position. The target is IGNORED at a position without an answer.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

IGNORED = -100
"""Target of a position without an answer, which PyTorch's cross-entropy ignores."""
KEYS = 128
"""Number of keys of `recall`, and largest number of pairs."""
VALUES = 32
"""Number of values of `recall` and `needle`."""
LETTERS = 16
"""Number of letters of `copy` and `reverse`."""
PREFIX = 8
"""Largest number of values before the first marker of `needle`."""
DEEPEST = 8
"""Largest depth of `brackets`."""
GUESSED_TOKENS = 2**20
"""Number of tokens of a batch from which `SyntheticTask.guess` is measured."""
GUESSED_ANSWERS = 4096
"""Smallest number of answers from which `SyntheticTask.guess` is measured."""

Batch = tuple[np.ndarray, np.ndarray]
"""Inputs and targets, each (rows, length) int64."""


@dataclass(frozen=True)
class SyntheticTask:
    """A task with sequences of every size."""

    make: Callable[[np.random.Generator, int, int], Batch]
    """Generator of a batch: (random generator, rows, size) -> inputs and targets."""
    vocab_size: int
    """Number of tokens, inputs and answers together."""
    answers: range
    """Tokens that can be answers."""
    size: str
    """Meaning of the size in words."""
    running: bool = False
    """Whether every position has an answer, which depends on all tokens up to this position."""

    def length(self, size: int) -> int:
        """Return the number of positions of a sequence."""
        return int(self.make(np.random.default_rng(0), 1, size)[0].shape[1])

    def guess(self, size: int) -> float:
        """Return the accuracy of a guess by frequency, to which the accuracy of a model is compared.

        The guess is the answer that is most frequent in the sequence. With running answers, the guess is the answer
        that is most frequent at the position.

        Args:
            size: Size of the sequences.
        """
        right = total = 0
        for seed in itertools.count():
            guessed, answers = self._guess(size, seed)
            right, total = right + guessed, total + answers
            if total >= GUESSED_ANSWERS:
                break
        return right / total

    def _guess(self, size: int, seed: int) -> tuple[int, int]:
        """Return the number of right guesses and the number of answers in a batch."""
        rows = max(2, GUESSED_TOKENS // self.length(size))
        inputs, targets = held_out_batch(self, rows, size, seed)
        if self.running:
            # The counts in one half of the sequences give the guesses for the other half.
            seen, targets = targets[: rows // 2], targets[rows // 2 :]
            # (answers, length)
            counts = np.stack([(seen == answer).sum(0) for answer in self.answers])
        else:
            # (answers, rows, 1)
            counts = np.stack([(inputs == answer).sum(1, keepdims=True) for answer in self.answers])
        guesses = self.answers.start + counts.argmax(0)
        return int((guesses == targets).sum()), int((targets != IGNORED).sum())


def _recall(random: np.random.Generator, rows: int, size: int) -> Batch:
    """Key-value pairs k1 v1 ... kn vn, then all keys in another order. The answer at a key is its value."""
    keys = random.permuted(np.tile(np.arange(KEYS), (rows, 1)), axis=1)[:, :size]
    values = random.integers(KEYS, KEYS + VALUES, (rows, size))
    order = random.permuted(np.tile(np.arange(size), (rows, 1)), axis=1)
    pairs = np.stack([keys, values], axis=2).reshape(rows, 2 * size)
    inputs = np.concatenate([pairs, np.take_along_axis(keys, order, 1)], axis=1)
    targets = np.full_like(inputs, IGNORED)
    targets[:, 2 * size :] = np.take_along_axis(values, order, 1)
    return inputs, targets


def _running_sum(modulus: int) -> Callable[[np.random.Generator, int, int], Batch]:
    """Return the generator of digits. The answer at a digit is the sum of all digits so far, modulo `modulus`."""

    def make(random: np.random.Generator, rows: int, size: int) -> Batch:
        digits = random.integers(0, modulus, (rows, size))
        return digits, digits.cumsum(1) % modulus

    return make


def permutations_of(elements: int) -> np.ndarray:
    """Return all permutations p in lexicographic order, (permutations, elements), where p moves i to p[i]."""
    return np.array(list(itertools.permutations(range(elements))))


def _running_product(elements: int) -> Callable[[np.random.Generator, int, int], Batch]:
    """Return the generator of permutations. The answer at a permutation is the product of all permutations so far.

    The product applies the first permutation first. Tokens are indices in `permutations_of(elements)`.
    """
    table = permutations_of(elements)
    digits = elements ** np.arange(elements)[::-1]
    # table[j, table[i]] is the product of i and j. (j, i, elements) -> (j, i) numbers -> after[i, j]: indices
    after = np.searchsorted(table @ digits, table[:, table] @ digits).T

    def make(random: np.random.Generator, rows: int, size: int) -> Batch:
        inputs = random.integers(0, len(table), (rows, size))
        targets = inputs.copy()
        for t in range(1, size):
            targets[:, t] = after[targets[:, t - 1], inputs[:, t]]
        return inputs, targets

    return make


def _brackets(random: np.random.Generator, rows: int, size: int) -> Batch:
    """Opening (0) and closing (1) brackets. The answer is the depth, a random walk between 0 and DEEPEST."""
    closes = random.integers(0, 2, (rows, size))
    depth = np.zeros(rows, np.int64)
    depths = np.zeros_like(closes)
    for t in range(size):
        closes[:, t] = np.where(depth == 0, 0, np.where(depth == DEEPEST, 1, closes[:, t]))
        depth += 1 - 2 * closes[:, t]
        depths[:, t] = depth
    return closes, depths


def _copy(random: np.random.Generator, rows: int, size: int, *, reverse: bool = False) -> Batch:
    """A string, a separator, and the string again, forwards or in reverse. The second string is the answer."""
    text = random.integers(0, LETTERS, (rows, size))
    answer = text[:, ::-1] if reverse else text
    inputs = np.concatenate([text, np.full((rows, 1), LETTERS), answer[:, :-1]], axis=1)
    return inputs, np.concatenate([np.full((rows, size), IGNORED), answer], axis=1)


def _reverse(random: np.random.Generator, rows: int, size: int) -> Batch:
    """A string, a separator, and the reversed string."""
    return _copy(random, rows, size, reverse=True)


def _needle(random: np.random.Generator, rows: int, size: int) -> Batch:
    """Values with two markers between them. The answer at the second marker is the value after the first marker.

    This value and the second marker are `size` positions apart. The first marker is at a random position, and all other
    tokens are values, so that the answer depends on the marker alone.
    """
    inputs = random.integers(0, VALUES, (rows, PREFIX + size + 2))
    targets = np.full_like(inputs, IGNORED)
    row, marker = np.arange(rows), random.integers(0, PREFIX + 1, rows)
    inputs[row, marker] = inputs[row, marker + 1 + size] = VALUES
    targets[row, marker + 1 + size] = inputs[row, marker + 1]
    return inputs, targets


TASKS = {
    "recall": SyntheticTask(_recall, KEYS + VALUES, range(KEYS, KEYS + VALUES), "pairs"),
    "parity": SyntheticTask(_running_sum(2), 2, range(2), "tokens", running=True),
    "mod5": SyntheticTask(_running_sum(5), 5, range(5), "tokens", running=True),
    "s3": SyntheticTask(_running_product(3), 6, range(6), "tokens", running=True),
    "s5": SyntheticTask(_running_product(5), 120, range(120), "tokens", running=True),
    "brackets": SyntheticTask(_brackets, DEEPEST + 1, range(DEEPEST + 1), "tokens", running=True),
    "copy": SyntheticTask(_copy, LETTERS + 1, range(LETTERS), "letters"),
    "reverse": SyntheticTask(_reverse, LETTERS + 1, range(LETTERS), "letters"),
    "needle": SyntheticTask(_needle, VALUES + 1, range(VALUES), "positions from value to query"),
}


def training_batch(task: SyntheticTask, rows: int, size: int, seed: int, step: int, steps: int) -> Batch:
    """Return the batch of a training step.

    All sequences of a batch have the same random size. In the first half of the run, the largest size grows from 1 to
    `size`: without this growth, attention needs many more steps to learn the query tasks. A task with a running answer
    has the size `size` in every step, because a sequence contains all its shorter beginnings.

    Args:
        task: The task.
        rows: Number of sequences.
        size: Largest size.
        seed: Seed of the run.
        step: Number of the step, counted from 0.
        steps: Number of steps of the run.
    """
    random = np.random.default_rng([0, seed, step])
    if task.running:
        return task.make(random, rows, size)
    largest = min(size, math.ceil(2 * size * (step + 1) / steps))
    return task.make(random, rows, int(random.integers(1, largest + 1)))


def held_out_batch(task: SyntheticTask, rows: int, size: int, seed: int) -> Batch:
    """Return sequences of one size for a test. With a running answer, only the second half of the answers counts.

    Args:
        task: The task.
        rows: Number of sequences.
        size: Size of all sequences.
        seed: Seed of the run.
    """
    inputs, targets = task.make(np.random.default_rng([1, seed, size]), rows, size)
    if task.running:
        targets[:, : size // 2] = IGNORED
    return inputs, targets
