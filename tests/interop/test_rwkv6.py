"""Published weights of RWKV-5 and RWKV-6: logits of the original code, bit-identical export, 5.0 and 5.1, refusals."""

import pytest
import torch
from torch.nn import functional as F

import timemix
from tests.helpers.original_code import Golden
from timemix.errors import DamagedFile, InvalidValue
from timemix.generation.decode import build_step
from timemix.interop.export import export_run
from timemix.interop.importing import import_run
from timemix.interop.published import read_published
from timemix.models.rwkv6.decode import Rwkv6Step
from timemix.tokenizers.make import train_tokenizer

ARCHS = ("rwkv5", "rwkv6")
EPS = 64e-5


def tokenizer_file(folder, size):
    train_tokenizer("character", "".join(chr(0x4E00 + i) for i in range(size))).save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


def imported(folder, weights):
    """Import weights of the original code as a run."""
    torch.save(weights, folder / "a.pth")
    import_run(folder / "a.pth", folder / "run", tokenizer_file(folder, len(weights["emb.weight"])), ctx_len=32)
    return folder / "run"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", ARCHS)
def test_import_and_export(arch, dtype, tmp_path):
    """All weights of the golden values are exact in 16 bits."""
    golden = Golden(arch, torch.float64)
    weights = {name: x.to(dtype) for name, x in golden.published("weights").items()}
    run = imported(tmp_path, weights)
    golden.close(timemix.load(run).model.double()(golden.input)[0][0, ::2], "logits", "logits")
    export_run(run, "pth", tmp_path / "out")
    found = torch.load(tmp_path / "out/model.pth", weights_only=True)
    assert found.keys() == weights.keys()
    assert all(found[name].dtype == dtype and torch.equal(found[name], x) for name, x in weights.items())


@pytest.mark.parametrize("arch", ARCHS)
def test_what_has_no_published_form(arch, tmp_path):
    weights = Golden(arch, torch.float32).published("weights")
    run = imported(tmp_path, weights)
    with pytest.raises(InvalidValue, match=f"a model of {arch} has no native form of Hugging Face; leave out --form"):
        export_run(run, "hf", tmp_path / "hf", form="native")
    config = run / "checkpoints/step-00000000/config.toml"
    config.write_text(config.read_text().replace("group_norm_eps = 0.00064", "group_norm_eps = 0.001"))
    with pytest.raises(InvalidValue, match="group_norm_eps is 0.001, but the original code has 0.00064"):
        export_run(run, "pth", tmp_path / "out")


def without(name):
    return lambda weights: {n: x for n, x in weights.items() if n != name}


