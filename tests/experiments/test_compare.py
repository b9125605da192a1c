"""Comparisons on a small text, end to end: equal batches, tuning, resuming, failures and rejected input."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.comparisons import BASE, finish, small
from tests.helpers.runs import TEXT, write_text_file
from timemix.bench.measure import StepSpeed, measure_training
from timemix.cli import compare as cli
from timemix.config.run import RunConfig
from timemix.errors import CannotWrite, DamagedFile, FileError, Interrupted, InvalidValue, MissingFile, Unavailable
from timemix.experiments.compare import Comparison
from timemix.experiments.jobs import Failure, Job, ResultFiles
from timemix.experiments.measurements import step_cost
from timemix.experiments.report import write_report
from timemix.experiments.table import Row, Table, build_table
from timemix.experiments.variants import Variant
from timemix.models.registry import model_config
from timemix.runs.load import load
from timemix.runs.metrics import read_metrics
from timemix.storage.locks import claimed
from timemix.training.batch_loss import BatchLoss
from timemix.training.trainer import Trainer


@pytest.fixture
def unmeasured(monkeypatch):
    """Skip the measurement of memory, which takes three seconds per variant; the fixture `done` measures it."""
    monkeypatch.setattr(
        "timemix.experiments.measurements.measure_training", lambda config, steps: StepSpeed(1.0, 64.0, None)
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished comparison, the batches of its trainers, and its report."""
    folder = tmp_path_factory.mktemp("compare")
    seen = {}
    train_step, of_piece = Trainer.train_step, BatchLoss.of_piece

    def spy_on_step(self):
        seen.setdefault(str(self.out), [])
        spy_on_step.batches = seen[str(self.out)]
        return train_step(self)

    def spy_on_loss(self, inputs, *others):
        spy_on_step.batches.append(inputs.numpy().copy())
        return of_piece(self, inputs, *others)

    measured = []

    def once(config, steps):
        """Measure the first variant only: a measurement takes three seconds in a new process."""
        if not measured:
            measured.append(measure_training(config, steps))
        return measured[0]

    experiment = small(write_text_file(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", spy_on_step)
        patch.setattr(BatchLoss, "of_piece", spy_on_loss)
        patch.setattr("timemix.experiments.measurements.measure_training", once)
        comparison = Comparison(experiment, folder / "out")
        lines = finish(comparison)
        table = write_report(comparison).to_json()
    return comparison, seen, lines, table


def batches(seen, name):
    return next(b for out, b in seen.items() if out.endswith(name))


def test_all_variants_of_a_seed_see_the_same_batches(done):
    _, seen, lines, _ = done
    assert len(seen) == len(lines) == 2 * (2 + 2)
    for run in ("seed-1", "seed-2", "tuning-0", "tuning-1"):
        np.testing.assert_array_equal(batches(seen, f"rwkv1/{run}"), batches(seen, f"mha/{run}"))
    assert not np.array_equal(batches(seen, "rwkv1/seed-1"), batches(seen, "rwkv1/seed-2"))


def test_each_run_prints_its_loss_and_the_time_left(done):
    _, _, lines, table = done
    tuned = table["variants"][0]["tuning"][0]["valid_loss"]
    assert re.fullmatch(rf"rwkv1 tuning 0: validation loss {tuned:.4f} \(1 of 8, about \d:\d\d left\)", lines[0])
    assert re.fullmatch(r"mha seed 1: held-out loss \d\.\d{4} \(7 of 8, about \d:\d\d left\)", lines[6])
    assert re.fullmatch(r"mha seed 2: held-out loss \d\.\d{4} \(8 of 8\)", lines[7])


def test_the_time_left_follows_from_the_runs_so_far(tmp_path, monkeypatch):
    clock = SimpleNamespace(monotonic=itertools.count(step=60).__next__)
    monkeypatch.setattr("timemix.experiments.compare.time", clock)
    lines = finish(Comparison(small(write_text_file(tmp_path), tune={}, seeds=(1, 2)), tmp_path / "out"))
    ends = [line.partition(" (")[2] for line in lines]
    assert ends == ["1 of 4, about 3:00 left)", "2 of 4, about 2:00 left)", "3 of 4, about 1:00 left)", "4 of 4)"]


def test_tuning_takes_the_best_point_without_the_validation_text(done):
    comparison, _, _, table = done
    for variant, row in zip(comparison.experiment.variants, table["variants"], strict=True):
        losses = [point["valid_loss"] for point in row["tuning"]]
        assert row["chosen"] == comparison.experiment.tuning_points()[int(np.argmin(losses))]
        seed = comparison.config(comparison.seed_jobs(variant)[0])
        assert seed.train.lr == row["chosen"]["train.lr"]
    corpora = {
        tuning: [comparison.corpus(v, tuning) for v in comparison.experiment.variants] for tuning in (False, True)
    }
    # All variants share their tokens.
    assert all(each is shared[0] for shared in corpora.values() for each in shared)
    whole, tuning = corpora[False][0], corpora[True][0]
    cut = int(0.95 * len(whole.train))
    np.testing.assert_array_equal(tuning.train, whole.train[:cut])
    assert len(tuning.valid) <= len(whole.train) - cut
    assert tuning.tokenizer.hash == whole.tokenizer.hash


def test_the_table_is_what_the_runs_logged(done):
    comparison, _, _, table = done
    for variant, row in zip(comparison.experiment.variants, table["variants"], strict=True):
        for job in comparison.seed_jobs(variant):
            rows = read_metrics(comparison.folder(job))
            assert row["valid_losses"][job.number] == rows[-1]["valid_loss"]
            assert row["valid_at"][job.number]["4"] == next(r["valid_loss"] for r in rows if r["step"] == 4)
        assert row["tokens_per_second"] > 0
        assert all(comparison.result(job).by_position is None for job in comparison.tuning_jobs(variant))
        assert row["peak_memory"] > 0
    first, second = (row["valid_losses"] for row in table["variants"])
    difference = np.mean([second[s] - first[s] for s in (1, 2)])
    assert table["variants"][1]["difference"]["mean"] == pytest.approx(difference)
    assert table["verdicts"][0]["gain"]["mean"] == pytest.approx(difference)
    assert json.loads((comparison.out / "table.json").read_text())["title"] == "small"
    text = (comparison.out / "table.md").read_text()
    assert "| attention |" in text
    assert "rwkv1 is better" in text
    assert (comparison.out / "loss.png").stat().st_size > 5000


def test_called_again_it_runs_nothing(done, monkeypatch):
    comparison, _, _, table = done
    monkeypatch.setattr(Trainer, "train_step", lambda self: pytest.fail("a finished run was trained again"))
    again = Comparison(replace(comparison.experiment, title="other words", verdicts=()), comparison.out)
    assert finish(again) == []
    assert write_report(again).to_json()["variants"][0]["valid_losses"] == table["variants"][0]["valid_losses"]
    write_report(comparison)


@pytest.mark.usefixtures("unmeasured")
def test_what_is_asked_for_later_is_measured_without_training(tmp_path, monkeypatch):
    experiment = small(write_text_file(tmp_path), tune={}, seeds=(1,))
    finish(Comparison(experiment, tmp_path / "out"))
    monkeypatch.setattr(Trainer, "train_step", lambda self: pytest.fail("trained again"))
    later = Comparison(replace(experiment, by_position=True), tmp_path / "out")
    assert len(finish(later)) == 2
    table = write_report(later).to_json()
    (losses,) = table["variants"][0]["by_position"].values()
    assert len(losses) == 16
    assert (tmp_path / "out" / "position.png").exists()


@pytest.mark.usefixtures("unmeasured")
def test_another_comparison_takes_its_runs_over(done, tmp_path, monkeypatch):
    comparison, _, _, table = done
    third = Variant("third", {"model": {"ffn": {"activation": "relu2"}}})
    experiment = replace(comparison.experiment, variants=(*comparison.experiment.variants, third))
    pool = tmp_path / "pool"
    pool.mkdir()
    (pool / "first").symlink_to(comparison.out)
    trained = []
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: (trained.append(self.out.parent.name), step(self))[1])
    other = Comparison(experiment, pool / "second", reuse=pool)
    finish(other)
    assert set(trained) == {"third"}
    assert write_report(other).to_json()["variants"][1]["valid_losses"] == table["variants"][1]["valid_losses"]


@pytest.mark.usefixtures("unmeasured")
def test_a_stopped_comparison_resumes(tmp_path, monkeypatch):
    experiment = small(write_text_file(tmp_path), tune={}, seeds=(1,))
    whole = Comparison(experiment, tmp_path / "whole")
    finish(whole)
    steps = []
    step = Trainer.train_step

    def stops(self):
        steps.append(self.step)
        if len(steps) == 11:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", stops)
    with pytest.raises(Interrupted):
        finish(Comparison(experiment, tmp_path / "stopped"))
    again = Comparison(experiment, tmp_path / "stopped")
    assert finish(again)[0].startswith("mha seed 1")
    # The step during which the signal arrived was finished and saved, so no step ran twice.
    assert steps == list(range(8)) * 2
    for a, b in zip(write_report(whole).to_json()["variants"], write_report(again).to_json()["variants"], strict=True):
        assert a["valid_losses"] == b["valid_losses"]


@pytest.mark.usefixtures("unmeasured")
def test_a_diverged_variant_is_reported_and_not_tried_again(tmp_path):
    # A learning rate of 1e30 makes the loss infinite.
    fails = Variant("fails", {"train": {"lr_final": 1e30, "schedule": "linear"}})
    experiment = small(write_text_file(tmp_path), variants=(fails, Variant("good")), seeds=(1,), verdicts=())
    comparison = Comparison(experiment, tmp_path / "out")
    assert "fails seed 1: failed: every tuning run failed: the loss is not finite" in " ".join(finish(comparison))
    table = write_report(comparison).to_json()
    assert table["variants"][0]["failed"].keys() == {1}
    assert table["variants"][1]["valid_losses"].keys() == {1}
    assert "Variant 'fails', seed 1, failed" in (tmp_path / "out" / "table.md").read_text()
    assert [line.split(":")[0] for line in finish(Comparison(experiment, tmp_path / "out"))] == ["fails seed 1"]


@pytest.mark.parametrize(("failed", "status"), [({"a"}, 1), (set(), 0)])
def test_a_variant_without_any_run_is_told_by_the_exit_status(failed, status, tmp_path, monkeypatch, capsys):
    rows = [
        Row(name=n, label=n, failed={1: "no"} if n in failed else {}, valid_losses={} if n in failed else {1: 1.0})
        for n in "ab"
    ]
    table = Table("t", 1, None, [1], rows, [])
    monkeypatch.setattr(cli, "_train_all", lambda *arguments: table)
    assert cli.compare(["--arch", "rwkv1", "rwkv7", "--out", str(tmp_path)]) == status
    assert ("all runs of a variant failed; their errors are below the table" in capsys.readouterr().err) == bool(status)


def test_a_text_for_a_speed_experiment_is_refused():
    with pytest.raises(InvalidValue, match="long-context measures random tokens; leave out --data and --valid"):
        cli.compare(["long-context", "--data", "a.txt"])


@pytest.mark.parametrize("content", [b"", b'{"seconds": ', b"[]", b"\xff"])
def test_a_damaged_result_names_the_file_to_remove(tmp_path, content):
    files, job = ResultFiles(tmp_path / "out", tmp_path / "kept"), Job(Variant("a"), 1, False)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a.seed-1.json").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"a.seed-1.json is damaged; remove it to run a seed 1 again"):
        files.read(job)
    (tmp_path / "a.memory.json").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"a.memory.json is damaged; remove it to measure again"):
        step_cost(RunConfig(model_config("rwkv1")), tmp_path / "a.memory.json")


