"""Experiments with synthetic tasks: accepted files, training, resumed folders, table and verdicts."""

import json
from dataclasses import replace

import pytest
import torch

from timemix.errors import FileError, InvalidValue, TimemixError
from timemix.experiments import synthetic
from timemix.experiments.spec import find_experiment, read_experiment
from timemix.experiments.synthetic import Training, run_synthetic
from timemix.experiments.synthetic_report import Measured, best_lr, build_table, share_words, to_markdown, warnings
from timemix.experiments.synthetic_spec import SyntheticExperiment, TaskSetting, TaskVerdict
from timemix.experiments.variants import Variant
from timemix.reporting.statistics import mean_interval
from timemix.storage.locks import claimed

EXPERIMENT = SyntheticExperiment(
    title="x",
    variants=(Variant("old", {"model": {"arch": "rwkv1"}}), Variant("new", {"model": {"arch": "rwkv7"}})),
    tasks=(TaskSetting("few", 2, (1, 4), task="recall"), TaskSetting("parity", 8, (8, 16))),
    lrs=(1e-3, 3e-3),
    seeds=(1, 2),
    rows=8,
    base={
        "model": {"layers": 1, "heads": 1, "channels": 16},
        "train": {"steps": 2, "batch_size": 4, "precision": "float32"},
    },
    verdicts=(TaskVerdict("new is better", "new", "old", "parity", 16),),
)


def result(accuracy, loss: float | None = 1.0):
    return Measured({"8": accuracy, "16": accuracy / 2}, loss, 1e-3, 100, 1.0)


@pytest.mark.parametrize("name", ["recall", "state-tracking", "copy"])
def test_the_shipped_experiments_give_all_variants_equal_settings(name):
    experiment = read_experiment(find_experiment(name))
    assert isinstance(experiment, SyntheticExperiment)
    assert len(experiment.seeds) >= 5
    assert len(experiment.lrs) >= 3
    for task in experiment.tasks:
        configs = [experiment.config(task, variant, 1e-3, 1) for variant in experiment.variants]
        assert len({(c.model.channels, c.model.layers, c.model.ctx_len, c.train.steps) for c in configs}) == 1
        assert [c.model.arch for c in configs] == [variant.name for variant in experiment.variants]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": (0, 1)}, "seeds is .0, 1.; give different seeds, each at least 1"),
        ({"lrs": ()}, "lrs is .. and rows is 8; give different lrs, and at least 1 row"),
        ({"tasks": ()}, "give at least one task"),
        ({"lrs": (1e-3, 1.0000001e-3)}, "two runs have the same name, 'few.old.lr-0.001.seed-0'"),
        ({"lrs": (1e-3, -1.0)}, "train.lr is -1.0"),
        ({"base": {"train": {"steps": 0}}}, "train.steps is 0; give a run at least 1 step"),
        ({"base": {"train": {"valid_every": 9}}}, "train.valid_every has no effect on synthetic tasks; leave"),
        ({"base": {"train": {"lr": 5.0}}}, "train.lr has no effect on synthetic tasks; leave train.lr out"),
        ({"base": {"model": {"ctx_len": 64}}}, "model.ctx_len has no effect on synthetic tasks; leave model.ctx_len"),
        ({"base": {"data": {"seed": 9}}}, "data.seed has no effect on synthetic tasks; leave data.seed out"),
        ({"variants": (Variant("old"), Variant("new"))}, "variants 'old' and 'new' have the same settings"),
        ({"verdicts": (TaskVerdict("c", "new", "new", "parity", 8),)}, "compares the variant 'new' with itself"),
        ({"verdicts": (TaskVerdict("c", "new", "old", "parity", 9),)}, "'parity' at the size 9, which no test has"),
    ],
)
def test_wrong_experiments_are_refused(fields, message):
    with pytest.raises(InvalidValue, match=message):
        replace(EXPERIMENT, **fields)


