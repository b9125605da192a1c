"""The store of states: its limit, its folder, its disk."""

import contextlib
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.serving import served
from tests.helpers.states import OWN, assert_refused, read, same, session_after
from timemix.cli.serve import ServeArguments
from timemix.errors import CannotWrite, InvalidValue
from timemix.server import state_store
from timemix.server.app import Settings
from timemix.server.errors import ApiError
from timemix.server.state_store import StateStore, largest_file


def test_a_full_store_refuses_before_it_generates(model):
    most = 3 * largest_file(model)
    with served([same()], Settings(state_bytes=most)) as server:
        state = read(server)
        body = {"prompt": "a", "max_tokens": 1, "return_state": True}
        assert_full(server.call("/v1/completions", body | {"n": 3}))
        assert server.models[0].metrics.generated_tokens == 0
        stored = [state]
        with contextlib.suppress(AssertionError):
            while True:
                stored.append(read(server))
        assert sum(each["bytes"] for each in stored) <= most
        assert_full(server.call("/v1/states", {"prompt": "a"}))
        assert_full(server.call("/v1/completions", body))
        assert_full(server.call(f"/v1/states/{OWN}", b"", "PUT"))
        while server.call(f"/v1/states/{state['id']}/fork", {}).status == 200:
            pass
        assert_full(server.call(f"/v1/states/{state['id']}/fork", {}))
        found = server.call("/v1/states").json["data"]
        assert sum(each["bytes"] for each in found) <= most
        for each in found:
            server.call(f"/v1/states/{each['id']}", method="DELETE")
        assert read(server)["tokens"] == 5


def assert_full(answer):
    assert_refused(answer, 429, None, "the storage for states is full", "state_storage_full")


def test_states_in_a_folder_survive_a_restart(tmp_path):
    settings = Settings(state_dir=tmp_path / "states", keys=["one", "two"])
    key, body = {"Authorization": "Bearer one"}, {"seed": 1, "max_tokens": 6}
    with served([same()], settings) as server:
        state = server.call("/v1/states", {"prompt": "abcab", "name": "a\nb"}, **key).json
        expected = server.call("/v1/completions", {"prompt": "abcab"} | body, **key).json["choices"]
        content = server.call(f"/v1/states/{state['id']}", **key).body
    (path,) = (tmp_path / "states").glob("*/*")
    assert path.name == state["id"]
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0
    with served([same()], settings) as server:
        assert server.app.state.service.states.nbytes == state["bytes"]
        assert server.call("/v1/states", **key).json["data"] == [state]
        assert server.call("/v1/states", Authorization="Bearer two").json["data"] == []
        assert server.call("/v1/completions", {"state": state["id"]} | body, **key).json["choices"] == expected
        assert server.call(f"/v1/states/{state['id']}", **key).body == content
        server.call(f"/v1/states/{state['id']}", method="DELETE", **key)
        assert not path.exists()
        assert server.app.state.service.states.nbytes == 0


def test_damaged_files_are_reported_and_left_out(tmp_path, capsys):
    settings = Settings(state_dir=tmp_path)
    with served([same()], settings) as server:
        states = [read(server, name=str(number)) for number in range(5)]
    folder = tmp_path / "no-key"
    short, junk, wrong, inner, good = (folder / each["id"] for each in states)
    short.write_bytes(short.read_bytes()[:-1])
    junk.write_bytes(b"\xff" * 10_000)
    wrong.write_bytes(wrong.read_bytes().replace(b'"tokens": 5', b'"tokens": -'))
    inner.write_bytes(inner.read_bytes()[:-1] + b"\x01")
    (folder / "notes.txt").write_text("not a state")
    (folder / OWN).mkdir()
    capsys.readouterr()
    with served([same()], settings) as server:
        found = server.call("/v1/states").json["data"]
        assert {each["id"] for each in found} == {inner.name, good.name}
        reported = capsys.readouterr().err
        assert sorted(re.findall(r"state-\w+", reported)) == sorted([short.name, junk.name, wrong.name, OWN])
        answer = server.call("/v1/completions", {"state": inner.name})
        assert_refused(answer, 400, "state", "content differs from its checksum")
        assert server.complete(state=good.name, max_tokens=1)["usage"]["completion_tokens"] == 1


def test_two_servers_share_a_folder(tmp_path):
    settings = Settings(state_dir=tmp_path)
    with served([same()], settings) as one, served([same()], settings) as two:
        state = read(one)["id"]
        body = {"state": state, "seed": 1, "max_tokens": 6}
        assert two.complete(**body)["choices"] == one.complete(**body)["choices"]
        assert two.call(f"/v1/states/{state}", method="DELETE").status == 200
        assert one.call(f"/v1/states/{state}").status == 404
        assert one.call("/v1/states").json["data"] == []
        assert one.app.state.service.states.nbytes == 0


