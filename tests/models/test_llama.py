"""Llama: the logits of LlamaForCausalLM, its published names and settings, and limits of its settings.

python -m tests.models.test_llama writes tests/golden/llama.safetensors; it needs transformers.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from tests.helpers.models import numbers_kept
from timemix.errors import InvalidValue
from timemix.generation.decode import build_step
from timemix.models.language_model import LanguageModel
from timemix.models.llama.model import RMSNorm
from timemix.models.llama.weights import (
    from_published,
    our_config,
    our_name,
    published_config,
    published_name,
    to_published,
)
from timemix.models.registry import like_size_of, model_config
from timemix.models.size import count_parameters, flops_per_token

GOLDEN = Path(__file__).parents[1] / "golden" / "llama.safetensors"
CTX = 24
KV_HEADS = {"plain": 0, "grouped": 2}


def config(kind, **fields):
    sizes = {
        "kv_heads": KV_HEADS[kind],
        "vocab_size": 17,
        "ctx_len": CTX,
        "layers": 2,
        "channels": 16,
        "heads": 4,
        "ffn_ratio": 1.5,
    }
    return model_config("llama", **(sizes | fields))


def their_model(kind):
    """Return LlamaForCausalLM with random weights, large enough that every part affects the logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**published_config(config(kind))))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.25 + (p.ndim == 1))
    return model


def write_golden():
    tokens = torch.randint(17, (2, CTX), generator=torch.Generator().manual_seed(4))
    tensors = {"tokens": tokens}
    for kind in KV_HEADS:
        model = their_model(kind)
        with torch.no_grad():
            tensors[f"{kind}.logits"] = model(tokens).logits
        tensors |= {f"{kind}.weights.{name}": p.detach() for name, p in model.named_parameters()}
    save_file({name: x.contiguous() for name, x in tensors.items()}, GOLDEN)


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def published_weights(golden, kind):
    start = f"{kind}.weights."
    return {name.removeprefix(start): x for name, x in golden.items() if name.startswith(start)}


def our_model(weights, kind):
    model = LanguageModel(config(kind)).eval()
    model.load_state_dict(from_published(weights))
    return model


@pytest.fixture(params=KV_HEADS)
def kind(request):
    return request.param


def test_logits_of_transformers(golden, kind):
    model = our_model(published_weights(golden, kind), kind)
    logits, state = model(golden["tokens"])
    assert state is None
    torch.testing.assert_close(logits, golden[f"{kind}.logits"], atol=1e-5, rtol=1e-5)


def test_carried_state_and_padding_give_the_same_logits(golden, kind):
    """Prefill of rows with different lengths, then a step, then a longer piece."""
    model, tokens, expected = (
        our_model(published_weights(golden, kind), kind),
        golden["tokens"],
        golden[f"{kind}.logits"],
    )
    lengths = torch.tensor([9, 4])
    with torch.no_grad():
        first, state = model(tokens[:, :10], model.init_state(2), lengths=lengths)
        rest = [torch.stack([row[n : n + 15] for row, n in zip(tokens, lengths.tolist(), strict=True)])]
        step, state = model(rest[0][:, :1], state)
        last, state = model(rest[0][:, 1:], state)
    assert state.position.tolist() == [CTX, CTX - 5]
    for row, n in enumerate(lengths.tolist()):
        found = torch.cat([first[row, :n], step[row], last[row]])
        torch.testing.assert_close(found, expected[row, : n + 15], atol=1e-5, rtol=1e-5)
    assert state.layers[0]["keys"].shape == (2, KV_HEADS[kind] or 4, CTX, 4)


def test_compiled_step_gives_the_same_logits(golden, kind):
    model, tokens = our_model(published_weights(golden, kind), kind), golden["tokens"]
    step = build_step(model, backend="compiled")
    found, _ = step(
        tokens.flatten(), model.init_state(2), torch.arange(2), torch.tensor([CTX, CTX]), torch.arange(2 * CTX)
    )
    torch.testing.assert_close(found.view(2, CTX, -1), golden[f"{kind}.logits"], atol=1e-5, rtol=1e-5)