def test_a_copy_of_a_later_version_keeps_its_fields(done, tmp_path):
    comparison, *_ = done
    job = comparison.seed_jobs(comparison.experiment.variants[0])[0]
    files, result = ResultFiles(tmp_path / "out", tmp_path), comparison.result(job)
    files.copy(job, result)
    (path,) = tmp_path.glob("*.json")
    later = json.dumps(json.loads(path.read_text()) | {"later_field": 1})
    path.write_text(later)
    files.copy(job, result)
    assert path.read_text() == later
    path.write_text("")
    files.copy(job, result)
    assert files.kept(job) == replace(result, taken_from=None)


@pytest.mark.usefixtures("unmeasured")
def test_a_failed_run_does_not_stop_the_rest_and_is_tried_again(tmp_path, monkeypatch, capsys):
    step = Trainer.train_step

    def broken(self):
        if self.out.parent.name == "rwkv1":
            raise RuntimeError("a bug")
        return step(self)

    experiment = small(write_text_file(tmp_path), tune={}, seeds=(1,))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", broken)
        comparison = Comparison(experiment, tmp_path / "out")
        assert finish(comparison)[0] == "rwkv1 seed 1: failed: RuntimeError: a bug (1 of 2, about 0:00 left)"
    assert "RuntimeError: a bug" in capsys.readouterr().err
    assert write_report(comparison).to_json()["variants"][1]["valid_losses"]
    (line,) = finish(Comparison(experiment, tmp_path / "out"))
    assert line.startswith("rwkv1 seed 1: held-out loss")