def test_wrong_tasks_are_refused():
    with pytest.raises(InvalidValue, match="unknown task 'party'; did you mean 'parity'"):
        TaskSetting("party", 4, (4,))
    with pytest.raises(InvalidValue, match="sizes from 1 to 128"):
        TaskSetting("recall", 4, (129,))
    with pytest.raises(InvalidValue, match="cannot name a file"):
        TaskSetting("a/b", 4, (4,), task="copy")
    with pytest.raises(InvalidValue, match="^tasks is empty; give at least one of few, parity$"):
        EXPERIMENT.only(())


def test_the_context_covers_the_longest_test():
    for task, length in zip(EXPERIMENT.tasks, (12, 16), strict=True):
        for variant in EXPERIMENT.variants:
            assert EXPERIMENT.config(task, variant, 1e-3, 1).model.ctx_len == length


def test_training_learns_only_where_there_is_an_answer():
    config = EXPERIMENT.config(EXPERIMENT.tasks[0], EXPERIMENT.variants[1], 1e-2, 1)
    config = replace(
        config, model=replace(config.model, vocab_size=160), train=replace(config.train, steps=100, batch_size=16)
    )
    training = Training(config, EXPERIMENT.tasks[0])
    losses = [training.step(step) for step in range(100)]
    # The answers are 32 of 160 tokens: a model that learned the inputs too would stay near log 160 = 5.08.
    assert losses[0] == pytest.approx(5.08, abs=0.3)
    assert sum(losses[-5:]) / 5 < 4
    with torch.no_grad():
        training.model.head.weight.fill_(float("nan"))
    before = training.model.embedding.weight.clone()
    assert training.step(100) is None
    assert torch.equal(training.model.embedding.weight, before)


def test_accuracy_counts_right_answers():
    training = Training(EXPERIMENT.config(EXPERIMENT.tasks[1], EXPERIMENT.variants[0], 1e-3, 1), EXPERIMENT.tasks[1])
    with torch.no_grad():
        training.model.head.weight.zero_()
    # Equal logits choose token 0, and about half of the parities are 0.
    assert 0.4 < training.accuracy(16, 500) < 0.6


