"""Experiment files: accepted and rejected content, and fair settings of the shipped files."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from timemix.errors import DamagedFile, FileError, InvalidValue, MissingFile
from timemix.experiments.spec import (
    Experiment,
    SpeedExperiment,
    Verdict,
    find_experiment,
    read_experiment,
    shipped,
    with_data,
)
from timemix.experiments.variants import Variant
from timemix.models.registry import find_architecture
from timemix.models.size import count_parameters

FILE = """
title = "two"
tokens = 6400
seeds = [1, 2]
[base]
model = { layers = 2, channels = 32 }
[tune]
train.lr = [1e-3, 2e-3]
model.initial = ["original", "zero"]
[[variants]]
name = "plain"
[[variants]]
name = "weighted"
set.model.denominator = "weighted"
[[verdicts]]
claim = "plain is better"
better = "plain"
worse = "weighted"
"""


def read(tmp_path, text):
    path = tmp_path / "two.toml"
    path.write_text(text, encoding="utf-8")
    return read_experiment(path)


IDENTICAL = {
    "nothing set": 'name = "other"',
    "a default set": 'name = "other"\nlabel = "another label"\nset.model.layers = 2',
    "an old name": 'name = "other"\nset.model.mixer.alpha = true',
}


@pytest.mark.parametrize("variant", IDENTICAL.values(), ids=IDENTICAL)
def test_variants_with_the_same_settings_are_refused(tmp_path, variant):
    with pytest.raises(DamagedFile, match="'plain' and 'other' have the same settings, .* change a setting of one"):
        read(tmp_path, f"{FILE}[[variants]]\n{variant}\n")


def test_variants_that_differ_in_their_text_alone_are_compared(tmp_path):
    text = FILE + '[[variants]]\nname = "other"\nset.data.source = "other.txt"\n'
    assert len(read(tmp_path, text).variants) == 3


def test_the_page_on_experiment_files_is_right(tmp_path):
    page = (Path(__file__).parents[2] / "docs/howto/experiment-files.md").read_text(encoding="utf-8")
    example, *_ = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    experiment = read(tmp_path, example)
    configs = [experiment.config(variant, {}, 1) for variant in experiment.variants]
    assert [c.model.channels for c in configs] == [96, 96]
    assert configs[0].model != configs[1].model
    documented = set(re.findall(r"`(\w+)`", page))
    for kind in (Experiment, Variant, Verdict):
        assert {field.name for field in fields(kind)} <= documented


def test_a_variant_is_preset_then_base_then_its_own_then_the_tuning_point(tmp_path):
    experiment = read(tmp_path, FILE)
    assert [tuple(p.values()) for p in experiment.tuning_points()] == [
        (1e-3, "original"),
        (1e-3, "zero"),
        (2e-3, "original"),
        (2e-3, "zero"),
    ]
    config = experiment.config(experiment.variants[1], experiment.tuning_points()[2], seed=7)
    assert (config.model.layers, config.model.channels, config.model.ffn_ratio) == (2, 32, 2.5)
    assert config.model.denominator == "weighted"
    assert (config.train.lr, config.model.initial, config.train.seed) == (2e-3, "original", 7)
    # 12 windows of 64 tokens per step, from the preset.
    assert config.train.steps == round(6400 / (12 * 64))


def test_another_text_changes_the_source_alone(tmp_path):
    experiment = read(tmp_path, FILE)
    other = with_data(experiment, "a.txt", None)
    assert other.base == experiment.base | {"data": {"source": "a.txt"}}
    assert with_data(experiment, None, None) is experiment


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('title = "two"', 'titel = "two"', "unknown field 'titel'; did you mean 'title'?"),
        ('title = "two"\n', "", "title is missing"),
        ('name = "weighted"', 'name = "plain"', "two variants have the name 'plain'"),
        ('name = "weighted"', 'name = "a/b"', "'a/b' cannot name a folder"),
        ('name = "weighted"\n', "", "name is missing"),
        ("model.denominator", "model.denominators", "variant 'weighted': unknown field 'model.denominators'"),
        ('"weighted"\n[[verdicts]]', '"wieghted"\n[[verdicts]]', "did you mean 'weighted'?"),
        ("channels = 32", "channels = 30", "variant 'plain': model.heads=4 does not divide model.channels=30"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "with a repeated seed"),
        ("seeds = [1, 2]", "seeds = [0, 1]", "tuning uses seed 0"),
        ("seeds = [1, 2]", "seeds = []", "seeds is empty"),
        ("seeds = [1, 2]", "seeds = 3", "seeds is 3; it must be a list"),
        ("tokens = 6400", "", "give either tokens or seconds"),
        ("tokens = 6400", "tokens = 6400\nseconds = 5", "give either tokens or seconds"),
        ("tokens = 6400", "tokens = -1", "tokens is -1; it must be above 0"),
        ("train.lr = [1e-3, 2e-3]", "train.lr = 1e-3", "tune.train.lr is 0.001; it must be a list of values"),
        ("train.lr = [1e-3, 2e-3]", "train.lr = [1e-3, 2e-3, 1e-3]", "tune.train.lr is [0.001, 0.002, 0.001], with a"),
        ("train.lr = [1e-3, 2e-3]", "train.lrr = [1e-3]", "unknown field 'train.lrr'; did you mean 'lr'?"),
        ('worse = "weighted"', 'worse = "weigted"', "a verdict names the variant 'weigted'; did you mean 'weighted'?"),
        ('title = "two"', 'title = "two"\npreset = "small"', "unknown preset 'small'"),
        ('title = "two"', 'title = "two"\nkind = "sped"', "unknown kind 'sped'; did you mean 'speed'?"),
        ('title = "two"', 'title = "two"\nkind = ["x"]', "unknown kind ['x']"),
        ('name = "weighted"', 'name = "weighted"\nlabel = "plain"', "two variants have the label 'plain'"),
        ('name = "weighted"', 'name = "weighted"\ncolor = "reddish"', "'reddish' is not a matplotlib color"),
        ('name = "weighted"', 'name = "weighted"\ncolor = "none"', "'none' is not a matplotlib color"),
        ("train.lr = [1e-3, 2e-3]", 'data.order = ["epoch"]', "all points of a grid have one text"),
        ("tokens = 6400", 'tokens = 6400\nprompts = [""]', "a prompt is empty"),
        ("tokens = 6400", "seconds = inf", "seconds is inf; it must be above 0 and finite"),
        ('worse = "weighted"', 'worse = "weighted"\nat_step = 3', "at_step=3 of a verdict is not a validated step"),
        ('worse = "weighted"', 'worse = "weighted"\nat_step = -8', "at_step=-8 of a verdict is not a validated step"),
        ('worse = "weighted"', 'worse = "weighted"\nfirst_positions = 3', "set by_position = true"),
        (
            'worse = "weighted"',
            'worse = "weighted"\nfirst_positions = 0',
            "first_positions=0 of a verdict must be at least",
        ),
        ('worse = "weighted"', 'worse = "weighted"\nfirst_positions = 9999', "at most the ctx_len of variant 'plain'"),
        ('worse = "weighted"', 'worse = "weighted"\nof = "memory"', "unknown field 'verdicts.of'"),
        ("[base]", "[base", "is damaged"),
        ("model = {", "model = 3 #", "variant 'plain': model is 3; it must be a table"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, old, new, words):
    assert old in FILE
    with pytest.raises(DamagedFile) as error:
        read(tmp_path, FILE.replace(old, new, 1))
    assert str(tmp_path / "two.toml") in str(error.value)
    assert "\n" not in str(error.value)
    assert words in str(error.value)


def test_losses_by_position_need_windows_of_one_length(tmp_path):
    experiment = read(tmp_path, FILE)
    variants = (experiment.variants[0], Variant("weighted", {"model": {"arch": "rwkv7", "heads": 1, "ctx_len": 32}}))
    replace(experiment, variants=variants)
    with pytest.raises(InvalidValue, match="by_position is true, but the variants have ctx_len .* and .*; give all"):
        replace(experiment, variants=variants, by_position=True)


def test_no_variant(tmp_path):
    with pytest.raises(DamagedFile, match="the experiment has no variant"):
        read(tmp_path, 'title = "none"\ntokens = 10\nvariants = []\n')


def test_an_unknown_experiment_names_the_nearest():
    with pytest.raises(MissingFile, match="did you mean 'heads'"):
        find_experiment("head")
    with pytest.raises(MissingFile, match="cannot read missing.toml"):
        read_experiment(find_experiment("missing.toml"))


@pytest.mark.parametrize("path", shipped(), ids=lambda p: p.stem)
def test_the_shipped_experiments_compare_like_with_like(path):
    experiment = read_experiment(path)
    if not isinstance(experiment, Experiment):
        return
    assert len(experiment.seeds) >= 3
    assert len({p["train.lr"] for p in experiment.tuning_points()}) >= 3
    for variant in experiment.variants:
        arch = experiment.config(variant, {}, 1).model.arch
        styles = {p.get("model.initial") for p in experiment.points_of(variant).values()}
        has_styles = "initial" in find_architecture(arch).config.__dataclass_fields__ and path.stem != "initial"
        assert styles == ({"original", "zero"} if has_styles else {None})
    judged = {name for v in experiment.verdicts for name in (v.better, v.worse)}
    sizes = {}
    for variant in experiment.variants:
        model = experiment.config(variant, experiment.points_of(variant)[0], 1).model
        sizes[variant.name] = count_parameters(replace(model, vocab_size=136))["total"]
    first = sizes[experiment.variants[0].name]
    # "narrow" and "wide" variants accompany one of equal size, to show the effect of the number of parameters.
    unlike = {name for name in judged if abs(sizes[name] / first - 1) > 0.01}
    assert unlike <= {"mha_rotary-narrow"}


def test_a_speed_experiment_keeps_the_tokens_of_a_step():
    experiment = SpeedExperiment(title="x", variants=(Variant("a"),), ctx_lens=(16, 64), tokens=128)
    assert [experiment.config(experiment.variants[0], t).train.batch_size for t in (16, 64)] == [8, 2]
    with pytest.raises(InvalidValue, match="only values of ctx_lens that divide tokens"):
        SpeedExperiment(title="x", variants=(Variant("a"),), ctx_lens=(48,), tokens=128)


def test_a_field_that_an_architecture_lacks_is_not_tuned_there():
    tune = {"train": {"lr": [1e-3, 2e-3]}, "model": {"initial": ["original", "zero"], "alpha": [True, False]}}
    variants = tuple(Variant(arch, {"model": {"arch": arch}}) for arch in ("rwkv1", "mha_rotary"))
    experiment = Experiment("t", variants, tokens=1000, tune=tune)
    first, second = (experiment.points_of(variant) for variant in variants)
    assert list(first.values()) == experiment.tuning_points()
    assert {number: tuple(point.values()) for number, point in second.items()} == {
        0: (1e-3, "original"),
        2: (1e-3, "zero"),
        4: (2e-3, "original"),
        6: (2e-3, "zero"),
    }
    with pytest.raises(InvalidValue, match="unknown field 'model.alpha'"):
        Experiment("t", variants[1:], tokens=1000, tune=tune)


def test_an_experiment_extends_another(tmp_path):
    (tmp_path / "lower.toml").write_text(
        'title = "low"\ntokens = 1000\nseeds = [1, 2]\n[base]\nmodel = { channels = 16, heads = 2 }\n'
        '[[variants]]\nname = "a"\n'
    )
    upper = tmp_path / "upper.toml"
    upper.write_text('extends = "lower.toml"\ntitle = "up"\nseconds = 5\n[base]\nmodel.channels = 32\n')
    found = read_experiment(upper)
    assert (found.title, found.seeds, found.tokens, found.seconds) == ("up", (1, 2), None, 5)
    assert found.base == {"model": {"channels": 32, "heads": 2}}
    assert [variant.name for variant in found.variants] == ["a"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends = 3", "extends is 3; it must be the name of an experiment or of a file"),
        ('extends = "own.toml"', "extends is 'own.toml', which extends this file; remove one of the fields"),
        ('extends = "heats"', "there is no experiment 'heats'; did you mean 'heads'"),
        ('extends = "missing.toml"', "cannot read .*missing.toml"),
        ('extends = "heads"\nbase = 3', "base is 3; it must be a table"),
    ],
)
def test_a_bad_extension_is_explained(tmp_path, text, words):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(FileError, match=words):
        read_experiment(path)