def test_seeds_run_again_when_tuning_chooses_another_point(tmp_path):
    experiment = small(write_text_file(tmp_path), seeds=(1,))
    comparison = Comparison(experiment, tmp_path / "out")
    finish(comparison)
    variant = experiment.variants[0]
    chosen = experiment.tuning_points().index(comparison.best_point(variant))
    other = comparison.folder(comparison.tuning_jobs(variant)[1 - chosen]) / "result.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"valid_loss": 0.0}))
    again = Comparison(experiment, tmp_path / "out")
    assert [line.split(":")[0] for line in finish(again)] == ["rwkv1 seed 1"]
    trained = load(again.folder(again.seed_jobs(variant)[0])).config
    assert trained.train.lr == experiment.tuning_points()[1 - chosen]["train.lr"]


def test_seeds_run_again_when_a_repeated_tuning_run_chooses_another_point(tmp_path, monkeypatch, unmeasured):
    """The best point changes in the call that already knows the seeds of the old point."""
    experiment = small(write_text_file(tmp_path), seeds=(1,))
    points, train, disk = experiment.tuning_points(), Comparison._train, {}

    def train_best(self, trainer, watch, job):
        if job.tuning and self.point(job) == points[1]:
            if disk["full"]:
                trainer.lock.release()
                raise CannotWrite("no space left")
            return replace(train(self, trainer, watch, job), valid_loss=0.0)
        return train(self, trainer, watch, job)

    monkeypatch.setattr(Comparison, "_train", train_best)
    for disk["full"], chosen in ((True, points[0]), (False, points[1])):
        comparison = Comparison(experiment, tmp_path / "out")
        comparison.estimate()
        finish(comparison)
        for variant in experiment.variants:
            assert comparison.best_point(variant) == chosen
            trained = load(comparison.folder(comparison.seed_jobs(variant)[0])).config
            assert trained.train.lr == chosen["train.lr"]


