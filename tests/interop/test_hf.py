"""Exported folders in transformers: loading, generation, states, padding, special tokens and remote code."""

import json
import os
import subprocess
import sys

import pytest
import torch

import timemix
from tests.helpers.exported import opened, trained
from tests.helpers.pages import ROOT, RUN, blocks, train_tiny_run, write_texts
from tests.helpers.published import expected, imported
from tests.helpers.vocabularies import BYTES, vocabulary_lines
from timemix.errors import InvalidValue
from timemix.interop.chat_template import write_template
from timemix.interop.export import export_run
from timemix.models.language_model import LanguageModel
from timemix.models.registry import ARCHITECTURES

pytestmark = pytest.mark.slow
pytest.importorskip("transformers", reason="needs the extra hf")

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    pipeline,
)

from timemix.hf import TimemixConfig, TimemixForCausalLM  # noqa: E402

PROMPTS = ["the cat sat", "on", "the dog"]
TOKENS = 8


@pytest.fixture(scope="module", params=ARCHITECTURES)
def any_model(request, tmp_path_factory):
    loaded, folder = trained(tmp_path_factory.mktemp(request.param), request.param)
    return loaded, *opened(folder)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("recurrent"))


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("bounded"), "rwkv1")


@torch.no_grad()
def test_logits_are_bit_identical(any_model):
    loaded, model, tokenizer = any_model
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert ids[0].tolist() == loaded.tokenizer.encode(prompt).tolist()
        assert torch.equal(model(ids).logits, loaded.model(ids)[0])
        own, state = loaded.model(ids, loaded.model.init_state(1))
        found = model(ids, use_cache=True)
        assert torch.equal(found.logits, own)
        assert torch.equal(found.state.position, state.position)


def test_greedy_generation_equals_that_of_timemix(any_model):
    loaded, model, tokenizer = any_model
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        (own,) = timemix.generate(loaded, prompt, tokens=TOKENS, sampler=timemix.Sampler(top_k=1))
        for use_cache in (True, False):
            found = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, use_cache=use_cache)
            assert tokenizer.decode(found[0]) == prompt + own


@torch.no_grad()
def test_rows_with_padding_equal_single_rows(any_model):
    _, model, tokenizer = any_model
    assert tokenizer.padding_side == "left"
    for side in ("left", "right"):
        batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=side)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        outputs = [model(**batch, use_cache=use_cache) for use_cache in (False, True)]
        for i, prompt in enumerate(PROMPTS):
            alone = tokenizer(prompt, return_tensors="pt")
            n = alone.input_ids.shape[1]
            single = model(**alone, labels=alone.input_ids, use_cache=True)
            for output in outputs:
                row = output.logits[i, -n:] if side == "left" else output.logits[i, :n]
                torch.testing.assert_close(row, single.logits[0], atol=1e-5, rtol=0)
            for layer, own in zip(outputs[1].state.select(torch.tensor([i])).layers, single.state.layers, strict=True):
                for name, x in own.items():
                    # A cache of past positions holds anything after the last token.
                    if x.ndim < 3 or x.shape[2] != 32:
                        torch.testing.assert_close(layer[name], x, atol=1e-5, rtol=0)
            padded = {name: x[i : i + 1] for name, x in batch.items()}
            loss = model(**padded, labels=labels[i : i + 1]).loss
            torch.testing.assert_close(loss, single.loss, atol=1e-5, rtol=0)


def test_generation_of_a_padded_batch_equals_that_of_single_rows(any_model):
    _, model, tokenizer = any_model
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    found = model.generate(**batch, do_sample=False, max_new_tokens=TOKENS)
    for row, prompt in zip(found, PROMPTS, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=TOKENS)
        assert row[-TOKENS:].tolist() == alone[0, -TOKENS:].tolist()
    # Without a mask, transformers finds the padding by the id of the padding token.
    without = model.generate(batch.input_ids, do_sample=False, max_new_tokens=TOKENS)
    assert without.tolist() == found.tolist()