def test_gradients_and_logits_beside_transformers(kind):
    pytest.importorskip("transformers")
    theirs, tokens = their_model(kind), torch.randint(17, (3, CTX))
    ours = our_model(theirs.state_dict(), kind)
    expected, (found, _) = theirs(tokens).logits, ours(tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for logits in (expected, found):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(our_name(name)).grad, p.grad, atol=1e-5, rtol=1e-4)


def test_names_and_settings_go_both_ways(golden, kind):
    weights = published_weights(golden, kind)
    ours = from_published(weights)
    assert ours.keys() == dict(LanguageModel(config(kind)).named_parameters()).keys()
    assert all(published_name(our_name(name)) == name for name in weights)
    back = to_published(ours)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert our_config(published_config(config(kind))) == config(kind)


def test_a_tied_head_is_the_embedding(golden):
    weights = published_weights(golden, "plain")
    del weights["lm_head.weight"]
    ours = from_published(weights)
    assert torch.equal(ours["head.weight"], ours["embedding.weight"])


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0", "model.layers.0.x.weight", "transformer.wte"]
)
def test_an_unknown_name_is_refused(name):
    with pytest.raises(InvalidValue, match=re.escape(f"{name!r} is not a parameter")):
        our_name(name)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; llama supports 'silu' only"),
        ({"attention_bias": True}, "attention_bias is True; llama supports False only"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type is 'llama3'; llama supports 'default' only"),
        ({"head_dim": 8}, "head_dim is 8; llama supports 4 only"),
        ({"intermediate_size": 37}, "intermediate_size is 37; llama supports 40 only"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; llama supports 'llama' only"),
    ],
)
def test_settings_that_it_lacks_are_refused(setting, sentence):
    with pytest.raises(InvalidValue, match=re.escape(sentence)):
        our_config(published_config(config("plain")) | setting)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"kv_heads": 3}, "model.kv_heads=3 does not divide model.heads=4; divisors: 1, 2, 4"),
        ({"kv_heads": 5}, "model.kv_heads is 5; it must be at most 4"),
        ({"heads": 16}, "model.heads=16 with model.channels=16 gives heads of the odd size 1; rotary positions need"),
        ({"ffn_ratio": 0.0}, "model.ffn_ratio is 0.0; it must be above 0"),
        ({"norm_eps": 0.0}, "model.norm_eps is 0.0; it must be above 0"),
    ],
)
def test_wrong_values_are_one_clear_sentence(fields, sentence):
    with pytest.raises(InvalidValue, match=re.escape(sentence)):
        config("plain", **fields)


def test_norm_accumulates_in_float32():
    """In bfloat16 the result is that of float32, rounded once or twice, as in LlamaRMSNorm."""
    x, norm = torch.randn(3, 5, 512) * 30, RMSNorm(512, 1e-5)
    expected = x.bfloat16().float()
    expected = expected * (expected.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(norm(x), norm.weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt())
    torch.testing.assert_close(norm.bfloat16()(x.bfloat16()).float(), expected, atol=0, rtol=2**-7)


def test_size_at_equal_ffn_ratio_is_that_of_the_rotary_baseline_without_biases():
    rotary = model_config("mha_rotary", vocab_size=65, channels=64, layers=3, ffn_ratio=2.5)
    llama = like_size_of(rotary, "llama")
    with torch.device("meta"):
        model = LanguageModel(rotary)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    counts = count_parameters(llama)
    assert counts["total"] == matrices + (2 * 3 + 1) * 64
    assert counts["mixers"] == 3 * 4 * 64**2
    assert counts["ffns"] == 3 * 3 * 64 * 160
    assert flops_per_token(llama) == flops_per_token(rotary)


def test_what_training_keeps_is_as_estimated():
    settings = config("grouped", channels=64, ctx_len=128, layers=3, ffn_ratio=2.5)
    model = LanguageModel(settings)
    numbers = numbers_kept(model.blocks, torch.randn(4, 128, 64, requires_grad=True))
    estimate = 4 * 128 * settings.layers * model.block.kept(settings, 4).block
    assert numbers == pytest.approx(estimate, rel=0.2)


if __name__ == "__main__":
    write_golden()
