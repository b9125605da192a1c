"""The public face: its names, their docstrings, and the main job done through them alone."""

import inspect
import re

import pytest

import timemix

NAMES = {
    *("Architecture", "Engine", "Request", "Sampler", "Session", "build_model", "errors", "evaluate", "generate"),
    *(
        "list_architectures",
        "load",
        "load_session",
        "register_architecture",
        "save_session",
        "stream",
        "train",
        "__version__",
    ),
}
OBJECTS = sorted(NAMES - {"errors", "__version__"})
RETURN_NOTHING = ("register_architecture", "save_session")
RAISE_NOTHING = ("Architecture", "Session", "list_architectures")
TEXT = "the quick brown fox jumps over the lazy dog. " * 40
SETTINGS = {
    "model": {"layers": 1, "channels": 16, "heads": 2, "ctx_len": 16},
    "train": {"steps": 4, "batch_size": 2, "valid_every": 2, "device": "cpu"},
}


def test_the_public_names_are_these():
    assert set(timemix.__all__) == NAMES
    assert dir(timemix) == sorted(NAMES)


@pytest.mark.parametrize("name", OBJECTS)
def test_a_public_name_is_documented(name):
    public = getattr(timemix, name)
    text = inspect.getdoc(public)
    first, _, rest = text.partition("\n\n")
    assert first.endswith((".", '")`.'))
    assert "\n" not in first
    sections = {line for line in rest.splitlines() if line in ("Args:", "Returns:", "Raises:")}
    wanted = {"Args:"} if inspect.isclass(public) else {"Args:", "Returns:"}
    wanted -= {"Returns:"} if name in RETURN_NOTHING else set()
    assert sections >= wanted | (set() if name in RAISE_NOTHING else {"Raises:"})
    for argument in inspect.signature(public).parameters:
        assert f"    {argument}: " in rest or f"    **{argument}: " in rest, argument


def test_every_error_has_the_root_and_a_line():
    module = timemix.errors.__name__
    kinds = {each for each in vars(timemix.errors).values() if inspect.isclass(each) and each.__module__ == module}
    # Interrupted is no failure.
    for kind in kinds - {timemix.errors.Interrupted}:
        assert kind.__doc__
        assert issubclass(kind, timemix.errors.TimemixError)
    assert issubclass(timemix.errors.InvalidValue, ValueError)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("public")
    (folder / "text.txt").write_text(TEXT)
    timemix.train("cpu-small", folder / "run", data=str(folder / "text.txt"), **SETTINGS)
    return folder / "run"


def test_generate_and_stream_give_the_same_text(run):
    loaded = timemix.load(run)
    (text,) = timemix.generate(loaded, "the ", tokens=20, seed=3)
    assert "".join(timemix.stream(run, "the ", tokens=20, seed=3)) == text
    assert len(text) == 20


def test_evaluate_a_text_and_the_held_out_one(run):
    assert timemix.evaluate(run, TEXT).nats_per_token > 0
    assert timemix.evaluate(timemix.load(run)).tokens > 0


def test_a_saved_session_continues_the_text(run, tmp_path):
    loaded = timemix.load(run)
    ids = loaded.tokenizer.encode("the ").tolist()
    sampler = timemix.Sampler(temperature=0.8)

    def generated(request):
        engine = timemix.Engine(loaded.model, loaded.tokenizer)
        engine.add(request)
        events = []
        while engine.busy:
            events += engine.step()
        return "".join(event.text for event in events), events[-1].session

    whole, _ = generated(timemix.Request(ids, 12, sampler))
    first, session = generated(timemix.Request(ids, 5, sampler, keep_session=True))
    assert isinstance(session, timemix.Session)
    timemix.save_session(session, tmp_path / "session", loaded.model)
    session = timemix.load_session(tmp_path / "session", loaded.model)
    assert first + generated(timemix.Request([], 7, sampler, start=session))[0] == whole


def test_a_run_is_resumed_and_an_existing_one_refused(run):
    assert timemix.train(None, run, resume=True).config.train.steps == 4
    with pytest.raises(timemix.errors.AlreadyExists, match="exists already"):
        timemix.train("cpu-small", run)
    with pytest.raises(timemix.errors.InvalidValue, match="has its own settings"):
        timemix.train("cpu-small", run, resume=True)
    with pytest.raises(timemix.errors.InvalidValue, match="resume=True"):
        timemix.train(None, run)


def test_a_wrong_setting_is_named_as_an_argument(tmp_path):
    with pytest.raises(timemix.errors.InvalidValue, match="model.heads=3 does not divide model.channels=128"):
        timemix.train("cpu-small", tmp_path / "run", model={"heads": 3, "channels": 128})
    assert not (tmp_path / "run").exists()


def test_build_a_model():
    assert "rwkv1" in timemix.list_architectures()
    model = timemix.build_model("rwkv1", layers=2, channels=32, ctx_len=8)
    assert isinstance(model.architecture, timemix.Architecture)
    assert len(model.blocks) == 2
    with pytest.raises(timemix.errors.InvalidValue, match="did you mean 'layers'"):
        timemix.build_model("rwkv1", layer=2)


def test_the_cause_is_kept(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("x = ")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(timemix.errors.DamagedFile) as error:
        timemix.load(tmp_path)
    assert isinstance(error.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda run: timemix.build_model("rwkv1", initial="bogus"), "model.initial is 'bogus'"),
        (lambda run: timemix.build_model("rwkv1", layers=True), "model.layers is True; it must be of type int"),
        (lambda run: timemix.build_model("rwkv1", layers=1.5), "model.layers is 1.5"),
        (lambda run: timemix.build_model("rwkv1", token_shift=0.5), "model.token_shift is 0.5; it must be a list"),
        (lambda run: timemix.generate(run, "the ", weights="int3"), "weights='int3' is not supported"),
        (lambda run: timemix.generate(run, "the ", context="x"), "context='x' is not supported"),
        (lambda run: timemix.generate(run, b"the "), "text is of type bytes; it must be a str"),
        (lambda run: timemix.evaluate(run, TEXT, precision="float8"), "precision='float8' is not supported"),
        (lambda run: timemix.evaluate(run, 3), "text is int; it must be a str"),
        (lambda run: timemix.Engine(timemix.load(run)), "model is a Loaded; pass the model"),
        (lambda run: timemix.Request("the "), "prompt is a text"),
        (lambda run: timemix.Request([1], sampler={}), "sampler is {}; it must be a Sampler"),
        (lambda run: timemix.train(3, run), "config is 3; it must be the name of a preset"),
        (lambda run: timemix.train("cpu-small", run, model="x"), "model is 'x'; it must be a dictionary"),
    ],
)
def test_a_wrong_argument_is_one_sentence(run, call, words):
    with pytest.raises(timemix.errors.InvalidValue, match=re.escape(words)):
        call(run)


def test_a_device_that_is_not_there(run):
    with pytest.raises(timemix.errors.Unavailable, match="device 'cuda:7' cannot be used"):
        timemix.load(run, device="cuda:7")
