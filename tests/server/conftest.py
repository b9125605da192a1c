"""A server whose states the tests use."""

import pytest

from tests.helpers.serving import served, tiny
from tests.helpers.states import same, session_after
from timemix.generation.session import session_to_bytes


@pytest.fixture(scope="module")
def server():
    with served([same(), tiny("bounded", "rwkv1")]) as running:
        yield running


@pytest.fixture(scope="module")
def model(server):
    return server.models[0].engine.model


@pytest.fixture(scope="module")
def upload(model):
    """The content of a file with the state after a text."""
    return session_to_bytes(session_after(model, [0, 1, 2, 3]), model)
