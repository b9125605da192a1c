"""Published weights of RWKV-4: a file of the original code and a folder of transformers, in and out."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.published import GOLDEN, imported
from timemix.interop.export import export_run
from timemix.interop.published import read_published
from timemix.models.language_model import LanguageModel
from timemix.runs.load import load

PTH = GOLDEN / "rwkv4.pth"


def golden():
    found = load_file(GOLDEN / "rwkv4-expected.safetensors")
    return found["input"].long(), found["logits"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return imported(tmp_path_factory.mktemp("rwkv4"), PTH)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rwkv4") / "hf"
    export_run(run, "hf", folder, form="native")
    return folder


def check_logits(path):
    published = read_published(path, 32)
    model = LanguageModel(published.config).double()
    model.load_state_dict(published.weights)
    tokens, logits = golden()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[0], logits, atol=1e-9, rtol=0)


def test_a_file_of_the_original_code():
    check_logits(PTH)


def test_a_run_of_the_file(run):
    loaded = load(run)
    assert loaded.config.model.arch == "rwkv4"
    tokens, logits = golden()
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.float()(tokens)[0].double(), logits, atol=1e-5, rtol=0)


def test_the_export_has_the_same_bits(run, tmp_path):
    export_run(run, "pth", tmp_path / "out")
    before = torch.load(PTH, weights_only=True)
    after = torch.load(tmp_path / "out/model.pth", weights_only=True)
    assert after.keys() == before.keys()
    assert all(after[name].dtype == x.dtype and after[name].equal(x) for name, x in before.items())


def test_a_folder_of_transformers(folder, tmp_path):
    """The names, shapes and hashes are those that transformers wrote for the same weights in float32."""
    known = json.loads((GOLDEN / "rwkv4-hf.json").read_text())
    weights = {name: x.float() for name, x in load_file(folder / "model.safetensors").items()}
    assert weights.keys() == known["tensors"].keys()
    for name, x in weights.items():
        assert list(x.shape) == known["tensors"][name]["shape"]
        assert hashlib.sha256(x.numpy().tobytes()).hexdigest() == known["tensors"][name]["sha256"], name
    ours = json.loads((folder / "config.json").read_text())
    both = ours.keys() - {"dtype", "context_length", "bos_token_id", "eos_token_id"}
    assert {name: known["config"][name] for name in both} == {name: ours[name] for name in both}
    theirs = tmp_path / "hf"
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps(known["config"]))
    save_file(weights, theirs / "model.safetensors")
    check_logits(theirs)
    check_logits(folder)


@pytest.mark.slow
def test_transformers_opens_the_exported_folder(folder):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    model = transformers.RwkvForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, logits = golden()
    # transformers computes wrong logits for more than one row at a time.
    with torch.no_grad():
        found = torch.cat([model(row[None], use_cache=False).logits for row in tokens])
    torch.testing.assert_close(found.double(), logits, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_transformers_generates_past_token_0_of_a_vocabulary_without_an_end(folder):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    model = transformers.RwkvForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # All logits are equal, so the most probable token is always token 0.
    torch.nn.init.zeros_(model.head.weight)
    found = model.generate(torch.tensor([[3, 0, 5]]), max_new_tokens=4, do_sample=False)
    assert found.tolist() == [[3, 0, 5, 0, 0, 0, 0]]