def test_a_moved_folder_resumes(tmp_path, monkeypatch):
    experiment = small(write_text_file(tmp_path), tune={}, seeds=(1,))
    step = Trainer.train_step

    def stops(self):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stops)
        with pytest.raises(Interrupted):
            finish(Comparison(experiment, tmp_path / "out"))
    (tmp_path / "out").rename(tmp_path / "moved")
    steps = []
    monkeypatch.setattr(Trainer, "train_step", lambda self: (steps.append(self.step), step(self))[1])
    finish(Comparison(experiment, tmp_path / "moved"))
    assert steps == [*range(4, 8), *range(8)]


def test_what_kill_9_leaves_is_begun_again(tmp_path):
    experiment = small(write_text_file(tmp_path), tune={}, seeds=(1,))
    comparison = Comparison(experiment, tmp_path / "out")
    first, second = (comparison.folder(comparison.seed_jobs(v)[0]) for v in experiment.variants)
    # A kill during the creation of the folder, and a kill during the copy of another comparison's run.
    (first / "data").mkdir(parents=True)
    second.mkdir(parents=True)
    (second / "config.toml").write_text("format_version = 1\n[train]\nsteps = 3\n")
    assert len(finish(comparison)) == 2
    assert all(comparison.result(comparison.seed_jobs(v)[0]).steps == 8 for v in experiment.variants)


