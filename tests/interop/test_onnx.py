"""ONNX files: onnxruntime computes the logits and states of timemix from any state, and refusals."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.helpers.commands import run_command
from tests.helpers.gguf_files import write_run
from tests.helpers.limits import bytes_per_file
from tests.helpers.models import heads_of
from timemix.errors import AlreadyExists, CannotWrite, InvalidValue, Unavailable
from timemix.interop import onnx as exporting
from timemix.interop.onnx import export_onnx
from timemix.models.language_model import build_model
from timemix.models.registry import list_architectures
from timemix.storage.files import unfinished_name
from timemix.tokenizers.make import load_tokenizer, train_tokenizer

BYTES = train_tokenizer("byte", "a")


def random_model(arch, **fields):
    """Return a model in which no weight is zero."""
    torch.manual_seed(0)
    sizes = {"layers": 2, "channels": 32, "ctx_len": 8, **heads_of(arch, 4)}
    model = build_model(arch, vocab_size=256, **(sizes | fields))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", random_model("rwkv7", layers=1), BYTES)


def by_name(state):
    """Return the state as inputs of an ONNX file."""
    layers = {f"state.{i}.{name}": x.numpy() for i, layer in enumerate(state.layers) for name, x in layer.items()}
    return {"position": state.position.numpy()} | layers


def close(found, expected):
    """Compare with an error of 1e-5 of the largest number."""
    largest = abs(expected).max() if expected.size else 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, largest))


@pytest.mark.slow
@pytest.mark.parametrize("arch", list_architectures(bounded=False))
def test_onnxruntime_gives_the_logits_and_states_of_timemix(tmp_path, arch):
    pytest.importorskip("onnxscript")
    import onnxruntime

    model = random_model(arch)
    export_onnx(write_run(tmp_path / "run", model, BYTES), tmp_path / "mine")
    session = onnxruntime.InferenceSession(tmp_path / "mine/model.onnx", providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_inputs()][:2] == ["token", "position"]
    names = [x.name for x in session.get_outputs()]
    tokens = torch.randint(256, (3, 27), generator=torch.Generator().manual_seed(1))
    for rows, read in ((1, 0), (3, 0), (1, 7), (3, 7)):
        state = model.init_state(rows)
        if read:
            with torch.no_grad():
                _, state = model(tokens[:rows, :read], state)
        fed = by_name(state)
        if not read:
            # A new context begins with zeros, also where the state of timemix begins with other numbers.
            fed = {name: np.zeros_like(x) for name, x in fed.items()}
        for token in tokens[:rows, read : read + 20].T:
            found = dict(zip(names, session.run(None, {"token": token.numpy(), **fed}), strict=True))
            with torch.no_grad():
                logits, state = model(token[:, None], state, logits="last")
            close(found.pop("logits"), logits.numpy())
            fed = {
                name.replace("next.", "state.").replace("state.position", "position"): x for name, x in found.items()
            }
            for name, x in by_name(state).items():
                close(fed[name], x)
            assert fed.keys() == by_name(state).keys()


@pytest.mark.slow
def test_the_file_has_no_path_of_this_machine(run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxscript")
    import onnx

    monkeypatch.chdir(tmp_path)
    status, out, err = run_command(capsys, "export", "run", "--to", "onnx", "--out", "mine", "--json")
    assert (status, json.loads(out)["files"], err) == (0, ["mine/model.onnx", "mine/tokenizer.json"], "")
    found = onnx.load("mine/model.onnx")
    onnx.checker.check_model(found, full_check=True)
    about = {each.key: each.value for each in found.metadata_props}
    assert about == {"timemix.architecture": "rwkv7"}
    assert load_tokenizer("mine/tokenizer.json").hash == BYTES.hash
    content = (tmp_path / "mine/model.onnx").read_bytes()
    assert b".py" not in content
    assert found.graph.input[0].type.tensor_type.shape.dim[0].dim_param


@pytest.mark.slow
def test_a_full_disk(run, tmp_path):
    pytest.importorskip("onnxscript")
    with bytes_per_file(2**14), pytest.raises(CannotWrite, match="cannot write .*mine.*: File too large"):
        export_onnx(run, tmp_path / "mine")
    assert list(tmp_path.iterdir()) == [run]


@pytest.fixture
def packages(monkeypatch):
    """Imitate the package onnxscript, which the refusals before an export do not use."""
    monkeypatch.setitem(sys.modules, "onnxscript", sys)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_export_leaves_no_file(run, tmp_path, packages, monkeypatch, error):
    def fail(model):
        (written,) = tmp_path.glob(".mine.partial-*/*")
        assert written.name == "tokenizer.json"
        raise error

    monkeypatch.setattr(exporting, "step_program", fail)
    with pytest.raises(error):
        export_onnx(run, tmp_path / "mine")
    assert list(tmp_path.iterdir()) == [run]


def test_a_killed_export_does_not_hinder_the_next(run, tmp_path, monkeypatch):
    # The largest process id of Linux is 2^22.
    left = unfinished_name(tmp_path / "mine", 2**22 + 1)
    left.mkdir()
    (left / "tokenizer.json").write_text("")

    program = SimpleNamespace(SerializeToString=lambda: b"program")
    helper = SimpleNamespace(set_model_props=lambda program, about: None)
    monkeypatch.setattr(exporting, "_library", lambda: SimpleNamespace(helper=helper))
    monkeypatch.setattr(exporting, "step_program", lambda model: program)
    export_onnx(run, tmp_path / "mine")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "mine"}
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"model.onnx", "tokenizer.json"}


@pytest.mark.parametrize(
    ("arch", "end"),
    [
        ("rwkv1", "convert the model with timemix convert, and export the new model$"),
        ("llama", "export a model of rwkv1_exp.*rwkv7$"),
    ],
)
def test_an_architecture_with_a_growing_state(tmp_path, packages, arch, end):
    run = write_run(tmp_path / "run", random_model(arch), BYTES)
    with pytest.raises(InvalidValue, match=f"a model of {arch} has no state of constant size, .*{end}"):
        export_onnx(run, tmp_path / "a")
    assert list(tmp_path.iterdir()) == [run]


def test_an_operator_that_onnx_does_not_have(run, tmp_path, packages, monkeypatch):
    def fail(*_, **__):
        try:
            raise RuntimeError("no function for aten.mine\ndetails")
        except RuntimeError as error:
            raise torch.onnx.OnnxExporterError("step 3/3\nadvice") from error

    monkeypatch.setattr(torch.onnx, "export", fail)
    sentence = "PyTorch cannot export a model of rwkv7 to ONNX: no function for aten.mine; export another model$"
    with pytest.raises(InvalidValue, match=sentence):
        export_onnx(run, tmp_path / "a")
    assert list(tmp_path.iterdir()) == [run]


def test_a_model_above_the_size_of_a_file(run, tmp_path, packages, monkeypatch):
    monkeypatch.setattr(exporting, "LARGEST", 1000)
    with pytest.raises(
        InvalidValue, match=r"the weights have [\d,]+ bytes in float32, more than the 1,000 bytes of an"
    ):
        export_onnx(run, tmp_path / "a")


def test_a_folder_that_exists_is_not_replaced(run, tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(AlreadyExists, match="a exists already; choose another folder"):
        export_onnx(run, tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []


def test_the_name_of_a_file_is_refused(run, tmp_path):
    with pytest.raises(
        InvalidValue, match=r"a\.onnx is the name of a file, but the export is a folder; give a folder, "
    ):
        export_onnx(run, tmp_path / "a.onnx")


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_without_a_package(run, tmp_path, monkeypatch, packages, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        Unavailable, match=r"the packages onnx and onnxscript are not installed; run: pip install 'time"
    ):
        export_onnx(run, tmp_path / "a")