def test_a_state_that_another_server_changes_is_read_again(tmp_path):
    settings = Settings(state_dir=tmp_path)
    with served([same()], settings) as one, served([same()], settings) as two:
        contents = {text: one.call(f"/v1/states/{read(one, text)['id']}").body for text in ("abcab", "kkjji")}
        expected = {text: one.complete(prompt=text, seed=1, max_tokens=6)["choices"] for text in contents}
        body = {"state": OWN, "seed": 1, "max_tokens": 6}
        one.call(f"/v1/states/{OWN}?name=first", contents["abcab"], "PUT")
        store = one.app.state.service.states
        kept = store.session("", OWN, one.models[0])
        assert one.complete(**body)["choices"] == expected["abcab"]
        two.call(f"/v1/states/{OWN}?name=second", contents["kkjji"], "PUT")
        # A request that still runs holds the old session.
        assert one.complete(**body)["choices"] == two.complete(**body)["choices"] == expected["kkjji"]
        assert store.session("", OWN, one.models[0]) is not kept
        assert {each["id"]: each["name"] for each in one.call("/v1/states").json["data"]}[OWN] == "second"
        two.call(f"/v1/states/{OWN}", method="DELETE")
        assert_refused(one.call("/v1/completions", body), 404, "state", "there is no state", "state_not_found")


def test_a_file_that_vanishes_is_not_damaged(tmp_path, monkeypatch, capsys):
    with served([same()], Settings(state_dir=tmp_path)) as server:
        ids = [read(server)["id"] for _ in range(2)]
    listed = state_store._files

    def vanishing(folder):
        for path in list(listed(folder)):
            if path.name == ids[0]:
                monkeypatch.setattr(state_store, "check_regular", lambda path: path.unlink(missing_ok=True))
            yield path

    monkeypatch.setattr(state_store, "_files", vanishing)
    store = StateStore(10**6, tmp_path)
    assert len(store) == 0
    assert not capsys.readouterr().err


def test_the_order_of_states_survives_a_restart(tmp_path):
    with served([same()], Settings(state_dir=tmp_path)) as server:
        ids = [read(server)["id"] for _ in range(8)]
    assert [each.id for each in StateStore(10**6, tmp_path).descriptions("")] == ids


def test_a_store_that_is_too_small_for_one_state_says_so(model):
    with served([same()], Settings(state_bytes=largest_file(model) - 1)) as server:
        answer = server.call("/v1/states", {"prompt": "abc"})
    sentence = f"a state of this model may need {largest_file(model):,} bytes; start the server with a larger"
    assert_refused(answer, 429, None, sentence, "state_storage_full")


def test_a_full_disk(tmp_path, monkeypatch, capsys):
    from timemix.storage import files

    def no_space(path):
        raise OSError(28, "No space left on device")

    with served([same()], Settings(state_dir=tmp_path)) as server:
        state = read(server)
        monkeypatch.setattr(files, "_sync", no_space)
        answer = server.call("/v1/states", {"prompt": "abc"})
        assert_refused(answer, 429, None, "its disk is full", "state_storage_full")
        assert str(tmp_path) not in answer.json["error"]["message"]
        assert "no space left" in capsys.readouterr().err
        monkeypatch.undo()
        assert [each["id"] for each in server.call("/v1/states").json["data"]] == [state["id"]]
        assert server.app.state.service.states.nbytes == state["bytes"]
        assert [path.name for path in tmp_path.glob("*/*")] == [state["id"]]


def test_requests_share_the_session_of_a_state(server):
    states = server.app.state.service.states
    id = read(server)["id"]
    one, two = (states.session("", id, server.models[0]) for _ in range(2))
    assert one is two


@pytest.mark.parametrize("is_in_folder", [False, True])
def test_threads_leave_a_consistent_store(tmp_path, is_in_folder):
    model = same()
    session = session_after(model.engine.model, [0, 1, 2])
    store = StateStore(30_000, tmp_path if is_in_folder else None)

    def use(number):
        """Fork, replace and delete states, of which some belong to other threads too."""
        owner, own = f"{number % 2}", f"state-{number % 3:032x}"
        for _ in range(20):
            with contextlib.suppress(ApiError):
                store.add(owner, model, session, id=own)
                store.fork(owner, own, None)
                assert store.session(owner, own, model).tokens == session.tokens
                store.remove(owner, store.descriptions(owner)[number % 2].id)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(use, range(6)))
    left = [each for owner in "01" for each in store.descriptions(owner)]
    assert 0 < store.nbytes == sum(each.bytes for each in left) <= 30_000
    assert len(store) == len(left)
    if is_in_folder:
        again = StateStore(30_000, tmp_path)
        assert (again.nbytes, len(again)) == (store.nbytes, len(store))
        assert sorted(again.descriptions("0"), key=str) == sorted(store.descriptions("0"), key=str)


def test_wrong_settings_of_the_store(tmp_path):
    with pytest.raises(InvalidValue, match="--state-bytes is -1; it must be from 0"):
        ServeArguments((tmp_path,), state_bytes=-1)
    with pytest.raises(InvalidValue, match="--cache-bytes is -1; it must be from 0"):
        ServeArguments((tmp_path,), cache_bytes=-1)
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match="cannot write .*states: Not a directory"):
        StateStore(0, tmp_path / "file" / "states")