HOLDER = """
import sys, time
from pathlib import Path
from timemix.storage.locks import claimed
with claimed(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_a_lock_is_one_process_at_a_time_and_ends_with_it(tmp_path):
    path = tmp_path / "folder" / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "True\n"
        with claimed(path) as mine:
            assert not mine
    finally:
        holder.kill()
        holder.wait()
    with claimed(path, wait=True) as mine:
        assert mine


def test_text_that_is_too_short_is_refused_before_anything_runs(tmp_path):
    source = write_text_file(tmp_path)
    plain = small(source, tune={}, seeds=(1,), by_position=True)

    def on(**data):
        return replace(plain, base=BASE | {"data": {"source": str(source)} | data})

    with pytest.raises(InvalidValue, match="the held-out text has 0 tokens, but variant 'rwkv1' needs 17"):
        Comparison(on(valid_fraction=0.0), tmp_path / "a")
    with pytest.raises(InvalidValue, match="needs 17"):
        Comparison(on(valid_tokens=16), tmp_path / "b")
    with pytest.raises(InvalidValue, match="the training text has"):
        Comparison(on(valid_fraction=0.999), tmp_path / "c")
    with pytest.raises(Unavailable, match="device 'cuda:99'"):
        Comparison(plain, tmp_path / "d", device="cuda:99")
    with pytest.raises(MissingFile, match="there is no folder .*nowhere to reuse"):
        Comparison(plain, tmp_path / "e", reuse=tmp_path / "nowhere")


def test_damaged_files_of_its_folder_are_named(done, tmp_path):
    comparison, *_ = done
    out = shutil.copytree(comparison.out, tmp_path / "out")
    result = out / "variants" / "mha" / "seed-2" / "result.json"
    result.write_text("{}")
    with pytest.raises(DamagedFile, match=r"seed-2/result.json is damaged; remove it to run mha seed 2 again"):
        finish(Comparison(comparison.experiment, out))
    (out / "experiment.json").write_text("{}")
    with pytest.raises(FileError, match="has another experiment .*the kind of experiment, unless .* is damaged"):
        Comparison(comparison.experiment, out)


def test_what_is_not_its_folder_is_refused(tmp_path):
    source = write_text_file(tmp_path)
    experiment = small(source, tune={}, seeds=(1,))
    out = tmp_path / "out"
    Comparison(experiment, out)
    with pytest.raises(FileError, match=r"has another experiment \(different: seeds\)"):
        Comparison(replace(experiment, seeds=(1, 2)), out)
    base = experiment.base | {"data": {"source": str(source), "order": "epoch"}}
    with pytest.raises(FileError, match=r"different: base, variants"):
        Comparison(replace(experiment, variants=experiment.variants[:1], verdicts=(), base=base), out)
    with pytest.raises(InvalidValue, match="the vocabulary has no 'Ω'"):
        Comparison(replace(experiment, prompts=("the Ω",)), tmp_path / "prompts")
    source.write_text(TEXT + "more", encoding="utf-8")
    with pytest.raises(FileError, match="the text has changed since .* was created"):
        Comparison(experiment, out)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    with pytest.raises(FileError, match="not the folder of a comparison, and not empty"):
        Comparison(experiment, foreign)
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match=r"cannot write .*file"):
        Comparison(experiment, tmp_path / "file")


def test_a_text_that_moved_is_the_same_text(tmp_path):
    source = write_text_file(tmp_path)
    experiment = small(source, tune={}, seeds=(1,))
    Comparison(experiment, tmp_path / "out")
    moved = source.rename(tmp_path / "moved.txt")
    Comparison(replace(experiment, base=BASE | {"data": {"source": str(moved)}}), tmp_path / "out")


def test_a_budget_in_seconds_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "timemix.experiments.measurements.measure_training", lambda config, steps: StepSpeed(0.25, 64.0, None)
    )
    experiment = small(write_text_file(tmp_path), tokens=None, seconds=1.5, tune={}, seeds=(1, 2))
    comparison = Comparison(experiment, tmp_path / "out")
    assert comparison.estimate() == "unfinished runs: 4, about 0:06 in one process"
    monkeypatch.setattr(Comparison, "memory", lambda self, variant: None)
    finish(comparison)
    assert all(comparison.result(j).steps == 6 for v in experiment.variants for j in comparison.seed_jobs(v))
    write_report(comparison)
    assert "Each variant is trained for 1.5 s, once with each seed" in (tmp_path / "out" / "table.md").read_text()
    early = replace(experiment, verdicts=(replace(experiment.verdicts[0], at_step=8),))
    sentence = "at_step=8 of a verdict is after the last step of variant 'rwkv1', whose budget of 1.5 s gives 6 steps"
    with pytest.raises(InvalidValue, match=sentence):
        Comparison(early, tmp_path / "early")


def test_the_report_names_precisions_that_differ_between_processors(tmp_path, monkeypatch):
    base = BASE | {"data": {"source": str(write_text_file(tmp_path))}, "train": BASE["train"] | {"precision": "auto"}}
    experiment = small(
        "",
        tune={},
        base=base,
        verdicts=(),
        variants=(Variant("one"), Variant("two", {"train": {"precision": "float32"}, "model": {"heads": 1}})),
    )
    for seeds, precision in (((1,), "bfloat16"), ((1, 2), "float32")):
        monkeypatch.setattr("timemix.training.trainer.choose_precision", lambda *_, chosen=precision: (chosen, ""))
        finish(comparison := Comparison(replace(experiment, seeds=seeds), tmp_path / str(len(seeds)), reuse=tmp_path))
    table = write_report(comparison)
    assert [row.chosen_precision for row in table.variants] == [{1: "bfloat16", 2: "float32"}, {}]
    assert "- Some runs use bfloat16 and others float32, because" in (tmp_path / "2" / "table.md").read_text()


@pytest.mark.slow
def test_two_processes_share_the_runs(tmp_path):
    write_text_file(tmp_path)
    (tmp_path / "small.toml").write_text(
        """
