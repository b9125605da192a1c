"""Sessions saved and loaded: continuing a loaded session equals continuing in memory; misfits are rejected."""

import pytest
import torch

from tests.helpers.engines import CHARACTERS, KINDS, alone, finish
from tests.helpers.pairwise import pairwise
from timemix.errors import DamagedFile, MissingFile
from timemix.generation.engine import Engine
from timemix.generation.request import Request
from timemix.generation.sampler import Sampler
from timemix.generation.session import load_session, model_hash, save_session


def stream_of(model, tokens=9):
    engine = Engine(model, CHARACTERS)
    engine.add(Request([1, 2, 3], tokens, Sampler(repetition_penalty=1.2), keep_session=True))
    return finish(engine)[0][-1].session


@pytest.mark.parametrize(("kind", "tokens"), pairwise(KINDS, [0, 1, 9, 30], strength=1))
def test_a_loaded_session_continues_exactly(kind, tokens, tmp_path):
    model = KINDS[kind]()
    stream = stream_of(model, tokens)
    save_session(stream, tmp_path / "state", model)
    loaded = load_session(tmp_path / "state", model)
    assert (loaded.tokens, loaded.unread, loaded.written, loaded.seen) == (
        stream.tokens,
        stream.unread,
        stream.written,
        stream.seen,
    )
    for own, theirs in zip(loaded.state.layers, stream.state.layers, strict=True):
        for name in own:
            assert own[name].equal(theirs[name])
            assert own[name].dtype == theirs[name].dtype
    rest = Request([], 20, Sampler(repetition_penalty=1.2), start=stream)
    again = Request([], 20, Sampler(repetition_penalty=1.2), start=loaded)
    assert [e.token for e in alone(model, rest)] == [e.token for e in alone(model, again)]


def test_its_size_is_that_of_its_tensors():
    model = KINDS["rwkv1, compiled"]()
    config = model.config
    layer = config.channels * (config.ctx_len + 1 + 2) * 4
    assert stream_of(model).nbytes == config.layers * layer + 8


def test_the_hash_is_of_sizes_and_every_weight():
    model = KINDS["rwkv1, compiled"]()
    first = model_hash(model)
    assert first == model_hash(model)
    with torch.no_grad():
        model.blocks[1].ffn.key.bias[3] += 1e-3
    assert model_hash(model) != first


def test_another_model_is_refused(tmp_path):
    model = KINDS["rwkv1, compiled"]()
    save_session(stream_of(model), tmp_path / "state", model)
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    with pytest.raises(DamagedFile, match=r"holds a session of another model \(rwkv1\)"):
        load_session(tmp_path / "state", model)
    with pytest.raises(DamagedFile, match="of another model"):
        load_session(tmp_path / "state", KINDS["mha_pro"]())


def test_files_that_are_no_state_are_refused_by_name(tmp_path):
    model = KINDS["rwkv1, compiled"]()
    with pytest.raises(MissingFile, match=r"nothing is missing"):
        load_session(tmp_path / "nothing", model)
    good = tmp_path / "good"
    save_session(stream_of(model), good, model)
    whole = good.read_bytes()
    for name, content in {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "text": b"To be, or not to be",
        "nothing unread": whole.replace(b'\\"unread\\": 1', b'\\"unread\\": 0'),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DamagedFile, match=f"{name} (is|holds)"):
            load_session(tmp_path / name, model)


def test_weights_are_no_state(tmp_path):
    from safetensors.torch import save_file

    model = KINDS["rwkv1, compiled"]()
    save_file({"position": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(DamagedFile, match="is no session file of timemix"):
        load_session(tmp_path / "weights", model)
