"""Files of llama.cpp: logits from the file, every tensor and key, vocabularies, and refusals."""

import ast
import json
import sys

import numpy as np
import pytest
import tokenizers
import torch
from gguf import MODEL_ARCH, MODEL_TENSORS, TENSOR_NAMES, LlamaFileType
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.commands import run_command
from tests.helpers.gguf_files import computed_logits, read_settings, read_tensors, write_run
from tests.helpers.limits import bytes_per_file
from tests.helpers.runs import small_trainer
from tests.helpers.tiers import examples
from tests.helpers.vocabularies import BYTES
from timemix.data.templates import TEMPLATES
from timemix.errors import AlreadyExists, CannotWrite, InvalidValue, Unavailable
from timemix.interop.chat_template import to_jinja
from timemix.interop.gguf import export_gguf
from timemix.interop.gguf_vocabulary import vocabulary
from timemix.models.language_model import build_model
from timemix.tokenizers.hugging_face import HuggingFaceTokenizer
from timemix.tokenizers.make import train_tokenizer
from timemix.tokenizers.world import WorldTokenizer

TEXT = "The cat doesn't sit on 12 mats:\n\n  a na\u00efve caf\u00e9, \u65e5\u672c\u8a9e \\x41 \"'\u0301"
ARCHS = ("rwkv6", "rwkv7")
ROUNDING = {"F32": 0, "BF16": 2**-8, "F16": 2**-11}
"""Largest error of a number, as a share of the number."""


def random_model(arch, vocab_size, **fields):
    """Return a model in which no weight is zero."""
    torch.manual_seed(0)
    sizes = {"layers": 2, "channels": 128, "heads": 2, "ffn_ratio": 1.5, "ctx_len": 16}
    model = build_model(arch, vocab_size=vocab_size, **(sizes | fields))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


@pytest.fixture(scope="module", params=ARCHS)
def source(request, tmp_path_factory):
    """A model and its run, with a vocabulary of bytes."""
    model = random_model(request.param, 256)
    return model, write_run(tmp_path_factory.mktemp("gguf") / "mine", model, train_tokenizer("byte", "a"))


@pytest.fixture(scope="module")
def file(source):
    """The file of the run in float32."""
    export_gguf(source[1], source[1].parent / "f32.gguf")
    return source[1].parent / "f32.gguf"


def test_logits_from_the_file_by_the_formulas_of_llama_cpp(source, file):
    tokens = [5, 200, 5, 17, 0, 255, 99]
    expected, _ = source[0].double()(torch.tensor([tokens]))
    source[0].float()
    np.testing.assert_allclose(computed_logits(file, tokens), expected[0].detach(), atol=1e-9, rtol=0)


def test_names_are_those_of_llama_cpp(source, file):
    arch = MODEL_ARCH[source[0].config.arch.upper()]
    optional = {f"time_mix_lerp_{each}" for each in "wkvrg"}
    kinds = {TENSOR_NAMES[kind].replace("blk.{bid}.", "blk.1.") for kind in MODEL_TENSORS[arch]}
    found = {name.rpartition(".")[0] for name in read_tensors(file)[0] if not name.startswith("blk.0.")}
    assert found == {name for name in kinds if name.rpartition(".")[2] not in optional}


def test_settings(source, file):
    config, found = source[0].config, read_settings(file)
    own = {name.removeprefix(f"{config.arch}."): x for name, x in found.items() if name.startswith(config.arch)}
    assert own.pop("attention.layer_norm_epsilon") == pytest.approx(1e-5)
    ranks = {
        "rwkv6": {"rescale_every_n_layers": 0, "time_mix_extra_dim": 32, "time_decay_extra_dim": 64},
        "rwkv7": {
            f"attention.{name}_lora_rank": 32 if name != "gate" else 64
            for name in ("decay", "iclr", "value_residual_mix", "gate")
        },
    }
    assert own == {
        "context_length": 2**20,
        "embedding_length": 128,
        "block_count": 2,
        "feed_forward_length": 192,
        "attention.head_count": 0,
        "wkv.head_size": 64,
        **ranks[config.arch],
    }
    assert (found["general.name"], found["general.file_type"]) == ("mine", LlamaFileType.ALL_F32)
    assert found["tokenizer.ggml.model"] == "rwkv"
    assert "tokenizer.ggml.eos_token_id" not in found
    assert not found["tokenizer.ggml.add_bos_token"]
    assert "tokenizer.chat_template" not in found