title = "small"
tokens = 512
seeds = [1, 2, 3]
base.model = { layers = 1, heads = 2, channels = 16, ctx_len = 16 }
base.train = { batch_size = 4, valid_every = 8 }
base.data.source = "text.txt"
[[variants]]
name = "rwkv1"
[[variants]]
name = "mha"
set.model.arch = "mha_rotary"
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, "-m", "timemix", "compare", "small.toml", "--out", "out", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    ended = sorted(line.split(":")[0] for line in result.stderr.splitlines() if "held-out loss" in line)
    assert ended == [f"{v} seed {s}" for v in ("mha", "rwkv1") for s in (1, 2, 3)]
    table = json.loads(result.stdout)
    assert [len(row["valid_losses"]) for row in table["variants"]] == [3, 3]


def test_a_variant_of_another_tokenizer_has_its_own_tokens(tmp_path):
    bytes_ = Variant("bytes", {"data": {"tokenizer": "byte"}})
    experiment = small(write_text_file(tmp_path), variants=(Variant("chars"), bytes_), verdicts=())
    comparison = Comparison(experiment, tmp_path / "out")
    folders = [comparison.config(comparison.tuning_jobs(v)[0]).data.source for v in comparison.experiment.variants]
    assert len(set(folders)) == 2
    assert all(Path(f).is_dir() for f in folders)
    chars, bytes_ = build_table(comparison).variants
    assert chars.text != bytes_.text


