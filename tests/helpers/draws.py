"""Draws of tokens from given probabilities, with the random numbers of the engine."""

import numpy as np
import torch

from timemix.generation.random_draws import Uniforms, search


def draw(probabilities, *, seed, sample, position):
    """Draw one token for each row of probabilities (B, V).

    Args:
        probabilities: Probabilities (B, V).
        seed: Random seed: one number for all rows, or (B,).
        sample: Number of each row's text (B,).
        position: Number of the token in each row's text (B,).

    Returns:
        Token ids (B,) int64.
    """
    seeds = [seed] * len(probabilities) if isinstance(seed, int) else _integers(seed)
    keys = zip(seeds, _integers(sample), _integers(position), strict=True)
    u = np.array([Uniforms(key, number).at(place) for key, number, place in keys])
    return torch.from_numpy(search(probabilities.double().numpy(), u))


def _integers(values):
    return values.tolist() if isinstance(values, torch.Tensor) else [int(value) for value in values]