DAMAGES = {
    "no map": (without("blocks.1.att.time_maa_w1"), "lacks 'blocks.1.att.time_maa_w1'"),
    "four maps": (
        lambda w: w | {"blocks.1.att.time_maa_w2": w["blocks.1.att.time_maa_w2"][:4]},
        "'blocks.1.att.time_maa_w2' is not a parameter of RWKV-6",
    ),
    "flat maps": (
        lambda w: w | {"blocks.2.att.time_maa_w2": w["blocks.2.att.time_maa_w2"].flatten(0, 1)},
        "the weights have no stack of matrices 'blocks.2.att.time_maa_w2'",
    ),
    "other width": (
        lambda w: w | {"blocks.0.att.time_maa_w1": torch.zeros(64, 35)},
        r"'blocks.0.att.time_maa_w1' is \[64, 7\], not",
    ),
    "not a number": (
        lambda w: w | {"blocks.0.att.time_faaaa": w["blocks.0.att.time_faaaa"] * float("nan")},
        "'blocks.0.att.time_faaaa' has a number that is not finite",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files(name, tmp_path):
    change, words = DAMAGES[name]
    torch.save(change(Golden("rwkv6", torch.float32).published("weights")), tmp_path / "a.pth")
    with pytest.raises(DamagedFile, match=words):
        read_published(tmp_path / "a.pth", 32)


def early_weights(version, dtype):
    """Return random weights with the names and shapes of RWKV-5.0 or 5.1."""
    torch.manual_seed(0)
    V, C, H, hidden = 30, 24, 3, 40
    vectors = ("time_mix_k", "time_mix_v", "time_mix_r") + (("time_mix_g",) if version == "5.1" else ())
    maps = ("receptance", "key", "value", "output") + (("gate",) if version == "5.1" else ())
    weights = {"emb.weight": torch.randn(V, C), "head.weight": torch.randn(V, C) / 5}
    norms = ["blocks.0.ln0", "ln_out"]
    for layer in range(2):
        block = f"blocks.{layer}"
        norms += [f"{block}.ln1", f"{block}.ln2", f"{block}.att.ln_x"]
        weights |= {f"{block}.att.{name}": torch.rand(1, 1, C) for name in vectors}
        weights |= {f"{block}.ffn.{name}": torch.rand(1, 1, C) for name in ("time_mix_k", "time_mix_r")}
        weights |= {f"{block}.att.{name}.weight": torch.randn(C, C) / 4 for name in maps}
        weights |= {f"{block}.att.time_decay": torch.randn(H), f"{block}.att.time_first": torch.randn(H)}
        weights |= {
            f"{block}.ffn.key.weight": torch.randn(hidden, C) / 4,
            f"{block}.ffn.value.weight": torch.randn(C, hidden) / 4,
            f"{block}.ffn.receptance.weight": torch.randn(C, C) / 4,
        }
    for name in norms:
        weights |= {f"{name}.weight": 1 + torch.randn(C) / 9, f"{name}.bias": torch.randn(C) / 9}
    return {name: x.to(dtype) for name, x in weights.items()}


def early_logits(weights, tokens):
    """Compute the logits (T, V) of RWKV-5.0 or 5.1 by the formulas of its original code, token by token, in float64."""
    w = {name: x.double() for name, x in weights.items()}
    C, H = w["emb.weight"].shape[1], len(w["blocks.0.att.time_decay"])

    def norm(name, x):
        return F.layer_norm(x, (C,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    x = norm("blocks.0.ln0", w["emb.weight"][tokens])
    for layer in range(2):
        att, ffn = f"blocks.{layer}.att.", f"blocks.{layer}.ffn."
        z = norm(f"blocks.{layer}.ln1", x)
        previous = F.pad(z, (0, 0, 1, -1))

        def mixed(part, letter, z=z, previous=previous):
            share = w[f"{part}time_mix_{letter}"].flatten()
            return z * share + previous * (1 - share)

        r, k, v = (
            (mixed(att, name[0]) @ w[f"{att}{name}.weight"].T).view(-1, H, C // H)
            for name in ("receptance", "key", "value")
        )
        decay, bonus = torch.exp(-torch.exp(w[f"{att}time_decay"])), torch.exp(w[f"{att}time_first"])
        S, y = torch.zeros(H, C // H, C // H, dtype=torch.float64), []
        for t in range(len(tokens)):
            kv = k[t][:, :, None] * v[t][:, None]
            y.append((r[t][:, None] @ (S + bonus[:, None, None] * kv)).squeeze(1))
            S = decay[:, None, None] * S + kv
        out = F.group_norm(torch.stack(y).flatten(1), H, w[f"{att}ln_x.weight"], w[f"{att}ln_x.bias"], EPS)
        if f"{att}gate.weight" in w:
            out = out * F.silu(mixed(att, "g") @ w[f"{att}gate.weight"].T)
        x = x + out @ w[f"{att}output.weight"].T
        z = norm(f"blocks.{layer}.ln2", x)
        previous = F.pad(z, (0, 0, 1, -1))
        hidden = torch.relu(mixed(ffn, "k", z, previous) @ w[f"{ffn}key.weight"].T) ** 2
        gate = torch.sigmoid(mixed(ffn, "r", z, previous) @ w[f"{ffn}receptance.weight"].T)
        x = x + gate * (hidden @ w[f"{ffn}value.weight"].T)
    return norm("ln_out", x) @ w["head.weight"].T


@pytest.mark.parametrize("each", ["time_decay", "key.weight"])
def test_damaged_files_of_early_versions(each, tmp_path):
    weights = early_weights("5.1", torch.float32)
    name = f"blocks.1.att.{each}"
    changed = [weights | {name: torch.tensor(1.0)}, without(name)(weights)]
    for i, damaged in enumerate(changed):
        torch.save(damaged, tmp_path / f"{i}.pth")
        with pytest.raises(DamagedFile, match=f"the weights have no vector or matrix '{name}'"):
            read_published(tmp_path / f"{i}.pth", 32)
    torch.save(weights | {"blocks.0.att.time_faaaa": torch.ones(3, 8)}, tmp_path / "both.pth")
    with pytest.raises(DamagedFile, match="both 'blocks.0.att.time_first' and 'blocks.0.att.time_faaaa'"):
        read_published(tmp_path / "both.pth", 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", ["5.0", "5.1"])
def test_early_versions_load_and_generate(version, dtype, tmp_path):
    weights = early_weights(version, dtype)
    run = imported(tmp_path, weights)
    loaded = timemix.load(run)
    assert loaded.config.model.without == (() if version == "5.1" else ("gate",))
    tokens = torch.arange(12) * 7 % 30
    found = loaded.model(tokens[None])[0][0]
    torch.testing.assert_close(found.double(), early_logits(weights, tokens), atol=2e-5, rtol=0)
    step = build_step(loaded.model, backend="compiled" if Rwkv6Step.library()[0] else "auto")
    found, _ = step(tokens, loaded.model.init_state(1), torch.tensor([0]), torch.tensor([12]), torch.arange(12))
    torch.testing.assert_close(found.double(), early_logits(weights, tokens), atol=2e-5, rtol=0)
    texts = timemix.generate(loaded, loaded.tokenizer.decode(tokens), tokens=5)
    assert len(texts[0]) == 5
    if version == "5.1":
        export_run(run, "pth", tmp_path / "out")
        assert read_published(tmp_path / "out/model.pth", 32).config.without == ()
    else:
        with pytest.raises(InvalidValue, match="a model without gate has no published form; export a whole model"):
            export_run(run, "pth", tmp_path / "out")