def trained_jobs(comparison):
    """Return the names of the jobs that a comparison trains."""
    return [line.partition(":")[0] for line in finish(comparison)]


def test_results_in_a_folder_of_their_own_are_enough_to_go_on(tmp_path, unmeasured):
    experiment, kept = small(write_text_file(tmp_path), by_position=True), tmp_path / "kept"
    first = Comparison(experiment, tmp_path / "one", results=kept)
    assert first.estimate() == "unfinished runs: 8, about 1:04 in one process"
    assert len(trained_jobs(first)) == 8
    assert first.estimate() == ""
    names = {f"{v}.{run}.json" for v in ("rwkv1", "mha") for run in ("tuning-0", "tuning-1", "seed-1", "seed-2")}
    assert {p.name for p in kept.iterdir()} == names | {"rwkv1.memory.json", "mha.memory.json"}
    assert all(p.stat().st_size < 2000 for p in kept.iterdir())
    table = write_report(first).to_json()

    again = Comparison(experiment, tmp_path / "two", results=kept)
    assert trained_jobs(again) == []
    assert write_report(again).to_json() == table
    assert not (tmp_path / "two/loss.png").exists()
    assert (tmp_path / "two/position.png").exists()

    (kept / "mha.seed-2.json").unlink()
    third = Comparison(experiment, tmp_path / "three", results=kept)
    assert trained_jobs(third) == ["mha seed 2"]
    assert (kept / "mha.seed-2.json").exists()


def test_the_results_of_another_comparison_are_reused_without_its_run_folders(tmp_path, unmeasured):
    experiment, kept = small(write_text_file(tmp_path), by_position=True), tmp_path / "kept"
    finish(Comparison(experiment, tmp_path / "one", results=kept / "one"))
    (kept / "one/notes.json").write_text("[")
    third = Variant("third", {"model": {"arch": "rwkv1", "ffn": {"activation": "relu2"}}})
    wider = replace(experiment, variants=(*experiment.variants[1:], third), verdicts=())
    assert len(trained_jobs(Comparison(wider, tmp_path / "two", reuse=kept))) == 8
    some = Comparison(wider, tmp_path / "three", results=kept / "three", reuse=kept)
    finish(some)
    assert not list((tmp_path / "three/variants/mha").glob("seed-*/config.toml"))
    assert list((tmp_path / "three/variants/third").glob("seed-*/config.toml"))
    write_report(some)
    # The files name no folder of the machine.
    assert not any('taken_from": "' in p.read_text() for p in (kept / "three").iterdir())
    for path in (kept / "one").glob("mha.*.json"):
        assert (kept / "three" / path.name).read_bytes() == path.read_bytes()


def test_results_of_other_settings_are_refused(tmp_path, unmeasured):
    experiment, kept = small(write_text_file(tmp_path)), tmp_path / "kept"
    finish(Comparison(experiment, tmp_path / "one", results=kept))
    wider = replace(experiment, base=experiment.base | {"model": BASE["model"] | {"channels": 24}})
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    for other in (wider, replace(wider, tune={})):
        with pytest.raises(FileError, match="has the result of .* with other settings or another text; choose another"):
            Comparison(other, tmp_path / f"other {len(other.tune)}", results=kept)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    # Without the tuning runs, the files of the seeds alone are of another experiment.
    for path in kept.glob("*.tuning-*.json"):
        path.unlink()
    with pytest.raises(FileError, match="has the result of rwkv1 seed 1 with other settings or another text"):
        Comparison(wider, tmp_path / "seeds", results=kept)
    assert trained_jobs(Comparison(replace(experiment, seeds=(1, 2, 3)), tmp_path / "more", results=kept))