def test_a_stopped_experiment_repeats_no_finished_run(monkeypatch, tmp_path):
    calls = []
    measure = synthetic.measure_cell

    def stopped(config, task, rows):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(config)
        return measure(config, task, rows)

    monkeypatch.setattr(synthetic, "measure_cell", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_synthetic(EXPERIMENT, tmp_path, lambda line: None, "cpu")
    saved = {path.name: path.read_bytes() for path in tmp_path.glob("*.seed-*.json")}
    assert len(saved) == 7
    damaged = sorted(saved)[0]
    (tmp_path / damaged).write_bytes(saved[damaged][:50])
    lines = []
    monkeypatch.setattr(synthetic, "measure_cell", measure)
    run_synthetic(EXPERIMENT, tmp_path, lines.append, "cpu")
    assert lines[0] == "unfinished runs: 10, about 0:00 in one process"
    # 2 tasks, 2 variants, 2 learning rates and 2 seeds are 16 runs, of which 6 are finished.
    assert lines.pop(1) == f"{tmp_path / damaged} is damaged; the run is repeated"
    assert len(lines) == 1 + 10
    for name in set(saved) - {damaged}:
        assert (tmp_path / name).read_bytes() == saved[name]
    # A repeated run has the same result.
    again = json.loads((tmp_path / damaged).read_bytes())
    assert again["accuracy"] == json.loads(saved[damaged])["accuracy"]
    lines.clear()
    table = run_synthetic(EXPERIMENT, tmp_path, lines.append, "cpu")
    assert lines == []
    assert json.loads((tmp_path / "table.json").read_text())["tasks"][1]["name"] == "parity"
    assert table.verdicts[0].verdict in ("holds", "undecided", "does not hold")
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    changed = replace(EXPERIMENT, base=EXPERIMENT.base | {"train": EXPERIMENT.base["train"] | {"steps": 3}})
    with pytest.raises(FileError, match="a run with other settings; choose another folder"):
        run_synthetic(changed, tmp_path, lines.append, "cpu")
    # A result of a task that is not trained is refused before the training, also a single result.
    names = sorted(path.name for path in tmp_path.glob("few.*.seed-*.json"))
    for path in tmp_path.glob("*.seed-*.json"):
        if path.name != names[-1]:
            path.unlink()
    with pytest.raises(FileError, match=f"{names[-1]} has the result of a run with other settings"):
        run_synthetic(changed, tmp_path, lines.append, "cpu", ("parity",))
    assert lines == []


def test_the_lowest_loss_chooses_the_learning_rate():
    assert best_lr({1e-3: result(0.5, 2.0), 3e-3: result(0.4, 1.0), 9e-3: result(0.9, None)}) == 3e-3


def test_intervals_over_seeds():
    # mean 0.5, standard deviation 0.1; t with 2 degrees of freedom is 4.3027
    found = mean_interval([0.4, 0.5, 0.6])
    assert found["low"] == pytest.approx(0.5 - 4.3027 * 0.1 / 3**0.5, abs=1e-4)
    assert found["high"] == pytest.approx(0.5 + 4.3027 * 0.1 / 3**0.5, abs=1e-4)
    assert share_words(mean_interval([0.25])) == "0.250"


def test_table_and_verdicts():
    one = replace(EXPERIMENT, tasks=EXPERIMENT.tasks[1:])
    found = {"parity": {"old": {1: result(0.5), 2: result(0.52)}, "new": {1: result(1.0), 2: result(0.98, None)}}}
    table = build_table(one, found)
    assert table.verdicts[0].difference["mean"] == pytest.approx(0.24)
    text = to_markdown(table)
    assert "Trained on up to 8 tokens. Only the second half of the answers of a sequence counts." in text
    assert "| variant | parameters | lr | 8 tokens | 16 tokens | each seed at 8 |" in text
    assert "| a guess | - | - | 0.50 | 0.50 | - |" in text
    assert "| old | 100 | 0.001 | 0.510 (0.383 to 0.637) | 0.255 (0.191 to 0.319) | 0.50, 0.52 |" in text
    # The interval of a share ends at 1.
    assert "| new (1 diverged) | 100 | 0.001 | 0.990 (0.863 to 1.000) |" in text
    assert "- parity: the best lr is at the edge of the grid for old (0.001), new (0.001); widen the grid." in text
    single = build_table(replace(one, seeds=(1,)), {"parity": {n: {1: r[1]} for n, r in found["parity"].items()}})
    assert "means over one seed." in to_markdown(single)
    assert single.verdicts[0].verdict == "undecided"


@pytest.mark.parametrize("accuracy", [{}, {"8": 0.5}, {"8": 7.5, "16": 0.5}])
def test_a_result_without_the_shares_of_its_tests_is_damaged(tmp_path, accuracy):
    one = replace(EXPERIMENT, tasks=EXPERIMENT.tasks[1:], lrs=(1e-3,), seeds=(1,), verdicts=())
    whole = run_synthetic(one, tmp_path, lambda line: None, "cpu")
    path = tmp_path / "parity.old.lr-0.001.seed-1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": accuracy}))
    lines = []
    again = run_synthetic(one, tmp_path, lines.append, "cpu")
    assert f"{path} is damaged; the run is repeated" in lines
    assert again.tasks[0].rows[0].by_seed == whole.tasks[0].rows[0].by_seed


def test_shares_that_differ_equally_with_every_seed_decide_nothing():
    """A difference of one answer is the smallest that a test of 8 sequences can show."""
    one = replace(EXPERIMENT, tasks=EXPERIMENT.tasks[1:])
    found = {name: {seed: result(share) for seed in (1, 2)} for name, share in (("old", 0.75), ("new", 0.9))}
    (judged,) = build_table(one, {"parity": found}).verdicts
    assert judged.verdict == "undecided"
    assert (judged.difference["low"], judged.difference["high"]) == pytest.approx((0.075 - 1 / 8, 0.075 + 1 / 8))
    found["new"] = {seed: result(0.75) for seed in (1, 2)}
    assert "undecided (no difference with any seed)" in to_markdown(build_table(one, {"parity": found}))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "table.md").write_text("my table")
    with pytest.raises(FileError, match="is not the folder of a comparison, and not empty"):
        run_synthetic(EXPERIMENT, tmp_path, lambda line: None, "cpu")


