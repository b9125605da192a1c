"""Sessions saved and loaded: continuing a loaded session equals continuing in memory; misfits are rejected."""

import json
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from tests.helpers.engines import CHARACTERS, KINDS, alone, finish
from tests.helpers.pairwise import pairwise
from tests.helpers.tiers import examples
from timemix.errors import DamagedFile, InvalidValue, MissingFile
from timemix.generation.engine import Engine
from timemix.generation.request import Request
from timemix.generation.sampler import Sampler
from timemix.generation.session import (
    load_session,
    save_session,
    session_from_bytes,
    session_to_bytes,
)
from timemix.models.hashes import model_hash
from timemix.ops.rwkv4.reference import EMPTY


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
    for field in ("tokens", "unread", "written", "seen", "held", "counts"):
        assert getattr(loaded, field) == getattr(stream, field)
    for own, theirs in zip(loaded.state.layers, stream.state.layers, strict=True):
        for name in own:
            assert own[name].equal(theirs[name])
            assert own[name].dtype == theirs[name].dtype
    rest = Request([], 20, Sampler(repetition_penalty=1.2), start=stream)
    again = Request([], 20, Sampler(repetition_penalty=1.2), start=loaded)
    assert [e.token for e in alone(model, rest)] == [e.token for e in alone(model, again)]


def test_sessions_are_compared_by_identity_since_a_comparison_of_tensors_has_no_single_answer():
    session = stream_of(KINDS["rwkv7"]())
    copy = session.clone()
    request = Request([], 1, start=session)
    assert session == session
    assert session != copy
    assert session.state != copy.state
    assert len({session, copy, session.state, copy.state, request}) == 5


def test_a_session_is_saved_only_with_its_model(tmp_path):
    session = stream_of(KINDS["rwkv7"]())
    with pytest.raises(InvalidValue, match="session is a session of another model; pass the model of this session"):
        save_session(session, tmp_path / "state", KINDS["rwkv4"]())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["rwkv4", "rwkv5"])
def test_a_session_without_a_read_token_continues_exactly(kind):
    """The empty state of rwkv4 has exponents of -1e38, near the limit of float32."""
    model = KINDS[kind]()
    (last,) = alone(model, Request([1], 0, keep_session=True))
    if kind == "rwkv4":
        assert (last.session.state.layers[0]["wkv"][:, 2] == EMPTY).all()
    loaded = session_from_bytes(session_to_bytes(last.session, model), model)
    for own, expected in zip(loaded.state.layers, model.init_state(1).layers, strict=True):
        for name in own:
            assert own[name].equal(expected[name])
    rest = alone(model, Request([], 9, start=loaded))
    assert [e.token for e in rest] == [e.token for e in alone(model, Request([1], 9))]


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


def test_the_bytes_of_a_session_are_its_file(tmp_path):
    model = KINDS["rwkv7"]()
    session = stream_of(model)
    content = session_to_bytes(session, model)
    save_session(session, tmp_path / "state", model)
    assert (tmp_path / "state").read_bytes() == content
    loaded = session_from_bytes(content, model)
    assert session_to_bytes(loaded, model) == content
    assert len(content) < session.nbytes + 3000


def test_penalties_on_generated_tokens_continue_with_the_session():
    model = KINDS["rwkv7"]()
    sampler = Sampler(presence_penalty=0.7, frequency_penalty=0.4)
    whole = alone(model, Request([1, 2, 3], 30, sampler, keep_session=True))
    first = alone(model, Request([1, 2, 3], 12, sampler, keep_session=True))[-1].session
    assert sum(first.counts.values()) == 12
    rest = alone(model, Request([], 18, sampler, start=first, keep_session=True))
    assert [e.token for e in rest] == [e.token for e in whole[12:]]
    assert rest[-1].session.counts == whole[-1].session.counts
    # Tokens of prompts do not count.
    assert alone(model, Request([1, 2, 3], 0, keep_session=True))[-1].session.counts == {}


def changed(content, *, tensors=None, header=None, **fields):
    """Return the content of a session with other tensors, other fields of its record and another metadata."""
    end = 8 + int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8:end])["__metadata__"]
    record = json.loads(metadata["timemix_session"]) | fields
    kept = {name: value for name, value in record.items() if value is not ...}
    metadata = {"timemix_session": json.dumps(kept)} | (header or {})
    return save(load(content) | (tensors or {}), metadata)


