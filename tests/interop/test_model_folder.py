"""The folder that `timemix export --to hf` writes, without transformers."""

import json
import shutil
import tomllib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.commands import run_command
from tests.helpers.published import imported
from tests.helpers.runs import small_config, small_trainer, write_text_file
from timemix.errors import AlreadyExists, DamagedFile, FileError
from timemix.interop.export import export_run
from timemix.interop.importing import import_run
from timemix.runs.folder import best
from timemix.runs.load import load
from timemix.storage.index import shard_name, write_index
from timemix.storage.tensors import read_tensors, write_tensors
from timemix.tokenizers.make import load_tokenizer, train_tokenizer
from timemix.training.start import new_run

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
    assert "\n    pip install '/path/to/timemix[hf]'\n" in card
    assert str(run.parent) not in card


def test_the_card_of_a_fine_tuned_run_names_no_folders(run, tmp_path):
    config = replace(small_config(write_text_file(tmp_path)), start=str(run))
    trained = new_run(config, tmp_path / "secret/run").run()
    export_run(trained.parent.parent, "hf", tmp_path / "hf")
    card = (tmp_path / "hf/README.md").read_text()
    assert 'source = "text.txt"' in card
    settings = tomllib.loads(card.partition("```toml\n")[2].partition("```")[0])
    assert "start" not in settings
    assert "The content of `run.toml` for `timemix train --config run.toml --data TEXT --out RUN`:" in card
    for folder in (run.parent, tmp_path):
        assert str(folder) not in card


def test_imported_weights_keep_their_type(tmp_path):
    run = imported(tmp_path)
    export_run(run, "hf", tmp_path / "hf")
    weights, own = load_file(tmp_path / "hf/model.safetensors"), load_file(best(run) / "model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.bfloat16}
    assert all(weights[f"model.{name}"].equal(x) for name, x in own.items())
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "float32"
    card = (tmp_path / "hf/README.md").read_text()
    assert "was not measured" in card
    # The settings have 0 steps, so `timemix train` cannot use them.
    assert "The content of `run.toml` without settings of its training:" in card


def test_weights_of_several_types_and_files(run, tmp_path):
    checkpoint = shutil.copytree(best(run), tmp_path / "checkpoint")
    types = (torch.float64, torch.bfloat16, torch.float32, torch.float16)
    whole = load_file(checkpoint / "model.safetensors")
    whole = {name: x.to(types[i % 4]) for i, (name, x) in enumerate(sorted(whole.items()))}
    shards = [{n: x[: len(x) // 2] for n, x in whole.items()}, {n: x[len(x) // 2 :] for n, x in whole.items()}]
    checksums = [write_tensors(checkpoint / shard_name("model", i, 2), shards[i], {}) for i in range(2)]
    write_index(checkpoint, "model", checksums, {name: x.shape for name, x in whole.items()})
    (checkpoint / "model.safetensors").unlink()
    export_run(checkpoint, "hf", tmp_path / "hf")
    found = read_tensors(tmp_path / "hf/model.safetensors")
    assert {name.removeprefix("model."): x.dtype for name, x in found.items()} == {n: x.dtype for n, x in whole.items()}
    assert all(found[f"model.{name}"].equal(x) for name, x in whole.items())
    # The library refuses a file with gaps.
    assert load_file(tmp_path / "hf/model.safetensors").keys() == found.keys()


@pytest.mark.parametrize("arch", ["rwkv1_exp", "llama"])
def test_import_of_an_exported_folder(arch, tmp_path):
    small_trainer(tmp_path, arch, steps=1).run()
    export_run(tmp_path / "run", "hf", tmp_path / "hf")
    import_run(tmp_path / "hf", tmp_path / "again", ctx_len=99)
    old, new = load(tmp_path / "run"), load(tmp_path / "again")
    assert new.model.config == old.model.config
    assert new.tokenizer.hash == old.tokenizer.hash
    weights = new.model.state_dict()
    assert all(weights[name].equal(x) for name, x in old.model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"timemix": None}, "config.json has no settings of timemix; restore it from a copy"),
        ({"timemix": {"arch": 7}}, "config.json has no settings of timemix"),
        ({"timemix": {"arch": "rwkv7", "wide": 3}}, "has wrong settings of timemix: rwkv7 has no field 'wide'"),
        ({"vocab_size": 25}, r"'model.embedding.weight' is \[24, 16\], not \[25, 16\]"),
        ({"vocab_size": "a"}, "model.vocab_size is 'a'; it must be of type int"),
    ],
)
def test_import_of_a_damaged_folder(run, tmp_path, changes, sentence):
    export_run(run, "hf", tmp_path / "hf")
    document = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(document | changes))
    with pytest.raises(DamagedFile, match=sentence):
        import_run(tmp_path / "hf", tmp_path / "again")


def test_a_weight_without_the_prefix_is_refused(run, tmp_path):
    """It would take the place of the weight with the prefix."""
    export_run(run, "hf", tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    weights = load_file(path)
    save_file(weights | {"norm.weight": torch.zeros_like(weights["model.norm.weight"])}, path)
    with pytest.raises(DamagedFile, match=r"has the unknown weight 'norm.weight'; restore it from a copy"):
        import_run(tmp_path / "hf", tmp_path / "again")


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
