"""How many numbers a training step stores, with the recurrence in C, in chunks and in float64, and the estimate."""

import pytest
import torch

from tests.helpers.models import numbers_kept
from timemix.models.language_model import LanguageModel
from timemix.models.registry import model_config
from timemix.ops import rwkv4, rwkv6

OPS = {"rwkv4": rwkv4, "rwkv5": rwkv6, "rwkv6": rwkv6}


@pytest.mark.parametrize("how", ["c", "chunked", "float64"])
@pytest.mark.parametrize("arch", OPS)
def test_what_training_keeps_is_as_estimated(monkeypatch, arch, how):
    if how == "chunked":
        monkeypatch.setattr(OPS[arch].compiled.KERNELS, "library", lambda: (None, "left out"))
    heads = {} if arch == "rwkv4" else {"heads": 2}
    settings = model_config(arch, vocab_size=19, channels=64, ctx_len=128, layers=3, **heads)
    dtype = torch.float64 if how == "float64" else torch.float32
    model = LanguageModel(settings).to(dtype)
    numbers = numbers_kept(model.blocks, torch.randn(4, 128, 64, dtype=dtype, requires_grad=True))
    estimate = 4 * 128 * settings.layers * model.block.kept(settings, 4).block
    assert numbers == pytest.approx(estimate, rel=0.2)