def test_waiting_for_another_process_is_said_once(tmp_path, monkeypatch):
    said, waits = [], []
    lock = claimed(tmp_path / ".parity.new.lr-0.003.seed-0.lock")
    lock.__enter__()

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            lock.__exit__(None, None, None)

    monkeypatch.setattr(synthetic.time, "sleep", wait)
    run_synthetic(EXPERIMENT, tmp_path, said.append, "cpu")
    assert said.count("waiting for other processes, which train the last runs") == 1
    assert len(waits) == 2


def test_a_run_of_another_process_is_left_to_it(tmp_path):
    """The lock of a run that another process trains; a tuning run keeps the runs with seeds of its variant waiting."""
    said: list[str] = []
    runs = synthetic.Runs(EXPERIMENT, tmp_path, said.append, "cpu")
    with claimed(tmp_path / ".parity.new.lr-0.003.seed-0.lock"):
        assert not runs.pass_through()
        assert len(said) == 3 * 4 + 1
        assert runs.finished(EXPERIMENT.tasks[1]) is None
    assert runs.pass_through()
    assert len(said) == 4 * 4
    for task in EXPERIMENT.tasks:
        assert {name: set(seeds) for name, seeds in runs.finished(task).items()} == {"old": {1, 2}, "new": {1, 2}}


def test_the_table_has_all_finished_tasks(tmp_path):
    tables = [run_synthetic(EXPERIMENT, tmp_path, lambda line: None, "cpu", (name,)) for name in ("parity", "few")]
    assert [[task.name for task in table.tasks] for table in tables] == [["parity"], ["few", "parity"]]
    assert [len(table.verdicts) for table in tables] == [1, 1]
    assert tables[1].tasks[1].rows[0].precisions == ["float32"]
    (tmp_path / "experiment.json").write_text("{}")
    with pytest.raises(FileError, match="has another experiment .experiment.json.; choose another folder"):
        run_synthetic(EXPERIMENT, tmp_path, lambda line: None, "cpu")


def test_a_run_that_fails_is_named_in_one_sentence(monkeypatch, tmp_path):
    def fail(config, task, rows=None):
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(synthetic, "measure_cell", fail)
    # Training fails, then the steps of the time estimate, which run first.
    for name in ("measure_cell", "_seconds_per_step"):
        monkeypatch.setattr(synthetic, name, fail)
        with pytest.raises(TimemixError, match=r"^the run few.old.lr-0.001.seed-0 failed: CUDA out of memory.$"):
            run_synthetic(EXPERIMENT, tmp_path, lambda line: None, "cpu")


def test_warnings_of_sizes_and_precisions():
    small, large = (
        replace(result(0.5), parameters=count, precision=p) for count, p in ((100, "float32"), (120, "bfloat16"))
    )
    one = replace(EXPERIMENT, tasks=EXPERIMENT.tasks[1:], lrs=(1e-3,), verdicts=())
    table = build_table(one, {"parity": {"old": {1: small}, "new": {1: large}}})
    assert warnings(table) == [
        "parity: new has 20% more parameters than old.",
        "The runs use different precisions: bfloat16, float32; set train.precision.",
    ]


def test_some_tasks_of_an_experiment():
    few = EXPERIMENT.only(("few",))
    assert [task.name for task in few.tasks] == ["few"]
    assert few.verdicts == ()
    assert EXPERIMENT.only(("parity", "few")).verdicts == EXPERIMENT.verdicts
    with pytest.raises(InvalidValue, match="the experiment has no task 'party'; did you mean 'parity'"):
        EXPERIMENT.only(("party",))