def test_a_measurement_of_other_settings_is_refused(tmp_path, monkeypatch):
    measured = StepSpeed(0.25, 64.0, 1024.0)
    monkeypatch.setattr("timemix.experiments.measurements.measure_training", lambda config, steps: measured)
    text, kept = write_text_file(tmp_path), tmp_path / "kept"
    experiment = small(text, tokens=None, seconds=1.5, tune={})
    for name in ("one", "two"):
        comparison = Comparison(experiment, tmp_path / name, results=kept)
        assert comparison.config(comparison.seed_jobs(experiment.variants[0])[0]).train.steps == 6
        assert comparison.memory(experiment.variants[0]) == 1024
        # A later measurement would give other steps.
        measured = StepSpeed(0.5, 32.0, 2048.0)
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    wider = replace(experiment, base=experiment.base | {"model": BASE["model"] | {"channels": 24}})
    bytes_ = replace(experiment, base=experiment.base | {"data": experiment.base["data"] | {"tokenizer": "byte"}})
    for number, other in enumerate((replace(experiment, seconds=3.0), wider, bytes_)):
        with pytest.raises(FileError, match="has the measurement of other settings; remove it to measure again"):
            Comparison(other, tmp_path / f"other {number}", results=kept)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    # Settings that change no step, such as the interval of validations, may differ.
    rarer = replace(experiment, base=experiment.base | {"train": BASE["train"] | {"valid_every": 3}})
    assert Comparison(rarer, tmp_path / "rarer", results=kept).memory(experiment.variants[0]) == 1024


def test_results_of_an_earlier_call_are_copied(tmp_path, unmeasured):
    experiment, kept = small(write_text_file(tmp_path), tune={}), tmp_path / "kept"
    finish(Comparison(experiment, tmp_path / "out"))
    assert trained_jobs(Comparison(experiment, tmp_path / "out", results=kept)) == []
    assert {p.name for p in kept.iterdir()} == {f"{v}.seed-{n}.json" for v in ("rwkv1", "mha") for n in (1, 2)}


def test_a_diverged_run_is_kept_as_a_result(tmp_path, unmeasured):
    experiment = small(write_text_file(tmp_path), tune={}, base=BASE | {"train": BASE["train"] | {"lr": 1e30}})
    kept = tmp_path / "kept"
    assert trained_jobs(Comparison(experiment, tmp_path / "one", results=kept))
    assert "diverged" in (kept / "rwkv1.seed-1.json").read_text()
    assert trained_jobs(Comparison(experiment, tmp_path / "two", results=kept)) == []


def test_a_damaged_result_is_named(tmp_path, unmeasured):
    experiment, kept = small(write_text_file(tmp_path), tune={}), tmp_path / "kept"
    kept.mkdir()
    (kept / "rwkv1.seed-1.json").write_text('{"steps": "many"}')
    with pytest.raises(DamagedFile, match=r"rwkv1.seed-1.json is damaged; remove it to run rwkv1 seed 1 again"):
        finish(Comparison(experiment, tmp_path / "out", results=kept))


def test_a_copy_with_bytes_that_are_no_text_is_written_again(tmp_path):
    job = Job(SimpleNamespace(name="a"), 1, False)
    files = ResultFiles(tmp_path / "out", tmp_path)
    (tmp_path / "a.seed-1.json").write_bytes(b"\xff")
    files.copy(job, Failure("the loss diverged", diverged=True))
    assert files.read(job) == Failure("the loss diverged", diverged=True)
