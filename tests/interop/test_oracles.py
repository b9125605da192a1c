"""Imports of trained models against logits that another program recorded.

The files are those of the tests of rwkv.cpp (https://github.com/RWKV/rwkv.cpp, folder `tests`). They are not part of
timemix. A file has a header of 6 int32, then tensors: int32 for the number of dimensions, the length of the name and
the type, the sizes in reversed order, the name, and the data.
"""

import dataclasses
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from timemix.interop.published import read_published
from timemix.models.language_model import LanguageModel

FOLDER = os.environ.get("TIMEMIX_ORACLES")
PROMPT = [34, 105, 110]
"""The bytes after which the logits were recorded."""
TRANSPOSED = (
    "time_maa_w1",
    "time_maa_w2",
    "time_decay_w1",
    "time_decay_w2",
    *(f"{x}{i}" for x in "wavg" for i in "12"),
)
"""Low-rank maps, which the files store transposed."""
MODELS = {
    "rwkv4": ("4v0-660K", "FP32", 1e-5),
    "rwkv5": ("5v2-730K", "FP32", 1e-5),
    # The logits come from the weights before their quantization to 5 bits. Their standard deviation is 4.9.
    "rwkv6": ("6v0-3m", "Q5_1", 0.1),
    "rwkv7": ("7v0-834K", "FP32", 1e-5),
}
"""Name and type of the file of each architecture, and the largest difference of a logit."""


def quantized(data):
    """Return the numbers of blocks of type Q5_1: 32 numbers q d + m, with d and m in float16 and q in 5 bits."""
    blocks = np.frombuffer(data, np.uint8).reshape(-1, 24)
    d, m = blocks[:, :4].copy().view(np.float16).astype(np.float64).T[..., None]
    high = np.unpackbits(blocks[:, 4:8], axis=1, bitorder="little")
    low = np.concatenate((blocks[:, 8:] & 15, blocks[:, 8:] >> 4), 1)
    return d * (low + 16 * high) + m


def tensors(path):
    """Yield the name and the numbers of each tensor of a file, in float64."""
    data, at = path.read_bytes(), 24
    while at < len(data):
        dims, length, kind = struct.unpack_from("<3i", data, at)
        sizes = struct.unpack_from(f"<{dims}i", data, at + 12)[::-1]
        begin = at + 12 + 4 * dims
        name = data[begin : begin + length].decode()
        begin += length
        count = int(np.prod(sizes))
        # Type 0 is float32, type 8 is Q5_1.
        at = begin + {0: 4 * count, 8: count // 32 * 24}[kind]
        numbers = np.frombuffer(data[begin:at], "<f4") if kind == 0 else quantized(data[begin:at])
        yield name, torch.from_numpy(numbers.astype(np.float64)).view(sizes)


def original(arch, path):
    """Return the weights of a file by the names and in the form of the original code."""
    weights = {}
    for name, x in tensors(path):
        block, _, last = name.rpartition(".")
        if last in TRANSPOSED:
            x = x.mT.contiguous()
        elif last == "time_decay" and arch in ("rwkv4", "rwkv5"):
            # RWKV-4 stores -exp(decay), RWKV-5 stores exp(-exp(decay)).
            x = (-x if arch == "rwkv4" else -x.log()).log()
        if last == "x_rwkvag":
            weights |= {f"{block}.x_{letter}": x[i].view(1, 1, -1) for i, letter in enumerate("rwkvag")}
        elif last == "time_decay" and arch == "rwkv6":
            weights[name] = x.view(1, 1, -1)
        else:
            weights[name] = x.squeeze(-1) if last in ("time_decay", "time_faaaa") and x.ndim == 3 else x
    return weights


@pytest.mark.skipif(FOLDER is None, reason="set TIMEMIX_ORACLES to a folder with the models of the tests of rwkv.cpp")
@pytest.mark.parametrize("arch", MODELS)
def test_an_imported_model_has_the_recorded_logits(arch, tmp_path):
    name, kind, limit = MODELS[arch]
    torch.save(original(arch, Path(FOLDER) / f"tiny-rwkv-{name}-{kind}.bin"), tmp_path / "a.pth")
    published = read_published(tmp_path / "a.pth", 16)
    assert published.config.arch == arch
    # The program that recorded the logits has another constant for RWKV-5 than the original code.
    config = dataclasses.replace(published.config, **({"group_norm_eps": 1e-5} if arch == "rwkv5" else {}))
    model = LanguageModel(config).double()
    model.load_state_dict(published.weights)
    recorded = np.fromfile(Path(FOLDER) / f"expected-logits-{name}.bin", "<f4")
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT]), logits="last")[0].flatten().numpy()
    assert np.abs(logits - recorded).max() < limit
