"""RWKV-5.2 and RWKV-6: their settings. test_original_code.py has the values of the original code."""

import re

import pytest

from tests.helpers.original_code import weights_module
from timemix.errors import InvalidValue
from timemix.models.language_model import LanguageModel
from timemix.models.registry import model_config

ARCHS = ("rwkv5", "rwkv6")
SIZES = {"vocab_size": 19, "layers": 3, "heads": 2, "channels": 32, "ctx_len": 16}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("layers", [1, 3])
def test_settings_are_read_from_shapes(arch, layers):
    ranks = {"decay_rank": 24, "mixture_rank": 20} if arch == "rwkv6" else {}
    config = model_config(arch, **(SIZES | {"layers": layers, "ffn_ratio": 3.5} | ranks))
    converter = weights_module(arch)
    weights = converter.to_published(dict(LanguageModel(config).named_parameters()))
    assert converter.our_config(weights, ctx_len=16) == config
    names = ("time_faaaa", "time_maa_w2", "time_decay_w1") if arch == "rwkv6" else ("time_faaaa",)
    for name in names:
        with pytest.raises(InvalidValue, match=f"the weights have no .* 'blocks.{layers - 1}.att.{name}'"):
            converter.our_config({n: x for n, x in weights.items() if not n.endswith(name)}, ctx_len=16)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"heads": 3}, "model.heads=3 does not divide model.channels=32; nearest divisors: 2, 4"),
        ({"ffn_ratio": 0.01}, "model.ffn_ratio is 0.01; it must be 0, or from 1 / model.channels to 1000"),
        ({"group_norm_eps": 0.0}, "model.group_norm_eps is 0.0; it must be above 0"),
        ({"l2wrap": -1.0}, "model.l2wrap is -1.0; it must be at least 0 and finite"),
    ],
)
def test_wrong_values_are_one_clear_sentence(arch, fields, sentence):
    with pytest.raises(InvalidValue, match=re.escape(sentence)):
        model_config(arch, **(SIZES | fields))
