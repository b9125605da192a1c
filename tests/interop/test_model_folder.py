"""The folder that `timemix export --to hf` writes, without transformers."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from tests.helpers.commands import run_command
from tests.helpers.runs import small_trainer
from timemix.errors import AlreadyExists, DamagedFile, FileError
from timemix.interop.export import export_run
from timemix.runs.folder import best
from timemix.runs.load import load
from timemix.tokenizers.make import load_tokenizer, train_tokenizer

FILES = [
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "modeling_timemix.py",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    small_trainer(folder, steps=4).run()
    return folder / "run"


def test_the_command(run, tmp_path, capsys):
    status, out, err = run_command(capsys, "export", run, "--to", "hf", "--out", tmp_path / "hf")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "transformers opens this folder with timemix installed: pip install 'timemix[hf]'"
    status, out, _ = run_command(capsys, "export", run, "--to", "hf", "--out", tmp_path / "again", "--json")
    assert json.loads(out)["files"] == [str(tmp_path / "again" / name) for name in FILES]
    assert all((tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in FILES)


def test_the_files(run, tmp_path):
    export_run(run, "hf", tmp_path / "hf")
    loaded = load(run)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["timemix"]["arch"] == "rwkv1"
    assert (config["max_position_embeddings"], config["vocab_size"], config["hidden_size"]) == (16, 24, 16)
    assert load_tokenizer(tmp_path / "hf/tokenizer.json").hash == loaded.tokenizer.hash
    weights = load_file(tmp_path / "hf/model.safetensors")
    own = loaded.model.state_dict()
    assert weights.keys() == {f"model.{name}" for name in own}
    assert all(weights[f"model.{name}"].equal(x) for name, x in own.items())
    card = (tmp_path / "hf/README.md").read_text()
    loss = json.loads((best(run) / "training.json").read_text())["valid_loss"]
    assert f"the loss on the held-out text of the run is {loss:.4f} nats per token" in card
    assert 'source = "text.txt"' in card
    assert str(run.parent) not in card


def test_a_folder_that_exists(run, tmp_path):
    with pytest.raises(AlreadyExists, match="exists already; choose another folder"):
        export_run(run, "hf", tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.safetensors", b"{}"), ("config.toml", b""), ("tokenizer.json", b"{}"), ("training.json", b"[]")],
)
def test_a_damaged_checkpoint(run, tmp_path, name, content):
    checkpoint = shutil.copytree(best(run), tmp_path / "checkpoint")
    (checkpoint / name).write_bytes(content)
    with pytest.raises(FileError, match=name):
        export_run(checkpoint, "hf", tmp_path / "hf")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_weights_that_changed(run, tmp_path):
    checkpoint = shutil.copytree(best(run), tmp_path / "checkpoint")
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(DamagedFile, match="its content differs from its checksum"):
        export_run(checkpoint, "hf", tmp_path / "hf")


def test_the_tokenizer_of_another_model(run, tmp_path):
    checkpoint = shutil.copytree(best(run), tmp_path / "checkpoint")
    train_tokenizer("character", "abc").save(checkpoint / "tokenizer.json")
    with pytest.raises(DamagedFile, match="is not the tokenizer of this model: it has 3 tokens, not 24"):
        export_run(checkpoint, "hf", tmp_path / "hf")
