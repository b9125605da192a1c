"""Sampling experiments: entropies by formula, filters of equal entropy, and a small experiment end to end."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from tests.helpers.runs import TEXT, write_text_file
from timemix.errors import FileError, TimemixError
from timemix.experiments.sampling import like_entropy, mean_entropy, measure_text, run_sampling, sweep
from timemix.experiments.sampling_report import to_markdown
from timemix.experiments.spec import SamplingExperiment
from timemix.generation.sampler import Sampler
from timemix.storage.json_files import to_json
from timemix.training.trainer import Trainer

MODEL = {"layers": 1, "heads": 2, "channels": 16, "ctx_len": 64}
TRAIN = {"steps": 6, "batch_size": 4, "precision": "float32"}


def experiment(source, **fields):
    settings = {
        "title": "sampling",
        "writer": {"model": MODEL, "train": TRAIN},
        "judge": {"model": MODEL | {"channels": 32}, "train": TRAIN},
        "temperatures": (1.0, 1.5),
        "top_a": (0.02, 0.2),
        "powers": (1.0, 2.0),
        "samples": 4,
        "tokens": 24,
        "base": {"data": {"source": str(source), "valid_fraction": 0.3}},
    }
    return SamplingExperiment(**(settings | fields))


def test_entropy_of_known_distributions():
    uniform = torch.zeros(3, 8)
    assert mean_entropy(Sampler(), uniform) == pytest.approx(math.log(8))
    assert mean_entropy(Sampler(top_k=2), uniform) == pytest.approx(math.log(2))
    assert mean_entropy(Sampler(temperature=0), uniform) == 0


def test_rivals_have_the_entropy_of_top_a():
    logits = torch.randn(400, 30, generator=torch.Generator().manual_seed(1)) * 3
    settings = like_entropy(experiment("x"), logits)
    assert [s.label for s in settings][:5] == ["top-a at 1", "top-p at 1", "min-p at 1", "top-k at 1", "plain at 1"]
    for first in (0, 5):
        target, *others = (mean_entropy(s.sampler, logits) for s in settings[first : first + 5])
        # A finite set of probabilities makes the entropy a step function, and k is a whole number.
        for setting, entropy in zip(settings[first + 1 : first + 5], others, strict=True):
            assert entropy == pytest.approx(target, abs=0.15 if setting.label.startswith("top-k") else 0.01)
    # Sampling without a filter lowers its temperature; the filters do not.
    assert [s.sampler.temperature for s in settings[5:9]] == [1.5] * 4
    assert settings[9].sampler.temperature < 1.5


def test_the_sweep_has_every_pair_of_factors_and_none():
    found = {(s.sampler.top_a, s.sampler.top_a_power) for s in sweep(experiment("x"))}
    assert found == {(0.0, 2.0), (0.02, 1.0), (0.02, 2.0), (0.2, 1.0), (0.2, 2.0)}


def test_repetition_and_variety_of_texts_written_by_hand():
    class Judge:
        max_position = None
        device = torch.device("cpu")

        def __call__(self, tokens):
            return torch.zeros(*tokens.shape, 5), None

    prompts = [[1] * 4, [0, 1, 2, 3]]
    texts = [[1] * 16, [4, 0, 1, 2, 3, 4, 0, 2, 4, 1, 3, 0, 3, 2, 1, 4]]
    found = measure_text(texts, prompts, Judge())
    # 20 tokens have 13 8-grams; if all tokens are 1, only the first 8-gram is new.
    assert found.repetition[0] == pytest.approx(12 / 13)
    assert found.variety[0] == pytest.approx(1 / 13)
    assert found.repetition[1] == 0
    assert found.variety[1] == 1
    assert found.judge_loss == pytest.approx([math.log(5)] * 2)


def test_a_study_end_to_end_and_again(tmp_path, monkeypatch):
    source = write_text_file(tmp_path, TEXT)
    study, lines = experiment(source), []
    found_table = run_sampling(study, tmp_path / "out", lines.append)
    table = to_json(found_table)
    assert len(table["rows"]) == 2 * 5 + 5
    rows = {row["label"]: row for row in table["rows"]}
    found = json.loads((tmp_path / "out" / "measurements.json").read_text())
    difference = rows["min-p at 1"]["differences"]["judge_loss"]
    pairs = zip(found["min-p at 1"]["judge_loss"], found["top-a at 1"]["judge_loss"], strict=True)
    assert difference["mean"] == pytest.approx(sum(a - b for a, b in pairs) / 4)
    # The factors of 2021 occur in both parts, with the same texts.
    assert rows["top-a at 1"]["judge_loss"] == rows["top-a 0.02, power 2"]["judge_loss"]
    assert [v["claim"] for v in table["verdicts"]][:2] == [
        "top-a generates more probable text than top-p at equal entropy",
        "top-a generates less repetition than top-p at equal entropy",
    ]
    assert (tmp_path / "out" / "top-a.png").stat().st_size > 5000
    assert "| top-a 0.2, power 2 |" in to_markdown(found_table)

    monkeypatch.setattr(Trainer, "train_step", lambda self: pytest.fail("trained again"))
    lines.clear()
    again = to_json(run_sampling(replace(study, title="other words"), tmp_path / "out", lines.append))
    assert again["rows"] == table["rows"]
    assert [line.split(":")[0] for line in lines] == ["writer", "judge"]
    with pytest.raises(FileError, match="has another experiment"):
        run_sampling(replace(study, samples=5), tmp_path / "out", lines.append)
    source.write_text(TEXT * 2)
    with pytest.raises(FileError, match="has this experiment on another text"):
        run_sampling(study, tmp_path / "out", lines.append)


def test_a_killed_beginning_is_begun_again(tmp_path):
    study, lines = experiment(write_text_file(tmp_path)), []
    # The state that kill -9 leaves during the creation of the run folder.
    run_sampling(study, tmp_path / "out", lambda line: None)
    for path in (tmp_path / "out").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    (tmp_path / "out" / "writer" / "data").mkdir(parents=True)
    run_sampling(study, tmp_path / "out", lines.append)
    assert lines[0] == "training writer: 6 steps"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(FileError, match="is not the folder of a comparison, and not empty"):
        run_sampling(experiment(write_text_file(tmp_path)), tmp_path, lambda line: None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens": 64}, "32 tokens of prompt and 64 of text exceed the judge model's ctx_len 64"),
        ({"temperatures": (0.0,)}, "must be above 0"),
        ({"top_a": (2.0,)}, "every top_a must be above 0 and at most 1"),
        ({"samples": 1}, "at least 2 samples"),
        ({"writer": {"model": {"layerz": 1}}}, "variant 'writer': unknown field 'model.layerz'"),
    ],
)
def test_unsupported_settings_are_refused_before_training(fields, words):
    with pytest.raises(TimemixError, match=words):
        experiment("x", **fields)
