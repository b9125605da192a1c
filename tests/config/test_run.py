"""Config: TOML round trip, presets, and the errors of wrong fields and values."""

import dataclasses
import math
import re

import pytest

from timemix.config.from_file import config_from_file
from timemix.config.presets import PRESETS, preset
from timemix.config.run import RunConfig, TrainConfig, read_count, read_toml, to_toml
from timemix.errors import DamagedFile, InvalidValue, MissingFile
from timemix.models.registry import ARCHITECTURES, model_config
from timemix.models.size import count_parameters
from timemix.storage.settings import from_dict, to_dict
from timemix.training.optim import learning_rate


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", PRESETS)
def test_toml_round_trip(name, arch, tmp_path):
    config = preset(name, arch)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert read_toml(path) == config


def test_round_trip_keeps_what_differs_from_the_defaults(tmp_path):
    model = model_config("rwkv1", token_shift=(0.25, 0.25), token_shift_top=(), dropout=0.1)
    config = RunConfig(model=model, train=TrainConfig(betas=(0.8, 0.95), schedule="constant"))
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert read_toml(path) == config


def test_a_file_from_before_the_choice_holds_out_the_end_of_the_source(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(preset("cpu-small")).replace('hold_out = "each"\n', ""))
    assert "hold_out" not in path.read_text()
    assert read_toml(path).data.hold_out == config_from_file(path).data.hold_out == "end"
    path.write_text("format_version = 2\n")
    assert config_from_file(path).data.hold_out == "end"
    # A handwritten file without a version has the default version.
    path.write_text("[data]\nvalid_fraction = 0.2\n")
    assert config_from_file(path).data.hold_out == "each"


def test_seed_is_the_published_figure():
    config = preset("seed", "mha_rotary")
    assert (config.model.layers, config.model.heads, config.model.channels, config.model.ctx_len) == (5, 8, 512, 256)
    assert config.train.steps * config.train.batch_size == pytest.approx(500_000, abs=64)
    assert (config.train.lr, config.train.weight_decay) == (4e-4, 0.01)
    assert (preset("seed").train.lr, preset("seed").train.weight_decay) == (6e-4, 0.0)


def test_a_preset_names_its_architecture(tmp_path):
    assert preset("cpu-small").model.arch == "rwkv1"
    assert preset("rwkv7-small").model.arch == "rwkv7"
    other = preset("rwkv7-small", "rwkv1")
    assert (other.model.arch, other.model.ctx_len, other.train.eps) == ("rwkv1", 128, 1e-8)
    path = tmp_path / "config.toml"
    path.write_text("[model]\nlayers = 2\n")
    assert config_from_file(path, "rwkv7-small").model == dataclasses.replace(preset("rwkv7-small").model, layers=2)
    assert config_from_file(path, "rwkv7-small", "llama").model.arch == "llama"
    path.write_text('[model]\narch = "mha_pro"\n')
    assert config_from_file(path, "rwkv7-small").model == preset("rwkv7-small", "mha_pro").model


def test_the_large_preset_of_rwkv7_has_the_size_of_the_published_model():
    assert count_parameters(preset("rwkv7-0.1b").model)["total"] == 191_034_624


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: preset("cpu-smal"), "unknown preset 'cpu-smal'; did you mean 'cpu-small'?"),
        (lambda: model_config("rwkv11"), "unknown architecture 'rwkv11'; did you mean 'rwkv1'?"),
        (
            lambda: model_config("xyz"),
            "unknown architecture 'xyz'; known: rwkv1, rwkv1_exp, mha_rotary, mha_shift",
        ),
        (
            lambda: model_config("rwkv1", heads=5),
            "model.heads=5 does not divide model.channels=128; nearest divisors: 4, 8",
        ),
        (lambda: model_config("rwkv1", layers=0), "model.layers is 0; it must be at least 1"),
        (lambda: model_config("rwkv1", dropout=1.0), "model.dropout is 1.0; it must be at least 0 and below 1"),
        (
            lambda: model_config("rwkv1", token_shift=(0.6, 0.6)),
            "fractions must be from 0 to 1, and their sum at most 1",
        ),
        (lambda: TrainConfig(lr=float("nan")), "train.lr is nan; it must be at least 0"),
        (lambda: TrainConfig(eps=0), "train.eps is 0; it must be above 0 and finite"),
        (lambda: TrainConfig(batch_size=10, accumulation=3), "train.accumulation=3 does not divide"),
        (lambda: from_dict(RunConfig, {"model": {"layer": 3}}), "unknown field 'model.layer'; did you mean 'layers'?"),
        (lambda: from_dict(RunConfig, {"model": {"layers": "3"}}), "model.layers is '3'; it must be of type int"),
        (lambda: from_dict(RunConfig, {"model": {"layers": True}}), "must be of type int"),
        (lambda: from_dict(RunConfig, {"model": 3}), "model is 3; it must be a table"),
        (lambda: from_dict(RunConfig, {"train": {"betas": 0.9}}), "train.betas is 0.9; it must be a list"),
        (lambda: from_dict(RunConfig, {"train": {"schedule": "cosin"}}), "did you mean 'cosine'?"),
        (
            lambda: from_dict(RunConfig, {"model": {"arch": "mha"}}),
            "unknown architecture 'mha'; did you mean 'mha_pro'?",
        ),
        (
            lambda: from_dict(RunConfig, {"model": {"arch": "mha_rotary", "mixer": {"alpha": True}}}),
            "unknown field 'model.mixer'",
        ),
    ],
)
def test_wrong_values_are_one_clear_sentence(call, sentence):
    with pytest.raises(InvalidValue, match=re.escape(sentence)) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"format_version = 9\n", b"[model\n", b"\xff\xfe", b"format_version = 1\nx = 1\n"]
)
def test_damaged_config_files_name_the_file(content, tmp_path):
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=re.escape(str(path))):
        read_toml(path)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(MissingFile, match="No such file"):
        read_toml(tmp_path / "config.toml")


