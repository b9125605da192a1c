"""States of a server under test."""

import torch

from tests.helpers.engines import alone
from tests.helpers.serving import tiny
from timemix.generation.request import Request

OWN = "state-" + "0" * 32
"""Id of a state that a test uploads."""


def same(**options):
    """Return a model with the same random weights at each call."""
    torch.manual_seed(1)
    return tiny(**options)


def session_after(model, prompt):
    (event,) = alone(model, Request(prompt, tokens=0, keep_session=True))
    return event.session


def read(server, prompt="abcab", **fields):
    """Return the description of a new state."""
    answer = server.call("/v1/states", {"prompt": prompt} | fields)
    assert answer.status == 200, answer.body
    return answer.json


def assert_refused(answer, status, param, words, code=None):
    error = answer.json["error"]
    assert (answer.status, error["param"], error["code"]) == (status, param, code), error
    assert words in error["message"]