def test_a_session_of_a_version_without_counts_still_loads():
    model = KINDS["rwkv7"]()
    old = changed(session_to_bytes(stream_of(model), model), counted=..., counts=...)
    assert session_from_bytes(old, model).counts == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensors": {"position": torch.tensor([1.5])}}, r"position is torch.float32 \[1\], not torch.int64 \[1\]"),
        ({"tensors": {"position": torch.tensor([1, 2])}}, r"position is torch.int64 \[2\]"),
        ({"tensors": {"position": torch.tensor([-1])}}, "its position -1 does not fit the model"),
        ({"tensors": {"layers.0.mixer_shift": torch.zeros(1, 1, 4096)}}, r"layers.0.mixer_shift is .* \[1, 1, 4096\]"),
        ({"tensors": {"layers.0.mixer_shift": torch.full((1, 1, 16), torch.nan)}}, "holds a number that is not finite"),
        (
            {"tensors": {"layers.0.mixer_shift": torch.full((1, 1, 16), 1e300, dtype=torch.float64)}},
            "that is not finite",
        ),
        ({"tensors": {"layers.0.mixer_shift": torch.zeros(1, 1, 16, dtype=torch.complex64)}}, "is torch.complex64"),
        ({"tensors": {"layers.0.mixer_shift": torch.zeros(1, 1, 16, dtype=torch.bool)}}, "is torch.bool"),
        ({"tensors": {"layers.9.wkv": torch.zeros(1)}}, "layers.9.wkv is not part of a session"),
        ({"tokens": [11]}, "its tokens do not fit the model"),
        ({"tokens": [-1]}, "its metadata cannot be read"),
        ({"seen": [99]}, "its tokens do not fit the model"),
        ({"counted": [99], "counts": [1]}, "its tokens do not fit the model"),
        ({"counts": [1]}, r"it has 1 counts for \d+ tokens"),
        ({"tokens": []}, "its tokens do not fit the model"),
        ({"unread": 2**63}, "its metadata cannot be read"),
        ({"held": None}, "its metadata cannot be read"),
        ({"held": "[" * 10_000}, "its metadata cannot be read"),
        ({"model": "0"}, r"the session holds a session of another model \(rwkv7\)"),
        ({"header": {"timemix_session": "[" * 100_000}}, "its metadata cannot be read"),
        ({"header": {"timemix_session": "1" * 10_000}}, "its metadata cannot be read"),
        ({"header": {"crc32": "00000000"}}, "its content differs from its checksum"),
    ],
    ids=str,
)
def test_hostile_sessions_are_refused(changes, words):
    model = KINDS["rwkv7"]()
    content = changed(session_to_bytes(stream_of(model), model), **changes)
    with pytest.raises(DamagedFile, match=words):
        session_from_bytes(content, model)


@given(st.data())
@examples(300)
def test_damaged_bytes_give_a_session_or_an_error_of_ours(data):
    model = build_once()
    content = bytearray(session_to_bytes(stream_of(model), model))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        match data.draw(st.sampled_from(["cut", "set", "insert", "repeat"])):
            case "cut":
                del content[at : data.draw(st.integers(at, len(content)))]
            case "set":
                content[at : at + 8] = data.draw(st.binary(min_size=1, max_size=8))
            case "insert":
                content[at:at] = data.draw(st.binary(max_size=20))
            case "repeat":
                content[at:at] = content[at : at + 100]
    try:
        session = session_from_bytes(bytes(content), model)
        # What is accepted can be continued.
        alone(model, Request([1], 3, start=session))
    except (DamagedFile, InvalidValue):
        pass


def build_once(models=[]):  # noqa: B006
    if not models:
        models.append(KINDS["rwkv7"]())
    return models[0]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (2**20).to_bytes(8, "little") + b"{" * 2**20,
        (2**20).to_bytes(8, "little") + b"[" * 2**20,
        (2**40).to_bytes(8, "little") + b"{}",
        # A tensor that claims 4 TB.
        (74).to_bytes(8, "little")
        + b'{"position":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'
        + b"\0" * 5,
        # Many tensors without numbers.
        save({f"{i}": torch.zeros(0) for i in range(20_000)}),
        save({"position": torch.zeros(1)}, {"timemix_session": "[[]," * 2**18}),
        save({"position": torch.zeros(1)}, {"timemix_session": "[1000," * 2**18}),
        save({"position": torch.zeros(1)}, {"timemix_session": '{"tokens":[' + "0," * 2**19 + "0]}"}),
    ],
    ids=lambda content: f"{len(content)} bytes",
)
def test_hostile_headers_need_little_memory(content):
    model = build_once()
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFile):
            session_from_bytes(content, model)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(content) + 2**20


def test_a_session_of_huge_numbers_harms_no_other_text():
    model = KINDS["rwkv7"]()
    expected = [e.token for e in alone(model, Request([3], 9))]
    content = session_to_bytes(stream_of(model), model)
    huge = {name: torch.full_like(x, 3e38) for name, x in load(content).items() if name != "position"}
    hostile = session_from_bytes(changed(content, tensors=huge), model)
    engine = Engine(model, CHARACTERS)
    good, bad = engine.add(Request([3], 9)), engine.add(Request([], 9, start=hostile))
    events = finish(engine)
    assert [e.token for e in events[good]] == expected
    assert events[bad][-1].finished in ("error", "length")
