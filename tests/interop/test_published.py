"""Published weights of RWKV-7: import with the logits of the original code, bit-identical export, and refusals."""

import hashlib
import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import timemix
from tests.helpers.commands import run_command
from tests.helpers.limits import bytes_per_file
from tests.helpers.published import (
    GOLDEN,
    PTH,
    TEXT,
    expected,
    hugging_face_document,
    imported,
    published_weights,
    tokenizer_file,
)
from tests.helpers.vocabularies import BYTES, vocabulary_lines
from timemix.errors import AlreadyExists, CannotWrite, DamagedFile, FileError, InvalidValue, MissingFile
from timemix.interop.export import export_run
from timemix.interop.importing import import_run
from timemix.interop.published import read_published, version_of
from timemix.runs.load import load
from timemix.tokenizers.make import train_tokenizer

OTHERS = json.loads((GOLDEN / "other-versions.json").read_text())
HUGGING_FACE = json.loads((GOLDEN / "rwkv7-hf.json").read_text())
UNUSED = {f"blocks.0.att.v{i}" for i in range(3)}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the golden file."""
    return imported(tmp_path_factory.mktemp("imported"))


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """A folder in the form of Hugging Face."""
    out = tmp_path_factory.mktemp("exported") / "hf"
    export_run(run, "hf", out, form="native")
    return out


def check_logits(run: Path) -> None:
    logits, _ = timemix.load(run).model.double()(expected()["input"])
    torch.testing.assert_close(logits, expected()["logits"], atol=1e-9, rtol=0)


def test_logits_of_the_original_code(run):
    check_logits(run)


def test_sizes_come_from_the_shapes(run):
    config = timemix.load(run).config.model
    assert (config.layers, config.channels, config.heads, config.ctx_len) == (2, 64, 1, 32)
    assert config.ranks == {"decay": 24, "rate": 20, "residual": 16, "gate": 40}


def test_weights_stay_in_bfloat16_on_disk(run):
    (path,) = run.glob("checkpoints/*/model.safetensors")
    assert {x.dtype for x in load_file(path).values()} == {torch.bfloat16}
    assert {x.dtype for x in timemix.load(run).model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_export_gives_every_tensor_back_bit_by_bit(tmp_path, dtype):
    original = {name: x.to(dtype) for name, x in published_weights().items()}
    torch.save(original, tmp_path / "a.pth")
    export_run(imported(tmp_path, tmp_path / "a.pth"), "pth", tmp_path / "out")
    found = torch.load(tmp_path / "out/model.pth", weights_only=True)
    assert found.keys() == original.keys()
    assert all(same_bytes(found[name], x) for name, x in original.items())


def test_weights_in_two_types_keep_their_types(tmp_path):
    original = {n: x.float() if n.endswith("w0") else x for n, x in published_weights().items()}
    torch.save(original, tmp_path / "a.pth")
    export_run(imported(tmp_path, tmp_path / "a.pth"), "pth", tmp_path / "out")
    found = torch.load(tmp_path / "out/model.pth", weights_only=True)
    assert all(same_bytes(found[name], x) for name, x in original.items())


def test_unused_tensors_are_beside_the_model(run):
    assert published_weights().keys() >= UNUSED
    (path,) = run.glob("checkpoints/*/unused.safetensors")
    assert load_file(path).keys() == UNUSED
    assert not any("0.mixer.residual" in name for name in timemix.load(run).model.state_dict())


def test_a_file_without_unused_tensors(tmp_path):
    torch.save({n: x for n, x in published_weights().items() if n not in UNUSED}, tmp_path / "a.pth")
    run = imported(tmp_path, tmp_path / "a.pth")
    check_logits(run)
    assert not list(run.rglob("unused.safetensors"))


def test_a_tensor_with_two_prefixes(tmp_path):
    weights = published_weights()
    torch.save(weights | {"module.emb.weight": weights["emb.weight"] + 1}, tmp_path / "a.pth")
    with pytest.raises(DamagedFile, match=r"a.pth has 'emb.weight' several times, with different prefixes; keep only"):
        imported(tmp_path, tmp_path / "a.pth")


def test_an_embedding_that_is_also_the_head(tmp_path):
    weights = published_weights()
    weights["head.weight"] = weights["emb.weight"]
    torch.save(weights, tmp_path / "a.pth")
    save_file({name: x.clone() for name, x in weights.items()}, tmp_path / "copies.safetensors")
    run = timemix.load(imported(tmp_path, tmp_path / "a.pth"))
    expected = timemix.load(imported(tmp_path, tmp_path / "copies.safetensors", "copies")).model.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in run.model.state_dict().items())
    assert torch.equal(expected["embedding.weight"], expected["head.weight"])


@pytest.mark.parametrize("prefix", ["_forward_module.", "module.", "_orig_mod.", "module._orig_mod."])
def test_names_with_the_prefixes_of_wrapped_models(tmp_path, prefix):
    torch.save({f"{prefix}{n}": x for n, x in published_weights().items()}, tmp_path / "a.pth")
    check_logits(imported(tmp_path, tmp_path / "a.pth"))


def test_original_names_in_a_safetensors_file(tmp_path):
    save_file(published_weights(), tmp_path / "a.safetensors")
    check_logits(imported(tmp_path, tmp_path / "a.safetensors"))


def test_the_folder_equals_the_folder_of_another_converter(folder):
    """The hashes are those of rwkv7-hf's converter for the same file."""
    found = load_file(folder / "model.safetensors")
    assert found.keys() == HUGGING_FACE["tensors"].keys()
    for name, x in found.items():
        known = HUGGING_FACE["tensors"][name]
        assert list(x.shape) == known["shape"]
        assert hashlib.sha256(x.view(torch.uint8).numpy().tobytes()).hexdigest() == known["sha256"], name
    ours, theirs = json.loads((folder / "config.json").read_text()), hugging_face_document()
    both = ours.keys() & theirs.keys() - {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert {name: ours[name] for name in both} == {name: theirs[name] for name in both}
    assert {"vocab_size", "hidden_size", "head_dim", "norm_eps", "num_hidden_layers"} < both


def with_end(folder: Path) -> Path:
    """Write a tokenizer of 50 tokens whose last token is the end of a text."""
    letters = (chr(code) for code in range(0x3B1, 0x3B1 + 49))
    train_tokenizer("character", "".join(letters), end_of_text=True).save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


@pytest.mark.parametrize("path", [PTH, GOLDEN / "rwkv4.pth"])
@pytest.mark.parametrize("has_end", [False, True])
def test_the_end_of_text_is_that_of_the_tokenizer(path, has_end, tmp_path):
    """transformers ends a generated text at eos_token_id. Token 0 of a model of characters may be the newline."""
    tokenizer = with_end(tmp_path) if has_end else tokenizer_file(tmp_path)
    import_run(path, tmp_path / "run", tokenizer, ctx_len=32)
    end = load(tmp_path / "run").tokenizer.end_of_text
    assert (end is not None) == has_end
    export_run(tmp_path / "run", "hf", tmp_path / "hf", form="native")
    document = json.loads((tmp_path / "hf/config.json").read_text())
    names = {"bos_token_id", "eos_token_id", "pad_token_id"} & document.keys()
    assert {document[name] for name in names} == {end}
    assert {"bos_token_id", "eos_token_id"} <= names


def write_folder(folder: Path, weights, **changes) -> Path:
    folder.mkdir()
    document = {name: x for name, x in (hugging_face_document() | changes).items() if x is not None}
    (folder / "config.json").write_text(json.dumps(document))
    if weights is not None:
        save_file(weights, folder / "model.safetensors")
    return folder


def test_a_folder_of_hugging_face(folder, tmp_path):
    theirs = write_folder(tmp_path / "hf", load_file(folder / "model.safetensors"))
    check_logits(imported(tmp_path, theirs))


def test_a_folder_with_several_files(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    theirs = write_folder(tmp_path / "hf", None)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: x for name, x in weights.items() if files[name] == file}, theirs / file)
    (theirs / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    check_logits(imported(tmp_path, theirs))
    (theirs / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingFile, match="model-00002-of-00002.safetensors"):
        read_published(theirs, 32)


def test_stacked_mixtures_of_early_files(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    for layer in range(2):
        stem = f"model.layers.{layer}.attn"
        weights[f"{stem}.x_x"] = torch.cat([weights.pop(f"{stem}.x_{c}").flatten(1) for c in "rwkvag"]).squeeze(1)
    check_logits(imported(tmp_path, write_folder(tmp_path / "hf", weights)))


def test_a_weight_with_two_names_or_in_two_files(folder, tmp_path):
    """Which of two tensors counts would otherwise depend on their order."""
    weights = load_file(folder / "model.safetensors")
    stacked = {"model.layers.0.attn.x_x": torch.zeros(6, 64)}
    with pytest.raises(DamagedFile, match=r"is a second name of a weight; keep only one of them"):
        read_published(write_folder(tmp_path / "names", weights | stacked), 32)
    theirs = write_folder(tmp_path / "files", None)
    first = "model.layers.0.ffn.key.weight"
    save_file(weights, theirs / "model-00001-of-00002.safetensors")
    save_file({first: torch.zeros_like(weights[first])}, theirs / "model-00002-of-00002.safetensors")
    files = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    files["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (theirs / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(DamagedFile, match=f"has '{first}' in two files; restore it from a copy"):
        read_published(theirs, 32)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("attn.x_x", ()), ("attn.x_x", (5, 64)), ("attn.w_lora.lora.0.weight", (64,)), ("attn.w_lora.lora.0.weight", ())],
)
def test_shapes_that_no_folder_has(folder, tmp_path, name, shape):
    weights = load_file(folder / "model.safetensors") | {f"model.layers.1.{name}": torch.zeros(shape)}
    with pytest.raises(DamagedFile, match="is not a parameter|no matrix"):
        read_published(write_folder(tmp_path / "hf", weights), 32)


def test_a_pickled_folder(folder, tmp_path):
    theirs = write_folder(tmp_path / "hf", None)
    torch.save(load_file(folder / "model.safetensors"), theirs / "pytorch_model.bin")
    check_logits(imported(tmp_path, theirs))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm_eps": 1e-6}, "has norm_eps 1e-06; only 1e-05 is supported"),
        ({"hidden_act": "silu"}, "has hidden_act 'silu'"),
        ({"tie_word_embeddings": True}, "has tie_word_embeddings True"),
        (
            {"model_type": "rwkv5"},
            "is a folder of Hugging Face with RWKV-5, which timemix does not support",
        ),
        ({"model_type": "rwkv6"}, "is a folder of Hugging Face with RWKV-6, which timemix does not support"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'; give weights of RWKV-4, RWKV-5, RWKV-6 and RWKV-7"),
        ({"model_type": ["rwkv7"]}, r"model_type \['rwkv7'\]"),
        ({"model_type": None}, "model_type None"),
    ],
)
def test_refused_settings(folder, tmp_path, changes, reason):
    theirs = write_folder(tmp_path / "hf", load_file(folder / "model.safetensors"), **changes)
    with pytest.raises(DamagedFile, match=reason):
        read_published(theirs, 32)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": {"lm_head.weight": "../model.safetensors"}}, "names the file '../model.safetensors'"),
        ({"weight_map": {"lm_head.weight": "/etc/passwd"}}, "names the file '/etc/passwd'"),
        ({"weight_map": {"lm_head.weight": 3}}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ({}, "has no weight_map"),
    ],
)
def test_refused_indexes(tmp_path, index, reason):
    theirs = write_folder(tmp_path / "hf", None)
    (theirs / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedFile, match=reason):
        read_published(theirs, 32)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(MissingFile, match="has no config.json"):
        read_published(tmp_path, 32)
    with pytest.raises(MissingFile, match="has neither model.safetensors nor"):
        read_published(write_folder(tmp_path / "hf", None), 32)


