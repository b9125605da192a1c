"""The page docs/family.md follows from the files in benchmarks/family."""

import json
from dataclasses import replace

import pytest

from benchmarks import family
from timemix.experiments.spec import Experiment, find_experiment, read_experiment
from timemix.experiments.synthetic_report import SyntheticRow, SyntheticTable, TaskJudgement, TaskTable
from timemix.experiments.synthetic_spec import SyntheticExperiment
from timemix.reporting.markdown import with_blocks


def share(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


LOSSES = {
    "seeds": [1, 2, 3],
    "variants": [
        {
            "name": "rwkv1",
            "label": "RWKV of 2021",
            "parameters": 1000,
            "chosen": {"train.lr": 0.004},
            "valid_losses": {"1": 1.5, "2": 1.6, "3": 1.7},
        },
        {
            "name": "rwkv7",
            "label": "RWKV-7",
            "parameters": None,
            "chosen": None,
            "valid_losses": {},
            "difference": None,
        },
    ],
    "verdicts": [{"claim": "7 beats 1", "gain": {"mean": 0.1, "low": 0.05, "high": 0.15}}],
}
ROW = SyntheticRow(
    "rwkv7", "RWKV-7", 1000, 0.001, {8: share(0.7), 32: share(0.5)}, {8: {1: 0.7}, 32: {1: 0.4, 2: 0.6}}, [], 0
)
ACCURACIES = SyntheticTable(
    title="t",
    seeds=3,
    lrs=[0.001],
    tasks=[TaskTable("recall-64", "recall", 32, {8: 0.2, 32: 0.11}, [ROW])],
    verdicts=[TaskJudgement("7 recalls", {"mean": 0.0, "low": -1, "high": 1}, "undecided")],
)
NONE = replace(ACCURACIES, tasks=[], verdicts=[])


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The folder of the results, with those of two experiments, and a copy of the page."""
    page = tmp_path / "family.md"
    page.write_text(family.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    for name, value in {"RESULTS": tmp_path, "PAGE": page, "SPEED": tmp_path / "speed.json"}.items():
        monkeypatch.setattr(family, name, value)
    (tmp_path / "family").mkdir()
    (tmp_path / "family" / "table.json").write_text(json.dumps(LOSSES))
    monkeypatch.setattr(family, "accuracies_of", lambda name: ACCURACIES if name == "recall" else NONE)
    return tmp_path


def test_the_page_has_the_tables_of_the_results(results):
    blocks = family.blocks()
    assert "| RWKV of 2021 | 1,000 | 0.004 | 3 | 1.6000 ± 0.1000 | - |" in blocks["family"]
    row = "| RWKV-7 | 1,000 | 0.001 | 0.70 (0.60 to 0.80) | 0.50 (0.40 to 0.60) | 0.40, 0.60 |"
    assert row in blocks["recall"]
    row = "| 7 beats 1 | +0.1000 (+0.0500 to +0.1500) | nats/character | holds | [family](#family) |"
    assert row in blocks["verdicts"]
    assert "| 7 recalls | +0.0000 (-1.0000 to +1.0000) | share | undecided" in blocks["verdicts"]
    assert "was not run yet" in blocks["copy"]


def test_the_page_follows_from_the_committed_results():
    text = family.PAGE.read_text(encoding="utf-8")
    assert with_blocks(text, family.blocks()) == text


def test_the_hours_count_a_run_of_two_parts_once(results):
    (results / "family-time").mkdir()
    for name in ("family/rwkv7.seed-1", "family-time/rwkv7.seed-1"):
        (results / f"{name}.json").write_text(json.dumps({"key": "same", "seconds": 1800.0}))
    (results / "family-time" / "rwkv7.seed-2.json").write_text(json.dumps({"key": "other", "seconds": 3600.0}))
    (results / "family-time" / "rwkv7.memory.json").write_text(json.dumps({"key": "m", "peak_memory": 1.0}))
    (results / "family-time" / "table.json").write_text("{}")
    # The page says of a part without a table that it was not run yet.
    (results / "family-512").mkdir()
    (results / "family-512" / "rwkv7.seed-1.json").write_text(json.dumps({"key": "third", "seconds": 1800.0}))
    rows = family.hours_block().splitlines()[2:]
    assert rows == ["| [family](#family) | 1 | 0.5 |", "| [family-time](#family-time) | 1 | 1.0 |"]


def test_the_page_has_a_place_for_every_part():
    text = family.PAGE.read_text(encoding="utf-8")
    for name in (*family.NAMES, "verdicts", "hours"):
        assert text.count(f"<!-- {name} -->\n") == text.count(f"<!-- /{name} -->\n") == 1, name
    assert all(f"### {name}\n" in text for name in (*family.LOSSES, *family.TASKS))


def test_the_parts_are_experiments_of_timemix():
    kinds = {family.LOSSES: Experiment, family.TASKS: SyntheticExperiment}
    for names, kind in kinds.items():
        assert all(isinstance(read_experiment(find_experiment(name)), kind) for name in names)
    assert {v.name for v in read_experiment(find_experiment("family")).variants} == family.YEARS.keys()


def test_the_picture_shows_the_panels_that_have_results(results, tmp_path):
    speeds = {name: {"decoding_10000": 100.0} for name in family.YEARS}
    family.SPEED.write_text(json.dumps({"variants": speeds}))
    assert family.draw(tmp_path / "family.png")
    assert (tmp_path / "family.png").stat().st_size > 10_000
