"""Inspection: agreement with values computed by hand, and reasons for parts that a model lacks."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.helpers.runs import TEXT, small_config, with_model, write_text_file
from timemix.evaluation.inspect import QUANTILES, draw, inspect_run
from timemix.evaluation.loss import loss_per_token
from timemix.models.language_model import LanguageModel
from timemix.runs.load import load
from timemix.storage.json_files import to_json
from timemix.training.start import new_run


def trained(tmp_path, arch="rwkv1", **fields):
    config = with_model(small_config(write_text_file(tmp_path), arch, steps=12), **fields)
    trainer = new_run(config, tmp_path / "run")
    trainer.run()
    loaded = load(tmp_path / "run")
    return loaded, loaded.tokenizer.encode(TEXT)[:200]


@pytest.mark.parametrize("arch", ["rwkv1", "rwkv1_exp", "mha_shift", "mha_pro"])
def test_use_of_the_shifted_channels_by_its_definition(tmp_path, arch):
    loaded, tokens = trained(tmp_path, arch)
    found = inspect_run(loaded, tokens)
    report = to_json(found)
    names = ["query", "key", "value"] if arch.startswith("mha") else ["receptance", "key", "value"]
    assert [r["projection"] for r in report["projections"] if (r["layer"], r["half"]) == (1, "mixer")] == names
    row = next(r for r in report["projections"] if (r["layer"], r["half"], r["projection"]) == (0, "mixer", "value"))

    # By hand: layer norm, shift of the first half of the channels by one, then |weight| x deviation.
    block = loaded.model.blocks[0]
    windows = torch.from_numpy(tokens[:192].astype(np.int64)).view(-1, 16)
    rest = torch.from_numpy(tokens[192:199].astype(np.int64))[None]
    inputs = []
    with torch.no_grad():
        for piece in (windows, rest):
            x = block.mixer_norm(loaded.model.embedding(piece))
            x = torch.cat([torch.nn.functional.pad(x[:, :-1, :8], (0, 0, 1, 0)), x[:, :, 8:]], -1)
            inputs.append(x.flatten(0, 1))
        deviation = torch.cat(inputs).std(0, correction=0)
        strength = block.mixer.value.weight.abs().mean(0) * deviation
    assert row["shifted"] == pytest.approx(float(strength[:8].mean()), rel=1e-5)
    assert row["unshifted"] == pytest.approx(float(strength[8:].mean()), rel=1e-5)
    assert row["share"] == pytest.approx(row["shifted"] / (row["shifted"] + row["unshifted"]))

    # The loss without the shifted channels equals that with zero weights for them.
    changed = load(tmp_path / "run").model
    with torch.no_grad():
        changed.blocks[0].mixer.value.weight[:, :8] = 0
    assert row["loss_without_shifted"] == pytest.approx(loss_per_token(changed, tokens), abs=1e-5)
    assert report["loss"] == pytest.approx(loss_per_token(loaded.model, tokens), abs=1e-6)


def mixtures(block, z):
    """Return the mixtures of each normalized token z (B, T, C) and the previous token, by the formulas."""
    mixer, previous = block.mixer, F.pad(z[:, :-1], (0, 0, 1, 0))
    if not hasattr(mixer, "mix_maps"):
        return {name: share * z + (1 - share) * previous for name, share in mixer.mix.items()}
    first = z + (previous - z) * mixer.first_mix
    own = {name: torch.tanh(first @ map.down_weight) @ map.up_weight for name, map in mixer.mix_maps.items()}
    return {name: z + (previous - z) * (share + own[name]) for name, share in mixer.mix.items()}


@pytest.mark.parametrize("arch", ["rwkv4", "rwkv5", "rwkv6"])
def test_projections_and_half_lives_of_rwkv4_to_6_by_their_formulas(tmp_path, arch):
    """In layer 0, all inputs of the time-mix follow from the embedding."""
    loaded, tokens = trained(tmp_path, arch)
    report = inspect_run(loaded, tokens)
    assert report.loss == pytest.approx(loss_per_token(loaded.model, tokens), abs=1e-6)
    assert report.not_shown.keys() == {"tables", "token-shift"} | ({"states"} if arch == "rwkv4" else set())
    gate = [] if arch == "rwkv4" else [("mixer", "gate")]
    names = [
        *(("mixer", name) for name in ("receptance", "key", "value")),
        *gate,
        ("ffn", "key"),
        ("ffn", "receptance"),
    ]
    rows = {(row.layer, row.half, row.projection): row for row in report.projections}
    assert sorted(rows) == sorted((layer, *name) for layer in range(2) for name in names)

    block = loaded.model.requires_grad_(False).blocks[0]
    ids = torch.from_numpy(tokens.astype(np.int64))
    z = block.mixer_norm(loaded.model.input_norm(loaded.model.embedding(ids)))
    # 12 windows of 16 tokens, and the rest of 199 tokens
    pieces = [mixtures(block, each) for each in (z[:192].view(12, 16, 16), z[None, 192:199])]
    for half, name in names:
        row = rows[0, half, name]
        # Only RWKV-4 has a sigmoid in the time-mix. The channel-mix of all three has one.
        assert row.after_sigmoid == (name == "receptance" and (half == "ffn" or arch == "rwkv4"))
        if half == "ffn":
            continue
        outputs = torch.cat([getattr(block.mixer, name)(each[name]).flatten() for each in pieces])
        outputs = outputs.sigmoid() if row.after_sigmoid else outputs
        assert row.mean == pytest.approx(float(outputs.mean()), rel=1e-4, abs=1e-6)
        assert row.deviation == pytest.approx(float(outputs.std()), rel=1e-4)
        np.testing.assert_allclose(row.quantiles, np.quantile(outputs, QUANTILES), rtol=1e-4, atol=1e-6)
    for layer in range(2):
        quantiles = rows[layer, "ffn", "receptance"].quantiles
        assert 0 < quantiles[0] < 0.5 < quantiles[-1] < 1

    if arch == "rwkv4":
        assert report.states is None
        return
    decay = block.mixer.decay
    if arch == "rwkv6":
        # The states follow the whole text, without windows.
        mixed = mixtures(block, z[None])["decay"][0]
        decay = decay.bias + torch.tanh(mixed @ decay.down_weight) @ decay.up_weight
    half_lives = (math.log(2) / decay.exp()).view(-1, 4, 4).expand(200, 4, 4)
    for row in report.states.heads[:4]:
        np.testing.assert_allclose(row.half_life, np.quantile(half_lives[:, row.head], [0.1, 0.5, 0.9]), rtol=1e-4)
    assert [(row.layer, row.head, row.rate) for row in report.states.heads] == [
        (layer, head, None) for layer in range(2) for head in range(4)
    ]


def test_the_start_is_the_model_before_the_first_step(tmp_path):
    config = small_config(write_text_file(tmp_path), steps=4, seed=5)
    trainer = new_run(config, tmp_path / "run")
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    trainer.run()
    loaded = load(tmp_path / "run")
    seen = {}
    real = LanguageModel.to

    def spy(self, *arguments):
        seen.update(self.state_dict())
        return real(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "to", spy)
        report = to_json(inspect_run(loaded, loaded.tokenizer.encode(TEXT)[:100]))
    assert all(torch.equal(before[name], seen[name]) for name in before)
    # rwkv1 starts with zero keys and receptances, so a share is undefined.
    rows = [r for r in report["projections"] if r["half"] == "mixer"]
    assert [r["share_at_start"] is None for r in rows] == [r["projection"] != "value" for r in rows]


def test_the_start_of_a_run_from_another_model_is_unknown(tmp_path):
    first, tokens = trained(tmp_path)
    config = replace(first.config, start=str(tmp_path / "run"))
    new_run(config, tmp_path / "tuned").run()
    report = inspect_run(load(tmp_path / "tuned"), tokens)
    assert all(row.share_at_start is None and row.share is not None for row in report.projections)
    pictures = draw(report, config.model, tmp_path)
    assert tmp_path / "shift.png" in pictures
    # Imported weights have no text and no known start.
    imported = replace(first, config=replace(first.config, data=replace(first.config.data, source="")))
    assert all(row.share_at_start is None for row in inspect_run(imported, tokens).projections)


def test_statistics_and_tables_are_the_models_own(tmp_path):
    loaded, tokens = trained(tmp_path)
    found = inspect_run(loaded, tokens)
    report = to_json(found)
    assert json.loads(json.dumps(report)) == report
    mixer = loaded.model.blocks[1].mixer
    for name in ("f", "alpha", "beta", "gamma"):
        np.testing.assert_allclose(report["tables"][1][name], getattr(mixer, name).detach(), rtol=1e-6)
    receptance = next(r for r in report["projections"] if r["projection"] == "receptance")
    assert 0 < receptance["quantiles"][0] < receptance["mean"] < receptance["quantiles"][-1] < 1


def test_pictures_of_what_there_is(tmp_path):
    loaded, tokens = trained(tmp_path, alpha=False, weights="free")
    found = inspect_run(loaded, tokens)
    report = to_json(found)
    assert np.array(report["tables"][0]["f"]).shape == (4, 16, 16)
    pictures = draw(found, loaded.config.model, tmp_path / "pictures")
    assert [p.name for p in pictures] == ["tables.png", "projections.png", "shift.png"]
    assert all(p.stat().st_size > 3000 for p in pictures)


def test_a_model_without_token_shift_is_reported(tmp_path):
    loaded, tokens = trained(tmp_path, "mha_rotary")
    found = inspect_run(loaded, tokens)
    report = to_json(found)
    assert report["not_shown"].keys() == {"tables", "token-shift", "states"}
    assert all(r["shifted"] is None and "loss_without_shifted" not in r for r in report["projections"])
    assert [p.name for p in draw(found, loaded.config.model, tmp_path / "pictures")] == ["projections.png"]


def test_a_layer_whose_channels_all_come_from_before(tmp_path):
    loaded, tokens = trained(tmp_path, token_shift=(1.0,), token_shift_top=())
    rows = to_json(inspect_run(loaded, tokens))["projections"]
    assert {r["share"] for r in rows if r["layer"] == 0} == {1.0}
    assert {r["share"] for r in rows if r["layer"] == 1} == {None}