def test_none_is_left_out_of_toml():
    assert "token_shift_top" not in to_dict(model_config("rwkv1"))


class TestLearningRate:
    config = TrainConfig(steps=100, lr=1.0, lr_final=0.1)

    def rate(self, step, **fields):
        return learning_rate(dataclasses.replace(self.config, **fields), step)

    def test_cosine_begins_at_lr_and_passes_the_middle(self):
        assert self.rate(0) == 1.0
        assert self.rate(50) == pytest.approx(0.55)
        assert self.rate(99) == pytest.approx(0.1, abs=1e-3)

    def test_linear(self):
        assert self.rate(25, schedule="linear") == pytest.approx(0.775)

    def test_constant_then_decay(self):
        assert [self.rate(s, schedule="constant", decay=0.2) for s in (0, 50, 80)] == pytest.approx([1.0] * 3)
        assert self.rate(90, schedule="constant", decay=0.2) == pytest.approx(0.55)

    def test_the_decay_is_a_share_of_the_run_also_after_a_warmup(self):
        rates = [self.rate(s, schedule="constant", warmup=0.5, decay=0.2) for s in range(100)]
        assert rates[50:81] == pytest.approx([1.0] * 31)
        assert rates[90] == pytest.approx(0.55)
        assert rates[82] < 0.99

    def test_a_decay_takes_what_a_long_warmup_leaves(self):
        rates = [self.rate(s, schedule="constant", warmup=0.9, decay=0.5) for s in range(100)]
        assert rates[89:91] == pytest.approx([1.0, 1.0])
        assert rates[95] == pytest.approx(0.55)

    @pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
    def test_steps_after_the_last_have_the_final_rate(self, schedule):
        rates = [self.rate(s, schedule=schedule, warmup=0.1, decay=0.2) for s in (100, 101, 1000)]
        assert rates == pytest.approx([0.1] * 3)

    def test_warmup_rises_to_lr_and_never_starts_at_zero(self):
        rates = [self.rate(s, warmup=0.1) for s in range(12)]
        assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
        assert rates[10] == 1.0
        assert rates[11] < 1.0


@pytest.mark.parametrize("backend", ["blocked", "spectral"])
def test_a_free_w_refuses_the_backends_that_need_lags(backend):
    with pytest.raises(InvalidValue, match=f"model.backend is '{backend}', which does not support model.weights free"):
        model_config("rwkv1", weights="free", backend=backend)


class TestBudget:
    @pytest.mark.parametrize(
        ("written", "count"),
        [("20M", 20_000_000), ("1.5B", 1_500_000_000), ("20000", 20_000), (20_000, 20_000), ("2_000k", 2_000_000)],
    )
    def test_tokens_are_read_with_their_unit(self, written, count):
        assert read_count(TrainConfig(tokens=written).tokens) == count

    @pytest.mark.parametrize("written", ["0", "-3", "0.0001K", "20 M B", "M", "", "many", 0, -1, "1e9", "\u0664"])
    def test_other_tokens_are_refused(self, written):
        with pytest.raises(InvalidValue, match=r"train.tokens is .*; it must be a positive number, such as 20M"):
            TrainConfig(tokens=written)

    @pytest.mark.parametrize("seconds", [0, -1.0, math.inf, math.nan])
    def test_other_seconds_are_refused(self, seconds):
        with pytest.raises(InvalidValue, match=r"train.seconds is .*; it must be above 0 and finite"):
            TrainConfig(seconds=seconds)

    def test_seconds_and_tokens_exclude_one_another(self):
        with pytest.raises(InvalidValue, match=r"train.seconds 60 and train.tokens 20M exclude one another"):
            TrainConfig(seconds=60, tokens="20M")

    def test_a_file_may_have_tokens_as_a_number_or_a_text(self, tmp_path):
        for written in ("20_000", "'20k'"):
            (tmp_path / "run.toml").write_text(f"format_version = 2\n[train]\ntokens = {written}\n")
            assert read_count(read_toml(tmp_path / "run.toml").train.tokens) == 20_000