def test_a_chat_model_has_its_template(tmp_path):
    tokenizer = WorldTokenizer([*BYTES, b"\n\n"])
    run = write_run(tmp_path / "world", random_model("rwkv7", tokenizer.vocab_size), tokenizer)
    export_gguf(run, tmp_path / "a.gguf")
    assert read_settings(tmp_path / "a.gguf")["tokenizer.chat_template"] == to_jinja(TEMPLATES["world"])


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_tensors_in_other_formats(source, file, tmp_path, dtype):
    export_gguf(source[1], tmp_path / "a.gguf", dtype=dtype)
    (exact, _), (found, types) = read_tensors(file), read_tensors(tmp_path / "a.gguf")
    assert found.keys() == exact.keys()
    assert types["output.weight"] == types["blk.0.channel_mix_value.weight"] == dtype.upper()
    for name, x in exact.items():
        if types[name] == "Q8_0":
            largest = abs(x).reshape(-1, 32).max(1).repeat(32).reshape(x.shape)
            # The scale of 32 numbers is in float16.
            assert (abs(found[name] - x) <= (0.5 / 127 + ROUNDING["F16"]) * largest).all()
        else:
            assert (abs(found[name] - x) <= ROUNDING[types[name]] * abs(x) + 1e-7).all()
    in_float32 = {name for name, kind in types.items() if kind == "F32"}
    assert {name for name, x in exact.items() if x.ndim == 1} <= in_float32
    kind = {"f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert read_settings(tmp_path / "a.gguf")["general.file_type"] == LlamaFileType[f"MOSTLY_{kind}"]


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")])
def test_the_default_is_the_format_of_the_checkpoint(tmp_path, dtype, kind):
    model = random_model("rwkv7", 256, layers=1, channels=64, heads=1)
    run = write_run(tmp_path / "run", model, train_tokenizer("byte", "a"), dtype)
    export_gguf(run, tmp_path / "a.gguf")
    found, types = read_tensors(tmp_path / "a.gguf")
    assert types["output.weight"] == kind
    assert np.array_equal(found["output.weight"], model.head.weight.detach().to(dtype).float())


def test_rows_that_groups_of_32_do_not_divide(tmp_path):
    model = random_model("rwkv6", 256, channels=40, heads=4, ffn_ratio=1.6)
    run = write_run(tmp_path / "run", model, train_tokenizer("byte", "a"))
    export_gguf(run, tmp_path / "a.gguf", dtype="q8_0")
    types = read_tensors(tmp_path / "a.gguf")[1]
    assert (types["output.weight"], types["blk.0.channel_mix_value.weight"]) == ("F16", "Q8_0")


def test_blocks_above_9_keep_their_numbers(tmp_path):
    model = random_model("rwkv7", 256, layers=12, channels=64, heads=1)
    export_gguf(write_run(tmp_path / "run", model, train_tokenizer("byte", "a")), tmp_path / "a.gguf")
    expected, _ = model.double()(torch.tensor([[5, 9]]))
    np.testing.assert_allclose(computed_logits(tmp_path / "a.gguf", [5, 9]), expected[0].detach(), atol=1e-9, rtol=0)


def spelled(entry: str) -> bytes:
    """Return the bytes of an entry of a vocabulary of the kind rwkv."""
    return ast.literal_eval("b'" + entry.replace("'", "\\'") + "'")


def longest_match(text: str, pieces: list[bytes]) -> list[int]:
    data, found = text.encode(), []
    while data:
        token = max((i for i, piece in enumerate(pieces) if data.startswith(piece)), key=lambda i: len(pieces[i]))
        found.append(token)
        data = data[len(pieces[token]) :]
    return found


WORLD = [*BYTES, b"the", b" the", b"\n\n", "\u65e5".encode(), b"\xe6\x97", b"\\x", b"<unused", b"'\""]
MATCHED = {
    "byte": train_tokenizer("byte", "a"),
    "subword of bytes": train_tokenizer("subword", "a", vocab_size=256),
    "character with bytes": train_tokenizer("character", TEXT, unknown="byte"),
    "World": WorldTokenizer(WORLD, 300),
}


@pytest.mark.parametrize("name", MATCHED)
@given(
    st.text() | st.lists(st.sampled_from(["the", " the", "\n", "\u65e5", "\\x", "<unused 0>", "'", '"'])).map("".join)
)
@examples(30)
def test_the_longest_match_gives_the_ids_of_timemix(name, text):
    tokenizer, made = MATCHED[name], VOCABULARIES[name]
    pieces = [spelled(entry) for entry in made.tokens]
    assert longest_match(text, pieces) == tokenizer.encode(text).tolist()


VOCABULARIES = {name: vocabulary(tokenizer) for name, tokenizer in MATCHED.items()}


@pytest.mark.parametrize("name", MATCHED)
def test_entries_are_distinct_and_decode_as_in_timemix(name):
    tokenizer, made = MATCHED[name], VOCABULARIES[name]
    assert made.model == "rwkv"
    assert len(set(made.tokens)) == len(made.tokens) == tokenizer.vocab_size
    seen = set()
    for i, (entry, kind) in enumerate(zip(made.tokens, made.kinds, strict=True)):
        piece = tokenizer.piece(i)
        assert (kind == "NORMAL") == (piece != b"" and piece not in seen)
        assert kind == "CONTROL" or spelled(entry) == piece
        seen.add(piece)
    assert made.end == tokenizer.end_of_text


def gpt2_library(made):
    """Return the tokenizer of GPT-2 with the vocabulary of a file."""
    pairs = [tuple(pair.split(" ")) for pair in made.merges]
    model = tokenizers.models.BPE({entry: i for i, entry in enumerate(made.tokens)}, pairs)
    found = tokenizers.Tokenizer(model)
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return found


SUBWORD = train_tokenizer("subword", TEXT * 3, vocab_size=330)


def test_a_subword_vocabulary_is_one_of_gpt2():
    made = vocabulary(SUBWORD)
    assert (made.model, set(made.kinds)) == ("gpt2", {"NORMAL"})
    assert gpt2_library(made).encode(TEXT).ids == SUBWORD.encode(TEXT).tolist()
    assert SUBWORD.piece(made.end) == b"\xff"


def adopted(**changes):
    """Return an adopted tokenizer of GPT-2's kind, with changes of its document."""
    document = json.loads(SUBWORD.to_json())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": SUBWORD.vocab_size, "content": "<|endoftext|>", "special": True, **flags}]
    added += [{"id": SUBWORD.vocab_size + 1, "content": "<x>", "special": False, **flags, **changes.pop("flags", {})}]
    return HuggingFaceTokenizer(document | {"added_tokens": added} | changes)


def test_an_adopted_tokenizer_of_gpt2():
    made = vocabulary(adopted())
    assert (made.model, made.end, made.tokens[-2:]) == ("gpt2", SUBWORD.vocab_size, ["<|endoftext|>", "<x>"])
    assert made.kinds[-3:] == ["NORMAL", "CONTROL", "USER_DEFINED"]


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# Parts between spaces
WORDS = [
    {"type": "Split", "pattern": {"Regex": r" ?\S+|\s+"}, "behavior": "Isolated", "invert": False},
    LEVEL | {"use_regex": False},
]


@pytest.mark.parametrize("kind", ["byte", "subword", "character"])
def test_the_end_of_text_is_a_control_token(kind):
    tokenizer = train_tokenizer(kind, "plain words", vocab_size=300, end_of_text=True)
    made = vocabulary(tokenizer)
    assert made.end == tokenizer.end_of_text == len(made.tokens) - 1
    assert made.kinds == ["NORMAL"] * made.end + ["CONTROL"]


@pytest.mark.parametrize(
    ("tokenizer", "sentence"),
    [
        (train_tokenizer("word", "a b"), "has no tokenizer of the kind word; export the model with --to pth, or train"),
        (train_tokenizer("character", "ab", unknown="unk"), "has no tokenizer with data.unknown unk; export"),
        (train_tokenizer("character", "ab\u00e9"), "needs the 256 bytes in a vocabulary with characters outside ASCII"),
        (adopted(normalizer={"type": "NFC"}), "splits and merges text as the tokenizer of GPT-2, unlike"),
        (adopted(pre_tokenizer=LEVEL | {"add_prefix_space": True}), "as the tokenizer of GPT-2, unlike"),
        (adopted(pre_tokenizer={"type": "Sequence", "pretokenizers": WORDS}), "as the tokenizer of GPT-2, unlike"),
        (adopted(flags={"lstrip": True}), "as the tokenizer of GPT-2, unlike"),
    ],
)
def test_vocabularies_that_llama_cpp_does_not_have(tokenizer, sentence):
    with pytest.raises(InvalidValue, match=sentence):
        vocabulary(tokenizer)


def test_characters_of_ascii():
    made = vocabulary(train_tokenizer("character", "ab\\'\n\""))
    assert sorted(map(spelled, made.tokens)) == sorted([b"a", b"b", b"\\", b"'", b"\n", b'"'])


@pytest.mark.parametrize(
    ("arch", "fields", "sentence"),
    [
        ("rwkv5", {}, "llama.cpp has no architecture rwkv5; export a model of rwkv6 or rwkv7"),
        ("rwkv7", {"heads": 4}, "the model has heads of 32 channels, but llama.cpp computes rwkv7 only with multiples"),
        ("rwkv6", {"group_norm_eps": 1e-3}, "group_norm_eps is 0.001, but llama.cpp has 0.00064; export"),
        ("rwkv7", {"group_norm_eps": 1e-3}, "group_norm_eps is 0.001, but llama.cpp has 0.00064; export"),
        ("rwkv7", {"without": ("gate",)}, "a model without gate has no published form; export a whole model"),
    ],
)
def test_models_that_llama_cpp_does_not_have(tmp_path, arch, fields, sentence):
    run = write_run(tmp_path / "run", random_model(arch, 256, **fields), train_tokenizer("byte", "a"))
    with pytest.raises(InvalidValue, match=sentence):
        export_gguf(run, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == [run]


def test_an_architecture_that_was_never_published(tmp_path):
    small_trainer(tmp_path, steps=1).run()
    with pytest.raises(InvalidValue, match="llama.cpp has no architecture rwkv1; export a model of rwkv6 or rwkv7"):
        export_gguf(tmp_path / "run", tmp_path / "a.gguf")


def test_a_weight_above_the_range_of_float16(tmp_path):
    model = random_model("rwkv7", 256, layers=1, channels=64, heads=1)
    with torch.no_grad():
        model.head.weight[3, 5] = 7e4
    run = write_run(tmp_path / "run", model, train_tokenizer("byte", "a"))
    with pytest.raises(InvalidValue, match="output.weight has the weight 70000, which float16 cannot hold; choose"):
        export_gguf(run, tmp_path / "a.gguf", dtype="f16")
    assert list(tmp_path.iterdir()) == [run]
    export_gguf(run, tmp_path / "a.gguf", dtype="bf16")


@pytest.mark.parametrize("limit", [2**10, 2**17])
def test_a_full_disk(source, tmp_path, limit):
    with bytes_per_file(limit), pytest.raises(CannotWrite, match="cannot write .*a.gguf: "):
        export_gguf(source[1], tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_is_not_replaced(source, tmp_path):
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(AlreadyExists, match="a.gguf exists already; choose another file"):
        export_gguf(source[1], tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_text() == "mine"


def test_without_the_package(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(Unavailable, match=r"the package gguf is not installed; run: pip install 'timemix\[gguf\]'"):
        export_gguf(source[1], tmp_path / "a.gguf")


def test_the_command(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = ("export", source[1], "--out", "a.gguf", "--to")
    status, out, err = run_command(capsys, *call, "gguf", "--dtype", "q8_0", "--json")
    assert (status, json.loads(out)["files"], err) == (0, ["a.gguf"], "")
    assert read_tensors(tmp_path / "a.gguf")[1]["output.weight"] == "Q8_0"
    sentence = "timemix: --dtype has no effect on --to pth; leave it out\n"
    assert run_command(capsys, *call, "pth", "--dtype", "q8_0") == (2, "", sentence)
    with pytest.raises(InvalidValue, match="dtype='q4' is not supported; choose f32, f16, bf16, q8_0"):
        export_gguf(source[1], tmp_path / "b.gguf", dtype="q4")
