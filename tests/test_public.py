"""The public API: its names, their docstrings, and the main tasks done with them alone."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import partial

import pytest

import timemix
import timemix.ops
import timemix.ops.common.operators
from timemix.generation.decode import ModelStep, Step
from timemix.generation.request import Event
from timemix.models.language_model import LanguageModel
from timemix.models.layers.block import Block, Kept, Recipe
from timemix.models.layers.shifted_block import ShiftedBlock
from timemix.models.state import State
from timemix.tokenizers.base import Tokenizer
from timemix.tokenizers.stream import StreamDecoder

NAMES = {
    *("Architecture", "Engine", "PrefixCache", "Request", "Sampler", "Session"),
    *("build_model", "errors", "evaluate", "generate", "session_from_bytes", "session_to_bytes"),
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
RAISE_NOTHING = ("Architecture", "Session", "list_architectures", "session_to_bytes")
TEXT = "the quick brown fox jumps over the lazy dog. " * 40
SETTINGS = {
    "model": {"layers": 1, "channels": 16, "heads": 2, "ctx_len": 16},
    "train": {"steps": 4, "batch_size": 2, "valid_every": 2, "device": "cpu"},
}


def test_the_public_names_are_these():
    assert set(timemix.__all__) == NAMES
    assert dir(timemix) == sorted(NAMES)


def sections(text):
    """Return the sections of a docstring, each with the names that its lines begin with: `name: ...`."""
    found, names = {}, []
    for line in text.splitlines():
        if re.fullmatch("[A-Z][a-z]+:", line):
            found[line] = names = []
        elif entry := re.match(r" {4}(\*{0,2}\w+): \S", line):
            names.append(entry[1])
    return found


def parameters_of(call):
    """Return the names of a callable's parameters as a docstring lists them: `x`, `*x`, `**x`."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    listed = inspect.signature(call).parameters.values()
    return [stars.get(each.kind, "") + each.name for each in listed if each.name != "self"]


def public_methods(kind):
    """Yield the public methods and properties that a class defines itself, with their names."""
    for name, member in vars(kind).items():
        is_public = not name.startswith("_") or (name == "__call__" and kind is Step)
        if is_public and (inspect.isroutine(member) or isinstance(member, property | staticmethod | classmethod)):
            yield f"{kind.__name__}.{name}", member if isinstance(member, property) else getattr(kind, name)


def public_ops():
    """Yield the functions and classes of `timemix.ops` that do not begin with an underscore, with their names."""
    for module in pkgutil.walk_packages(timemix.ops.__path__, "timemix.ops."):
        for name, member in vars(importlib.import_module(module.name)).items():
            member = getattr(member, "function", member)
            is_function = inspect.isfunction(member) or inspect.isclass(member)
            if is_function and not name.startswith("_") and member.__module__ == module.name:
                yield f"{module.name}.{name}", member


CLASSES = [each for each in map(partial(getattr, timemix), OBJECTS) if inspect.isclass(each)]
BASES = [Block, Event, Kept, LanguageModel, ModelStep, Recipe, ShiftedBlock, State, StreamDecoder, Tokenizer]
"""Classes that a person meets who adds an architecture or a tokenizer, or embeds a model."""
CALLABLES = dict(
    [
        *((name, getattr(timemix, name)) for name in OBJECTS),
        *((kind.__name__, kind) for kind in BASES),
        *(
            method
            for kind in (*CLASSES, *BASES, Step, timemix.ops.common.operators.Operator)
            for method in public_methods(kind)
        ),
        *public_ops(),
    ]
)


@pytest.mark.parametrize("name", sorted(CALLABLES))
def test_a_public_callable_lists_its_arguments_and_results(name):
    call = CALLABLES[name]
    text = inspect.getdoc(call)
    first, _, rest = text.partition("\n\n")
    assert "\n" not in first
    assert first.endswith(".")
    if isinstance(call, property):
        return
    if not inspect.isclass(call):
        assert first.split()[0] not in ("A", "All", "An", "One", "The", "What", "Whether")
    found = sections(rest)
    assert found.get("Args:", []) == parameters_of(call)
    returns_nothing = inspect.isclass(call) or inspect.signature(call).return_annotation in (None, Iterator[None])
    assert returns_nothing or {"Returns:", "Yields:"} & found.keys()


@pytest.mark.parametrize("name", sorted(set(OBJECTS) - set(RAISE_NOTHING)))
def test_a_public_name_lists_its_errors(name):
    assert sections(inspect.getdoc(getattr(timemix, name)))["Raises:"]


def test_every_error_has_the_root_and_a_line():
    module = timemix.errors.__name__
    kinds = {each for each in vars(timemix.errors).values() if inspect.isclass(each) and each.__module__ == module}
    # Interrupted is not a failure.
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
    with pytest.raises(timemix.errors.InvalidValue, match="config, model and data cannot change"):
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
