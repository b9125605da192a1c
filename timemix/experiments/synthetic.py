"""Train every variant on synthetic tasks, and measure the accuracy of its answers at several sizes.

The folder OUT has one small JSON file per run, and table.json, table.md and accuracy.png. A repeated experiment trains
only the runs without a file. Further variants, tasks and seeds therefore extend the results in a folder. Lock files
assign the runs to processes, so any number of processes may work in one folder.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timemix.config.run import RunConfig
from timemix.errors import DamagedFile, FileError, TimemixError
from timemix.evaluation.loss import cross_entropy
from timemix.experiments.jobs import refuse_foreign
from timemix.experiments.spec import TUNING_SEED
from timemix.experiments.synthetic_report import (
    Measured,
    SyntheticTable,
    best_lr,
    build_table,
    draw_table,
    to_markdown,
)
from timemix.experiments.synthetic_spec import TRAINING_FIELDS, Cell, SyntheticExperiment, TaskSetting
from timemix.experiments.synthetic_tasks import IGNORED, TASKS, Batch, held_out_batch, training_batch
from timemix.experiments.variants import Variant
from timemix.models.language_model import LanguageModel, evaluating
from timemix.runtime.device import autocast, choose_device, choose_precision
from timemix.runtime.progress import clock
from timemix.storage.files import write_text
from timemix.storage.json_files import read_json, read_record, to_json
from timemix.storage.locks import claimed
from timemix.storage.settings import to_dict
from timemix.training.optim import begin_step, build_optimizers, learning_rate

TEST_TOKENS = 16384
"""Largest number of tokens of a forward pass in a test."""
TIMED_STEPS = 3
"""Number of training steps of a time estimate."""
SECONDS_BETWEEN_PASSES = 1.0
"""Time to wait for runs of other processes."""


class Runs:
    """The runs of an experiment in a folder.

    Args:
        experiment: The experiment.
        out: Folder of the experiment.
        say: Function that prints a line of text.
        device: PyTorch device.
    """

    def __init__(self, experiment: SyntheticExperiment, out: Path, say: Callable[[str], None], device: str) -> None:
        self.experiment, self.out, self.say, self.device = experiment, out, say, device

    def measured(self, cell: Cell) -> Measured | None:
        """Return the saved result of a run; None if the run is unfinished or its file is damaged.

        Raises:
            FileError: The saved result belongs to a run with other settings.
        """
        path = self.out / f"{cell.name}.json"
        if not path.exists():
            return None
        try:
            found, settings = read_record(path, Measured), read_json(path).get("settings")
        except DamagedFile:
            return None
        if settings != self._settings(cell):
            raise FileError(f"{path} has the result of a run with other settings; choose another folder")
        sizes = set(map(str, cell.task.tests))
        is_whole = found.accuracy.keys() == sizes and all(0 <= share <= 1 for share in found.accuracy.values())
        return found if is_whole else None

    def refuse_results_of_others(self) -> None:
        """Check that all saved results belong to runs of the experiment.

        Raises:
            FileError: A saved result belongs to a run with other settings.
        """
        experiment = self.experiment
        seeds = (TUNING_SEED, *experiment.seeds)
        for run in itertools.product(experiment.tasks, experiment.variants, experiment.lrs, seeds):
            self.measured(Cell(*run))

    def measure(self, cell: Cell) -> Measured | None:
        """Return the result of a run; None if another process trains the run.

        An unfinished run is trained first, and its result saved.
        """
        if found := self.measured(cell):
            return found
        with claimed(self.out / f".{cell.name}.lock") as mine:
            # Another process may have finished the run in the meantime.
            if not mine or (found := self.measured(cell)):
                return found
            path = self.out / f"{cell.name}.json"
            if path.exists():
                self.say(f"{path} is damaged; the run is repeated")
            with _named(cell):
                result = measure_cell(self._config(cell), cell.task, self.experiment.rows)
            data = to_json(result) | {"settings": self._settings(cell)}
            write_text(path, json.dumps(data, indent=1) + "\n")
        words = ", ".join(f"{value:.3f} at {size}" for size, value in result.accuracy.items())
        self.say(f"{cell.name}: accuracy {words} ({result.seconds:.0f} s)")
        return result

    def estimate(self) -> str:
        """Return the number of unfinished runs and their training time in one process as text; "" if none is left.

        The time follows from a few steps of each variant on each task.
        """
        runs, seconds = 0, 0.0
        for task in self.experiment.tasks:
            for variant in self.experiment.variants:
                tuning = [Cell(task, variant, lr, TUNING_SEED) for lr in self._lrs()]
                # The best learning rate is unknown before tuning. All learning rates take equally long.
                unfinished = sum(self.measured(cell) is None for cell in tuning)
                for seed in self.experiment.seeds:
                    cells = [Cell(task, variant, lr, seed) for lr in self.experiment.lrs]
                    unfinished += all(self.measured(cell) is None for cell in cells)
                if unfinished:
                    cell = Cell(task, variant, self.experiment.lrs[0], TUNING_SEED)
                    config = self._config(cell)
                    with _named(cell):
                        step_seconds = _seconds_per_step(config, task)
                    runs += unfinished
                    seconds += unfinished * config.train.steps * step_seconds
        return f"unfinished runs: {runs}, about {clock(seconds)} in one process" if runs else ""

    def finished(self, task: TaskSetting) -> dict[str, dict[int, Measured]] | None:
        """Return the results of a task by variant and seed without training; None if a run is unfinished."""
        found: dict[str, dict[int, Measured]] = {}
        for variant in self.experiment.variants:
            results = self._results(task, variant, self.measured)
            if results is None:
                return None
            found[variant.name] = results
        return found

    def train(self, task: TaskSetting, variant: Variant) -> bool:
        """Tune a variant on a task and train its seeds; return whether no run is left to other processes."""
        return self._results(task, variant, self.measure) is not None

    def _results(
        self, task: TaskSetting, variant: Variant, result_of: Callable[[Cell], Measured | None]
    ) -> dict[int, Measured] | None:
        """Return the result of each seed at the best learning rate; None if a run has no result.

        Args:
            task: The task.
            variant: The variant.
            result_of: Function that returns the result of a run; None without a result.
        """
        tuned = {lr: result_of(Cell(task, variant, lr, TUNING_SEED)) for lr in self._lrs()}
        known = {lr: result for lr, result in tuned.items() if result is not None}
        if len(known) < len(tuned):
            return None
        lr = best_lr(known) if known else self.experiment.lrs[0]
        results = {seed: result_of(Cell(task, variant, lr, seed)) for seed in self.experiment.seeds}
        finished = {seed: result for seed, result in results.items() if result is not None}
        return finished if len(finished) == len(results) else None

    def pass_through(self) -> bool:
        """Train all runs that no other process trains. Return whether all runs are finished."""
        pairs = itertools.product(self.experiment.tasks, self.experiment.variants)
        # Every pair is visited, also after a run that another process trains.
        return min([self.train(task, variant) for task, variant in pairs])

    def _lrs(self) -> tuple[float, ...]:
        return self.experiment.lrs if len(self.experiment.lrs) > 1 else ()

    def _config(self, cell: Cell) -> RunConfig:
        config = self.experiment.config(cell.task, cell.variant, cell.lr, cell.seed)
        return replace(config, train=replace(config.train, device=self.device))

    def _settings(self, cell: Cell) -> dict[str, Any]:
        """Return the settings that determine the result of a run, in JSON types."""
        config = self.experiment.config(cell.task, cell.variant, cell.lr, cell.seed)
        task = {"task": cell.task.kind, "size": cell.task.size, "tests": cell.task.tests, "rows": self.experiment.rows}
        train = {name: getattr(config.train, name) for name in TRAINING_FIELDS}
        model = to_dict(config.model)
        # Omit a setting that a later version added, if its value does not change the run.
        if not model.get("without"):
            model.pop("without", None)
        # Results of earlier versions have no growth, so they are of other runs.
        growth = {} if TASKS[cell.task.kind].running else {"growing_sizes": True}
        settings = task | growth | {"model": model, "train": train}
        found: dict[str, Any] = json.loads(json.dumps(settings))
        return found


def run_synthetic(
    experiment: SyntheticExperiment,
    out: Path,
    say: Callable[[str], None],
    device: str = "auto",
    tasks: tuple[str, ...] | None = None,
) -> SyntheticTable:
    """Train the unfinished runs of an experiment, and write the table and the picture to a folder.

    Args:
        experiment: The experiment.
        out: Folder of the experiment.
        say: Function that prints a line of text.
        device: PyTorch device.
        tasks: Names of the tasks whose runs are trained. Default: all tasks.

    Returns:
        The table of these tasks, and of the other tasks whose runs are all finished.

    Raises:
        InvalidValue: The experiment lacks a task.
        FileError: The folder `out` has another experiment or results of other settings, or a file cannot be written.
        Unavailable: The machine lacks the device.
        TimemixError: A run failed, for example because memory ran out.
    """
    choose_device(device)
    if (path := out / "experiment.json").exists():
        raise FileError(f"{out} has another experiment ({path.name}); choose another folder")
    if out.is_dir() and not any(out.glob("*.lr-*.seed-*.json")):
        refuse_foreign(out)
    runs = Runs(experiment if tasks is None else experiment.only(tasks), out, say, device)
    # The report has all finished tasks, so the results of tasks that are not trained count too.
    Runs(experiment, out, say, device).refuse_results_of_others()
    if words := runs.estimate():
        say(words)
    is_waiting = False
    while not runs.pass_through():
        if not is_waiting:
            say("waiting for other processes, which train the last runs")
            is_waiting = True
        time.sleep(SECONDS_BETWEEN_PASSES)
    table = finished_table(experiment, out)
    write_text(out / "table.json", json.dumps(to_json(table), indent=1) + "\n")
    write_text(out / "table.md", to_markdown(table))
    draw_table(experiment, table, out / "accuracy.png")
    return table


def finished_table(experiment: SyntheticExperiment, out: Path) -> SyntheticTable:
    """Return the table of the tasks whose runs are all finished, without training.

    Args:
        experiment: The experiment.
        out: Folder of the experiment.

    Raises:
        FileError: The folder `out` has results of other settings.
    """
    runs = Runs(experiment, out, say=lambda line: None, device="cpu")
    found = {task.name: runs.finished(task) for task in experiment.tasks}
    return build_table(experiment, {name: results for name, results in found.items() if results is not None})


def measure_cell(config: RunConfig, task: TaskSetting, rows: int) -> Measured:
    """Train a model on a task, and measure its accuracy at each size of the tests.

    Args:
        config: Config of the run.
        task: The task.
        rows: Number of sequences of a test.
    """
    start = time.perf_counter()
    training = Training(config, task)
    losses: list[float] = []
    while len(losses) < config.train.steps and (loss := training.step(len(losses))) is not None:
        losses.append(loss)
    last = losses[-max(1, config.train.steps // 20) :]
    finished = len(losses) == config.train.steps
    accuracy = {str(n): training.accuracy(n, rows) for n in task.tests}
    return Measured(
        accuracy=accuracy,
        loss=sum(last) / len(last) if finished else None,
        lr=config.train.lr,
        parameters=sum(p.numel() for p in training.model.parameters()),
        seconds=round(time.perf_counter() - start, 1),
        precision=training.precision,
    )


class Training:
    """A model and its optimizers, with the recipe of its architecture, in training on a task.

    Args:
        config: Config of the run.
        task: The task.
    """

    def __init__(self, config: RunConfig, task: TaskSetting) -> None:
        self.config, self.size, self.task = config, task.size, TASKS[task.kind]
        self.device, _ = choose_device(config.train.device)
        self.precision, _ = choose_precision(config.train.precision, self.device)
        torch.manual_seed(config.train.seed)
        self.model = LanguageModel(config.model).to(self.device)
        self.recipe = self.model.block.recipe(config.model)
        self.optimizers = build_optimizers(self.model, config.train, self.precision, self.recipe)

    def step(self, step: int, batch: Batch | None = None) -> float | None:
        """Run one optimizer step.

        Args:
            step: Number of the step, counted from 0.
            batch: Inputs and targets. Default: the batch of this step.

        Returns:
            The loss in nats per answer; None if the loss or a gradient is not finite. The weights are then unchanged.
        """
        train = self.config.train
        lr = learning_rate(train, step, self.recipe.warmup_floor)
        begin_step(self.optimizers, lr)
        if batch is None:
            batch = training_batch(self.task, train.batch_size, self.size, train.seed, step, train.steps)
        inputs, targets = self._upload(batch)
        with autocast(self.precision, self.device):
            logits, _ = self.model(inputs)
        loss = cross_entropy(logits, targets)
        self.model.block.training_loss(self.config.model, loss, logits).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip or math.inf)
        if not (math.isfinite(value := loss.item()) and math.isfinite(norm.item())):
            return None
        for optimizer in self.optimizers:
            optimizer.step()
        return value

    @torch.no_grad()
    def accuracy(self, size: int, rows: int) -> float:
        """Return the share of right answers in sequences of one size.

        Args:
            size: Size of the sequences.
            rows: Number of sequences.
        """
        inputs, targets = self._upload(held_out_batch(self.task, rows, size, self.config.train.seed))
        piece = max(1, TEST_TOKENS // inputs.shape[1])
        right = 0
        with evaluating(self.model), autocast(self.precision, self.device):
            for some, answers in zip(inputs.split(piece), targets.split(piece), strict=True):
                right += int((self.model(some)[0].argmax(-1) == answers).sum())
        return right / int((targets != IGNORED).sum())

    def _upload(self, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs, targets = (torch.from_numpy(rows.copy()).to(self.device) for rows in batch)
        return inputs, targets


@contextmanager
def _named(cell: Cell) -> Iterator[None]:
    """Turn a failure of PyTorch, such as a lack of memory, into one sentence that names the run."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = f"{error}".strip() or type(error).__name__
        raise TimemixError(f"the run {cell.name} failed: {reason.splitlines()[0]}") from error


def _seconds_per_step(config: RunConfig, task: TaskSetting) -> float:
    """Measure a few training steps, without the first step, which loads and compiles code."""
    training = Training(config, task)
    # Mean size of the sequences of a run (`training_batch`): (s + 1) / 2 for the largest size s of a step, where s has
    # the mean 3/4 of the largest size of the run.
    size = task.size if training.task.running else max(1, round((0.75 * task.size + 1) / 2))
    batch = training.task.make(np.random.default_rng(0), config.train.batch_size, size)
    training.step(0, batch)
    start = time.perf_counter()
    for step in range(1, TIMED_STEPS + 1):
        training.step(step, batch)
    return (time.perf_counter() - start) / TIMED_STEPS