@pytest.mark.parametrize(("name", "arch"), [("rwkv5_2", "rwkv5"), ("rwkv6", "rwkv6")])
def test_the_names_and_shapes_of_published_files(tmp_path, name, arch):
    weights = OrderedDict((n, torch.zeros(shape)) for n, shape in OTHERS[name].items())
    torch.save(weights, tmp_path / "a.pth")
    config = read_published(tmp_path / "a.pth", 32).config
    assert (config.arch, config.without, config.vocab_size) == (arch, (), len(weights["emb.weight"]))
    torch.save(weights | {"blocks.0.att.time_state": torch.zeros(1)}, tmp_path / "b.pth")
    with pytest.raises(DamagedFile, match="has the tuned state 'blocks.0.att.time_state' beside weights; give"):
        read_published(tmp_path / "b.pth", 32)


def test_an_intact_file_of_rwkv4():
    published = read_published(GOLDEN / "intact.pth", 32)
    assert published.config.arch == "rwkv4"
    assert not published.unused


@pytest.mark.parametrize(
    ("added", "version"),
    [
        ("blocks.0.ffn.s_emb.weight", "7a"),
        ("blocks.0.qkv.x_q", "7b"),
        ("blocks.1.qkv.qq", "7b"),
        ("blocks.0.ffn.enn.weight", "8"),
        ("blocks.0.att.rosa.weight", "8"),
        ("blocks.0.att.anything", "7"),
    ],
)
def test_later_versions_are_refused_by_name(tmp_path, added, version):
    weights = published_weights() | {added: torch.zeros(1)}
    assert version_of(set(weights)) == version
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(DamagedFile, match=f"RWKV-{version}, " if version != "7" else "'blocks.0.att.anything' is not"):
        read_published(tmp_path / "a.pth", 32)


