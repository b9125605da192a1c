"""RWKV-4: its names, settings and sizes. test_original_code.py has the values of the original code."""

import re

import pytest
import torch

from tests.helpers.original_code import Golden
from timemix.errors import InvalidValue
from timemix.models.language_model import LanguageModel
from timemix.models.registry import model_config
from timemix.models.rwkv4 import model as module
from timemix.models.rwkv4.weights import our_config, our_name, published_name, to_published
from timemix.models.size import count_parameters, flops_per_token
from timemix.ops.rwkv4 import wkv4

SIZES = {"vocab_size": 19, "layers": 3, "channels": 32, "ctx_len": 16}


def test_names_go_both_ways():
    weights = Golden("rwkv4", torch.float32).published("weights")
    assert all(published_name(our_name(name)) == name for name in weights)


@pytest.mark.parametrize("layers", [1, 3])
def test_settings_are_read_from_shapes(layers):
    config = model_config("rwkv4", **(SIZES | {"layers": layers, "ffn_ratio": 3.5}))
    weights = to_published(dict(LanguageModel(config).named_parameters()))
    assert our_config(weights, ctx_len=16) == config
    del weights[f"blocks.{layers - 1}.ffn.key.weight"]
    with pytest.raises(InvalidValue, match="the weights have no matrix 'blocks"):
        our_config(weights, ctx_len=16)


@pytest.mark.parametrize(
    "name",
    ["blocks.0.att.r_k", "blocks.1.att.x_q", "blocks.x.ln1.weight", "embedding.weight", "blocks.0.att.gate.weight"],
)
def test_an_unknown_name_is_refused(name):
    with pytest.raises(InvalidValue, match=re.escape(f"{name!r} is not a parameter of RWKV-4")):
        our_name(name)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"ffn_ratio": 0.0}, "model.ffn_ratio is 0.0; it must be from 1 / model.channels to 1000"),
        ({"l2wrap": -1.0}, "model.l2wrap is -1.0; it must be at least 0 and finite"),
    ],
)
def test_wrong_values_are_one_clear_sentence(fields, sentence):
    with pytest.raises(InvalidValue, match=re.escape(sentence)):
        model_config("rwkv4", **(SIZES | fields))


def test_size_of_the_published_model_of_169_million_parameters():
    config = model_config("rwkv4", vocab_size=50277, layers=12, channels=768, ctx_len=1024)
    C = 768
    matrices = 12 * (5 * C * C + 8 * C * C)
    assert count_parameters(config)["total"] == 2 * 50277 * C + matrices + 12 * 11 * C + 4 * C == 169_342_464
    assert flops_per_token(config) == 2 * (matrices + 50277 * C) + 20 * 12 * C


def test_the_decay_of_a_model_in_bfloat16_is_computed_in_float32(monkeypatch):
    """A log-decay rounded to bfloat16 would have an error of up to 0.4 %."""
    given = []
    monkeypatch.setattr(module, "wkv4", lambda w, *args, **options: given.append(w) or wkv4(w, *args, **options))
    model = LanguageModel(model_config("rwkv4", **SIZES)).bfloat16()
    model(torch.zeros(1, 5, dtype=torch.long))
    for w, block in zip(given, model.blocks, strict=True):
        assert w.equal(-block.mixer.decay.float().exp())