def test_sampling_and_beam_search(any_model):
    _, model, tokenizer = any_model
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    texts = [model.generate(**inputs, do_sample=True, max_new_tokens=TOKENS, num_return_sequences=3) for _ in "ab"]
    assert all(found.shape == (3, len(PROMPTS[0]) + TOKENS) and (found < 24).all() for found in texts)
    assert texts[0].tolist() != texts[1].tolist()
    beams = [
        model.generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=TOKENS, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert beams[0].tolist() == beams[1].tolist()


def test_the_weights_are_bit_identical(recurrent):
    from safetensors.torch import load_file

    loaded, folder = recurrent
    weights = load_file(folder / "model.safetensors")
    own = loaded.model.state_dict()
    assert weights.keys() == {f"model.{name}" for name in own}
    assert all(torch.equal(weights[f"model.{name}"], x) for name, x in own.items())


@torch.no_grad()
def test_imported_weights_are_loaded_in_float32(tmp_path):
    run = imported(tmp_path)
    export_run(run, "hf", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.float32
    assert torch.equal(model(expected()["input"]).logits, timemix.load(run).model(expected()["input"])[0])


@torch.no_grad()
def test_a_state_continues_several_texts(recurrent):
    model, tokenizer = opened(recurrent[1])
    first = model(**tokenizer("the cat ", return_tensors="pt"), use_cache=True)
    for end in ("sat", "ran"):
        ids = tokenizer(end, return_tensors="pt").input_ids
        whole = model(tokenizer("the cat " + end, return_tensors="pt").input_ids).logits[:, -len(end) :]
        torch.testing.assert_close(model(ids, state=first.state).logits, whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_logits_of_some_positions(recurrent):
    model, tokenizer = opened(recurrent[1])
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    whole = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, whole[:, -2:])
    kept = torch.tensor([9, 10])
    torch.testing.assert_close(model(**batch, logits_to_keep=kept).logits, whole[:, kept])
    as_tuple = model(**batch, return_dict=False)
    assert torch.equal(as_tuple[0], whole)


def test_arguments_that_are_not_supported(recurrent):
    model, tokenizer = opened(recurrent[1])
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    with pytest.raises(InvalidValue, match="inputs_embeds is given, .*; pass input_ids"):
        model(inputs_embeds=torch.zeros(1, 7, 16))
    with pytest.raises(InvalidValue, match="input_ids is missing; pass the ids of the tokens"):
        model()
    gap = torch.tensor([[1, 1, 0, 1, 1, 1, 1]])
    with pytest.raises(InvalidValue, match="attention_mask has padding between tokens; move"):
        model(ids, attention_mask=gap)
    with pytest.raises(InvalidValue, match=r"shape \(1, 3\); it must be \(rows, at least 7\)"):
        model(ids, attention_mask=gap[:, :3])
    with pytest.raises(InvalidValue, match="a row without tokens"):
        model(ids, attention_mask=0 * gap, use_cache=True)
    assert model(ids, attention_mask=0 * gap).logits.shape == (1, 7, 24)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids, assistant_model=model, max_new_tokens=4)


def test_the_length_of_the_context(recurrent, bounded):
    assert AutoConfig.from_pretrained(recurrent[1]).max_position_embeddings is None
    assert AutoTokenizer.from_pretrained(recurrent[1]).model_max_length > 2**40
    model, tokenizer = opened(bounded[1])
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 32
    inputs = tokenizer("the cat sat on mat", return_tensors="pt")
    with pytest.raises(ValueError, match="33 tokens are more than this model's context of 32; pass fewer"):
        model.generate(**inputs, max_new_tokens=20)


# Kind of the tokenizer, settings, text, and whether the vocabulary has a token for the end of a text
TOKENIZERS = {
    "character": ({}, False),
    "character, unk": ({"unknown": "unk"}, False),
    "character, byte": ({"unknown": "byte"}, False),
    "byte": ({}, False),
    "word": ({"unknown": "unk"}, False),
    "subword": ({"vocab_size": 300}, False),
    "world": ({}, True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens(name, tmp_path):
    data, has_end = TOKENIZERS[name]
    if name == "world":
        (tmp_path / "vocabulary.txt").write_bytes(vocabulary_lines([*BYTES, b"the", b" the", b"\n\n"]))
        data = {"vocabulary": str(tmp_path / "vocabulary.txt")}
    loaded, folder = trained(tmp_path, tokenizer=name.split(",")[0], **data)
    model, tokenizer = opened(folder)
    V = loaded.tokenizer.vocab_size
    for text in ("the cat sat on mat 3. the dog\nran!\n\n", " the", "the "):
        ids = tokenizer(text).input_ids
        assert ids == loaded.tokenizer.encode(text).tolist()
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == loaded.tokenizer.decode(ids)
    assert tokenizer.pad_token_id >= V
    assert (tokenizer.eos_token_id < V) == has_end
    assert tokenizer.eos_token_id == (loaded.tokenizer.end_of_text if has_end else V)
    assert model.generation_config.eos_token_id == (tokenizer.eos_token_id if has_end else None)
    # Tokens that the model lacks count as the token before a text, and have no logits.
    before = loaded.tokenizer.end_of_text if has_end else int(loaded.tokenizer.encode("\n")[0])
    found = model(torch.tensor([[tokenizer.eos_token_id, 1]])).logits
    assert torch.equal(found, model(torch.tensor([[before, 1]])).logits)
    assert found.shape[-1] == V
    labels = torch.tensor([[1, 2, tokenizer.pad_token_id]])
    assert torch.equal(
        model(labels.clamp(max=V - 1), labels=labels).loss, model(labels[:, :2], labels=labels[:, :2]).loss
    )
    assert ("lossy" in (folder / "README.md").read_text()) == (name == "word")


def test_a_vocabulary_without_a_newline(tmp_path):
    loaded, folder = trained(tmp_path, text="the cat sat on the mat. " * 100)
    model, tokenizer = opened(folder)
    assert model.config.outside_token_id == 0
    ids = torch.tensor([[tokenizer.eos_token_id, 3]])
    assert torch.equal(model(ids).logits, loaded.model(torch.tensor([[0, 3]]))[0])


def test_the_pipeline(recurrent):
    loaded, folder = recurrent
    generator = pipeline("text-generation", model=str(folder))
    (own,) = timemix.generate(loaded, "the ", tokens=TOKENS, sampler=timemix.Sampler(top_k=1))
    found = generator("the ", max_new_tokens=TOKENS, do_sample=False)[0]["generated_text"]
    assert found == "the " + own
    batch = generator(PROMPTS, max_new_tokens=TOKENS, do_sample=False, batch_size=3)
    assert [each[0]["generated_text"][: len(p)] for each, p in zip(batch, PROMPTS, strict=True)] == PROMPTS


def test_a_larger_vocabulary(recurrent, tmp_path):
    model, tokenizer = opened(recurrent[1])
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    before = model(ids).logits
    model.resize_token_embeddings(len(tokenizer))
    torch.testing.assert_close(model(ids).logits[..., :24], before)
    assert model(ids).logits.shape[-1] == 26
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_new_model_has_the_initial_values_of_timemix():
    config = TimemixConfig(timemix={"arch": "rwkv7", "layers": 2, "channels": 64, "heads": 1}, vocab_size=11)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, TimemixForCausalLM)
    torch.manual_seed(3)
    own = LanguageModel(config.settings())
    assert all(torch.equal(x, model.model.state_dict()[name]) for name, x in own.state_dict().items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_python_of_the_page(tmp_path, monkeypatch):
    write_texts(tmp_path)
    # The page also chats with the model, so its vocabulary needs the stop string, and its folder a template.
    with (tmp_path / "my.txt").open("a") as file:
        file.write("\n\nUser: Hello!\n\nAssistant:")
    train_tiny_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    export_run(tmp_path / RUN, "hf", tmp_path / "exported-mine")
    write_template(tmp_path / "exported-mine", timemix.load(tmp_path / RUN).tokenizer, "world")
    names = {}
    for text in blocks(ROOT / "docs/howto/hugging-face.md", "py"):
        exec(text, names)
    assert names["adapted"].get_nb_trainable_parameters()[0] > 0


def test_wrong_settings_are_refused(recurrent, tmp_path):
    document = json.loads((recurrent[1] / "config.json").read_text())
    document["timemix"]["arch"] = "rwkv9"
    (tmp_path / "config.json").write_text(json.dumps(document))
    config = AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(InvalidValue, match="unknown architecture 'rwkv9'; did you mean"):
        AutoModelForCausalLM.from_config(config)


REMOTE = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
assert "timemix" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__ == "timemix.hf"
ids = tokenizer("the cat", return_tensors="pt").input_ids
torch.save(model(ids).logits, sys.argv[2])
model.save_pretrained(sys.argv[2] + "-saved")
"""
WITHOUT = """
import sys
sys.modules["timemix"] = None
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


def remote(code, *arguments, home):
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=home)


def test_remote_code_imports_the_installed_package(recurrent, tmp_path):
    loaded, folder = recurrent
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "logits-saved")
    for name in (folder, tmp_path / "logits-saved"):
        done = remote(REMOTE, name, tmp_path / "logits", home=tmp_path)
        assert done.returncode == 0, done.stderr
        ids = torch.tensor(loaded.tokenizer.encode("the cat").astype("int64"))[None]
        assert torch.equal(torch.load(tmp_path / "logits"), loaded.model(ids)[0])


def test_remote_code_without_timemix(recurrent, tmp_path):
    done = remote(WITHOUT, recurrent[1], home=tmp_path)
    assert done.returncode != 0
    assert (
        "ImportError: this model needs the package timemix; clone its repository, and run:"
        " pip install '/path/to/timemix[hf]'"
    ) in done.stderr


def test_the_message_without_transformers(tmp_path):
    code = "import sys; sys.modules['transformers'] = None; import timemix.hf"
    done = remote(code, home=tmp_path)
    assert done.stderr.strip().endswith(
        "timemix.errors.Unavailable: the package transformers is not installed; run: pip install 'timemix[hf]'"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_number_formats(any_model, dtype):
    """bfloat16 rounds each sublayer."""
    loaded, model, tokenizer = any_model
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    other = AutoModelForCausalLM.from_pretrained(loaded.folder.parents[2] / "hf", dtype=dtype)
    error = (other(ids).logits.double() - model(ids).logits.double()).abs().max()
    assert error < (0.1 if dtype == torch.bfloat16 else 1e-4)
    found = other.generate(ids, max_new_tokens=4, do_sample=False)
    assert found.shape == (1, 11)