@pytest.mark.parametrize(
    "change",
    [
        lambda names: names | {"blocks.0.att.gate_w1"},
        lambda names: {name for name in names if not name.endswith("gate.weight")},
    ],
)
def test_variants_of_version_6(change):
    assert version_of(change(set(OTHERS["rwkv6"]))) == "6 in a variant without releases (x060a, x060b or x060c)"


def test_weights_of_other_models(tmp_path):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(DamagedFile, match="has no weight of a model of RWKV"):
        read_published(tmp_path / "a.pth", 32)


def put(name, x):
    return lambda weights: weights | {name: x}


CHANGES = {
    "a missing matrix": (
        lambda w: {n: x for n, x in w.items() if n != "blocks.1.att.value.weight"},
        "lacks 'blocks.1.att.value.weight'",
    ),
    "a missing size": (lambda w: {n: x for n, x in w.items() if n != "emb.weight"}, "no matrix 'emb.weight'"),
    "a wrong shape": (
        lambda w: w | {"blocks.1.ffn.key.weight": w["blocks.1.ffn.key.weight"][:, 1:]},
        r"'blocks.1.ffn.key.weight' is \[256, 63\], not \[256, 64\]",
    ),
    "a vector of three dimensions": (put("emb.weight", torch.zeros(1, 50, 64)), "no matrix 'emb.weight'"),
    "an empty embedding": (put("emb.weight", torch.zeros(0, 64)), "no matrix 'emb.weight'"),
    "another layer": (put("blocks.2.ln1.weight", torch.zeros(64)), "no matrix 'blocks.2.att.r_k'"),
    "a million layers": (put("blocks.1000000.ln1.weight", torch.zeros(64)), "lacks|unknown"),
    "not a number": (
        lambda w: w | {"blocks.0.att.key.weight": w["blocks.0.att.key.weight"] * float("nan")},
        "'blocks.0.att.key.weight' has a number that is not finite",
    ),
    "infinity": (put("ln_out.bias", torch.full((64,), float("inf"))), "'ln_out.bias' has a number that is not finite"),
    "an unknown name": (put("blocks.1.att.x_q", torch.zeros(64)), "'blocks.1.att.x_q' is not a parameter"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_damaged_models(tmp_path, name):
    change, reason = CHANGES[name]
    torch.save(change(published_weights()), tmp_path / "a.pth")
    with pytest.raises(DamagedFile, match=reason) as error:
        import_run(tmp_path / "a.pth", tmp_path / "run", tokenizer_file(tmp_path))
    assert str(tmp_path / "a.pth") in str(error.value)
    assert not (tmp_path / "run").exists()


def test_refusals_of_an_import(tmp_path, run):
    with pytest.raises(AlreadyExists, match="exists already"):
        import_run(PTH, run, None)
    with pytest.raises(InvalidValue, match=r"tokenizer is missing: .*rwkv7.pth has 50 tokens, not the 65,536 "):
        import_run(PTH, tmp_path / "run", None)
    with pytest.raises(InvalidValue, match="ctx_len is 0"):
        import_run(PTH, tmp_path / "run", None, ctx_len=0)
    other = tmp_path / "other.json"
    train_tokenizer("character", "abc").save(other)
    with pytest.raises(InvalidValue, match=r"other.json' has 3 tokens, but the model in .* has 50"):
        import_run(PTH, tmp_path / "run", other)
    with pytest.raises(FileError, match="no-file"):
        import_run(tmp_path / "no-file.pth", tmp_path / "run", None)
    assert [p.name for p in tmp_path.iterdir()] == ["other.json"]


def test_an_exported_folder_brings_its_tokenizer(folder, tmp_path):
    import_run(folder, tmp_path / "again")
    check_logits(tmp_path / "again")


def test_the_world_tokenizer(tmp_path, folder, monkeypatch):
    """A vocabulary file is given, lies in the folder or beside the file, or belongs to an installed package."""
    vocabulary = tmp_path / "rwkv_vocab_v20230424.txt"
    vocabulary.write_bytes(vocabulary_lines([*BYTES, b"the "]))
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embeddings.weight", "lm_head.weight"):
        weights[name] = torch.zeros(300, 64, dtype=torch.bfloat16)
    theirs = write_folder(tmp_path / "hf", weights)
    import_run(theirs, tmp_path / "given", vocabulary)
    assert load(tmp_path / "given").tokenizer.encode("the cat").tolist() == [257, 100, 98, 117]
    with pytest.raises(InvalidValue, match="tokenizer is missing: the model in .* has 300 tokens"):
        import_run(theirs, tmp_path / "none")
    (theirs / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    with pytest.raises(InvalidValue, match="tokenizer is missing: .*hf/tokenizer.json is no tokenizer file of timemix"):
        import_run(theirs, tmp_path / "none")
    with pytest.raises(DamagedFile, match="tokenizer.json is no tokenizer file of timemix; give the tokenizer.json of"):
        import_run(theirs, tmp_path / "none", theirs / "tokenizer.json")
    vocabulary.rename(theirs / vocabulary.name)
    import_run(theirs, tmp_path / "beside")
    assert load(tmp_path / "beside").tokenizer.hash == load(tmp_path / "given").tokenizer.hash
    with pytest.raises(DamagedFile, match="exceeds the 49 ids"):
        import_run(PTH, tmp_path / "run", theirs / vocabulary.name)
    export_run(tmp_path / "beside", "pth", tmp_path / "exported")
    import_run(tmp_path / "exported/model.pth", tmp_path / "own")
    (theirs / vocabulary.name).rename(tmp_path / "exported" / vocabulary.name)
    (tmp_path / "exported/tokenizer.json").write_text("{}")
    import_run(tmp_path / "exported/model.pth", tmp_path / "file")
    hashes = {load(tmp_path / name).tokenizer.hash for name in ("given", "own", "file")}
    assert len(hashes) == 1


@pytest.mark.parametrize("limit", [2**13, 2**17])
@pytest.mark.parametrize(("to", "form"), [("pth", "timemix"), ("hf", "timemix"), ("hf", "native")])
def test_an_export_to_a_full_disk(run, tmp_path, to, form, limit):
    """The weights take 262 KB."""
    with bytes_per_file(limit), pytest.raises(CannotWrite, match="cannot write .*out: File too large"):
        export_run(run, to, tmp_path / "out", form=form)
    assert not list(tmp_path.iterdir())


def test_an_import_to_a_full_disk(tmp_path):
    tokenizer = tokenizer_file(tmp_path)
    with bytes_per_file(2**17), pytest.raises(CannotWrite, match="cannot write .*out.*: File too large"):
        import_run(PTH, tmp_path / "out", tokenizer)
    assert list(tmp_path.iterdir()) == [tokenizer]


def test_refusals_of_an_export(tmp_path, run):
    with pytest.raises(AlreadyExists, match="exists already"):
        export_run(run, "pth", tmp_path)
    with pytest.raises(MissingFile, match="no run folder"):
        export_run(tmp_path / "none", "pth", tmp_path / "out")


def test_a_norm_that_a_form_does_not_have(tmp_path, run, folder):
    """The original code has one constant, and the form of Hugging Face computes it from the size of a head."""
    config = run / "checkpoints/step-00000000/config.toml"
    raw = config.read_text()
    config.write_text(raw.replace("group_norm_eps = 0.00064", "group_norm_eps = 0.001"))
    try:
        for to, other in (("pth", r"\(hf\)"), ("hf", r"\(pth\)")):
            with pytest.raises(InvalidValue, match=f"group_norm_eps is 0.001, but the .*{other}"):
                export_run(run, to, tmp_path / "out", form="native")
    finally:
        config.write_text(raw)
    assert not list(tmp_path.iterdir())


def test_an_architecture_without_published_form(tmp_path):
    from tests.helpers.runs import small_trainer

    small_trainer(tmp_path, steps=1).run()
    with pytest.raises(
        InvalidValue, match="a model of rwkv1 has no published form; export it with --to hf and without"
    ):
        export_run(tmp_path / "run", "pth", tmp_path / "out")


def test_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer_file(tmp_path)
    status, out, err = run_command(capsys, "import", PTH, "--out", "run", "--tokenizer", "tokenizer.json", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["parameters"] == 130_880
    assert json.loads(out)["weights"] == "bfloat16"
    status, out, err = run_command(capsys, "export", "run", "--to", "pth", "--out", "exported", "--json")
    assert (status, json.loads(out)["files"]) == (0, ["exported/model.pth", "exported/tokenizer.json"])
    status, out, _ = run_command(capsys, "sample", "run", "--prompt", "the ", "--tokens", 5)
    assert status == 0
    assert out.startswith("the ")
    (tmp_path / "my.txt").write_text(TEXT)
    assert run_command(capsys, "eval", "run", "--data", "my.txt")[0] == 0
    status, _, err = run_command(capsys, "eval", "run")
    sentence = "timemix: --data is missing: run has no text, because its weights were imported; give a text\n"
    assert (status, err) == (2, sentence)
    assert run_command(capsys, "inspect", "run")[::2] == (2, sentence)
    status, _, err = run_command(capsys, "train", "--resume", "run")
    assert status == 2
    assert err.startswith("timemix: run cannot be resumed, because its weights were imported without a text; fine-tune")
    assert "complete" in run_command(capsys, "runs", "run")[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("import", PTH, "--out", "new"), "--tokenizer is missing"),
        (("import", "none.pth", "--out", "new", "--tokenizer", "a"), "cannot read none.pth"),
        (("import", PTH, "--out", "new", "--ctx-len", 0), "--ctx-len is 0; it must be at least 1"),
        (("import", PTH, "--out", "new", "--lora-alpha", 8), "--lora-alpha has no effect without --for; leave"),
        (("import", PTH, "--out", "new", "--for", "a", "--ctx-len", 8), "--ctx-len excludes --for: the model has"),
        (("export", "none", "--to", "hf", "--out", "new"), "there is no run folder none"),
        (("export", "none", "--to", "ggml", "--out", "new"), "pth, hf"),
    ],
)
def test_errors_of_the_commands(tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    status, _, err = run_command(capsys, *arguments)
    assert status == 2
    assert sentence in err
