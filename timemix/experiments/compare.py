"""Compare variants that train on the same batches, each variant at its best point of the tuning grid.

The folder OUT of a comparison has these files:

OUT/experiment.json       the experiment and the hash of its text
OUT/data/N, N-tuning      the tokens; the folder for tuning holds out the end of the training text
OUT/variants/NAME/        the run folders tuning-N and seed-N; a finished run has a result.json
OUT/table.json, table.md, loss.png, report.html

Lock files assign the runs to processes. Any number of processes may work on one comparison, and may be killed.
"""

import itertools
import json
import math
import os
import shutil
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from timemix.config.run import RunConfig
from timemix.data.batches import Batches
from timemix.data.corpus import Corpus
from timemix.data.describe import text_hash
from timemix.errors import FileError, Interrupted, InvalidValue, MissingFile, NotFinite, TimemixError
from timemix.evaluation.loss import counted_by_position, loss_by_position
from timemix.experiments.identity import difference, run_keys
from timemix.experiments.jobs import (
    Failure,
    Job,
    Result,
    ResultFiles,
    begin_or_resume,
    on_corpus,
    outcome,
    refuse_foreign,
)
from timemix.experiments.measurements import StepCost, step_cost, steps_within
from timemix.experiments.spec import TUNING_SEED, Experiment
from timemix.experiments.texts import Texts, common_beginning
from timemix.experiments.variants import Variant
from timemix.runs.metrics import read_metrics
from timemix.runtime.device import choose_device
from timemix.runtime.progress import clock
from timemix.storage.files import write_text
from timemix.storage.json_files import is_number, read_json
from timemix.storage.locks import claimed
from timemix.training.progress import Watch
from timemix.training.trainer import Trainer

Say = Callable[[str], None]
Report = Callable[[Job, Result | Failure], None]
SECONDS_BETWEEN_LOOKS = 0.5


class Comparison:
    """A comparison in its folder, with its finished and its unfinished jobs.

    Args:
        experiment: The experiment.
        out: Folder of the comparison. A new folder is created, and an unfinished comparison is resumed.
        reuse: Folder of other comparisons. Runs with equal config and tokens are copied, not trained again. With
            `results`, `reuse` may also be the folder of the result folders of other comparisons.
        results: Folder with a small JSON file for each finished run. A run with a file is not trained again. Further
            runs add their files.
        device: PyTorch device.

    Attributes:
        prompts: Prompts of the samples. Default: the beginning of the held-out text.

    Raises:
        FileError: `out` has other content or another experiment, the text has changed since `out` was created, or
            `results` has results of other settings.
        InvalidValue: The text is too short, or a vocabulary lacks a character of a prompt.
        MissingFile: The text or `reuse` does not exist.
        Unavailable: The machine lacks the device.
    """

    def __init__(
        self,
        experiment: Experiment,
        out: Path,
        *,
        reuse: Path | None = None,
        results: Path | None = None,
        device: str = "auto",
    ) -> None:
        self.experiment, self.out, self.device = experiment, out, device
        self.files = ResultFiles(out, results)
        self.folder, self.result = self.files.folder, self.files.read
        self._reuse = reuse
        self._call = _call_name()
        self._known_to_have_ended: set[Path] = set()
        self._points = {v.name: experiment.points_of(v) for v in experiment.variants}
        choose_device(device)
        if reuse is not None and not reuse.is_dir():
            raise MissingFile(f"there is no folder {reuse} to reuse runs from; name a folder of comparisons")
        with claimed(out / ".data.lock", wait=True):
            # The order of the batches does not change the tokens.
            configs = {v.name: replace(self._first_config(v).data, order="random") for v in experiment.variants}
            self._check_folder([text_hash(config) for config in dict.fromkeys(configs.values())])
            is_tuned = any(len(points) > 1 for points in self._points.values())
            self._texts = Texts(out / "data", configs, is_tuned=is_tuned)
            self._step_counts = {v.name: self._count_steps(v) for v in experiment.variants}
            experiment.check_steps(self._step_counts)
        corpora = [self.corpus(v) for v in experiment.variants]
        self.prompts = experiment.prompts or (common_beginning(corpora),)
        for corpus, prompt in itertools.product(corpora, self.prompts):
            corpus.tokenizer.encode(prompt)
        for variant in experiment.variants:
            for tuning in {False, len(self._points[variant.name]) > 1}:
                self._check_length(variant, self.corpus(variant, tuning))
        self._refuse_results_of_others()

    def _check_length(self, variant: Variant, corpus: Corpus) -> None:
        config = self._first_config(variant)
        train, ctx_len = config.train, config.model.ctx_len
        Batches(corpus.train, batch_size=train.batch_size, ctx_len=config.window, seed=0, order=config.data.order)
        least = ctx_len + 1 if self.experiment.by_position else 2
        if len(corpus.valid) < least:
            raise InvalidValue(
                f"the held-out text has {len(corpus.valid)} tokens, but variant {variant.name!r} needs {least};"
                " use more text, or a larger data.valid_fraction"
            )
        if self.experiment.by_position and not counted_by_position(corpus.valid, ctx_len).all():
            raise InvalidValue(
                f"variant {variant.name!r}: a position of the window has no counted token in the held-out text; use"
                " more text, or set by_position = false"
            )

    def _first_config(self, variant: Variant) -> RunConfig:
        """Return the config of a variant at its first tuning point, with the first seed."""
        return self.experiment.config(variant, self._points[variant.name][0], self.experiment.seeds[0])

    def _check_folder(self, texts: list[str]) -> None:
        """Check that the folder is that of the experiment with texts of these hashes, or begin the folder."""
        path = self.out / "experiment.json"
        ours = json.loads(json.dumps({"experiment": asdict(self.experiment), "texts": texts}))
        if not path.exists():
            refuse_foreign(self.out)
            write_text(path, json.dumps(ours, indent=1))
            return
        theirs = read_json(path)
        # Titles, labels and verdicts may change later. Settings of the runs may not change.
        if other := difference(theirs.get("experiment"), ours["experiment"]):
            raise FileError(f"{self.out} has another experiment (different: {other}); choose another folder")
        if theirs.get("texts") != texts:
            raise FileError(
                f"the text has changed since {self.out} was created: its hash differs; choose another folder"
            )

    def corpus(self, variant: Variant, tuning: bool = False) -> Corpus:
        """Return the tokens of a variant, for its tuning runs or for its runs with seeds."""
        return self._texts.of(variant, tuning)[1]

    def config(self, job: Job, point: dict[str, Any] | None = None) -> RunConfig:
        """Return the config of a job's run, with the prepared folder as source.

        Args:
            job: The job.
            point: Tuning point of the run. Default: the tuning point of the job.
        """
        seed = TUNING_SEED if job.tuning else job.number
        steps = self._step_counts[job.variant.name]
        config = self.experiment.config(job.variant, self.point(job) if point is None else point, seed, steps)
        source, corpus = self._texts.of(job.variant, job.tuning)
        return on_corpus(config, source, corpus, self.device)

    def point(self, job: Job) -> dict[str, Any]:
        """Return the tuning point of a job, or an empty point if every tuning run failed."""
        return self._points[job.variant.name][job.number] if job.tuning else self.best_point(job.variant) or {}

    def tuning_jobs(self, variant: Variant) -> list[Job]:
        """Return the tuning jobs of a variant, one per tuning point, or no job for a single point."""
        points = self._points[variant.name]
        return [Job(variant, number, True) for number in points] if len(points) > 1 else []

    def seed_jobs(self, variant: Variant) -> list[Job]:
        """Return the jobs of a variant at the best tuning point, one job per seed."""
        return [Job(variant, seed, False) for seed in self.experiment.seeds]

    def good_result(self, job: Job) -> Result | None:
        """Return the result of a job, None for a failed or an unfinished job."""
        result = self.result(job)
        return result if isinstance(result, Result) else None

    def best_point(self, variant: Variant) -> dict[str, Any] | None:
        """Return the tuning point with the lowest loss, None for unfinished tuning or if every run failed."""
        jobs = self.tuning_jobs(variant)
        if not jobs:
            return self._points[variant.name][0]
        results = [self.result(job) for job in jobs]
        if any(r is None for r in results):
            return None
        losses = [r.valid_loss if isinstance(r, Result) else math.inf for r in results]
        return self.point(jobs[int(np.argmin(losses))]) if min(losses) < math.inf else None

    def run(self, watching: Callable[[Job, RunConfig], Any], say: Say) -> None:
        """Run jobs until this process and other processes have finished all jobs.

        The result.json of a failed run records the error. The next call repeats a failed run unless the loss diverged,
        because the loss would diverge again.

        Args:
            watching: Function that returns, for a job and its config, a context manager that yields the `watch` of the
                run.
            say: Function that prints a line of text for each finished job, with an estimate of the time left.

        Raises:
            FileError: A result file is damaged.
            Interrupted: Ctrl-C or SIGTERM interrupts a run. The next call resumes the run.
        """
        jobs = self._jobs()
        for job in jobs:
            if self._ended(job) and (result := self.result(job)) is not None:
                self.files.copy(job, result)
        began, before = time.monotonic(), sum(map(self._ended, jobs))

        def report(job: Job, result: Result | Failure) -> None:
            ended = sum(map(self._ended, jobs))
            # The runs of other processes count too.
            seconds = (time.monotonic() - began) / max(1, ended - before) * (len(jobs) - ended)
            words = f", about {clock(seconds)} left" if seconds else ""
            say(f"{job.name}: {outcome(job, result)} ({ended} of {len(jobs)}{words})")

        is_waiting = False
        while left := [job for job in jobs if not self._ended(job)]:
            if any(self._try(job, watching, report) for job in left if self._ready(job)):
                is_waiting = False
                continue
            if not is_waiting:
                say(f"waiting for other processes, which train the last {len(left)} runs, such as {left[0].name}")
                is_waiting = True
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _refuse_results_of_others(self) -> None:
        """Refuse result files of runs with other settings, which new runs would replace.

        A new best tuning point may replace the result of a run with a seed, so its file may have any tuning point.

        Raises:
            FileError: A file has a result of other settings, or is damaged.
        """
        for job in self._jobs():
            kept = self.files.kept(job)
            if kept is None or kept.key is None:
                continue
            points = [self.point(job)] if job.tuning else self._points[job.variant.name].values()
            if not any(kept.key in self._keys(job, point) for point in points):
                raise FileError(
                    f"{self.files.results} has the result of {job.name} with other settings or another text; choose"
                    " another folder for --results"
                )

    def _jobs(self) -> list[Job]:
        """Return all jobs, tuning runs first."""
        variants = self.experiment.variants
        return [job for jobs_of in (self.tuning_jobs, self.seed_jobs) for v in variants for job in jobs_of(v)]

    def estimate(self) -> str:
        """Return the number of unfinished runs and their training time in one process as text; "" if none is left."""
        left = [job for job in self._jobs() if not self._ended(job)]
        seconds = (self.experiment.seconds or 0) * len(left)
        for job in left if self.experiment.seconds is None else ():
            step_seconds = self._step_cost(job.variant).step_seconds
            if step_seconds is None:
                return f"unfinished runs: {len(left)}"
            seconds += step_seconds * self._first_config(job.variant).train.steps
        return f"unfinished runs: {len(left)}, about {clock(seconds)} in one process" if left else ""

    def _ready(self, job: Job) -> bool:
        return job.tuning or all(self._ended(j) for j in self.tuning_jobs(job.variant))

    def _ended(self, job: Job) -> bool:
        """Return whether a job has a result for its config, a diverged loss, or a failure in this call."""
        if self.folder(job) not in self._known_to_have_ended:
            result = self.result(job)
            if result is None:
                return False
            # If a failed tuning run succeeded in a later call, the best tuning point may have changed.
            same = result.key in self._keys(job) or (result.key is None and (job.tuning or isinstance(result, Failure)))
            if isinstance(result, Failure):
                ended = (bool(result.diverged) and same) or result.call == self._call
            else:
                ended = same and self._whole(result, job)
            if not ended:
                return False
            # Until tuning has ended, the best point may change, and the seeds of another point run again.
            if self._ready(job):
                self._known_to_have_ended.add(self.folder(job))
        return True

    def _whole(self, result: Result, job: Job) -> bool:
        """Return whether a result has all measurements that the experiment needs."""
        return job.tuning or not self.experiment.by_position or result.by_position is not None

    def _keys(self, job: Job, point: dict[str, Any] | None = None) -> list[str]:
        """Return the hashes that identify the run of a job in this version and in earlier versions.

        Args:
            job: The job.
            point: Tuning point of the run. Default: the tuning point of the job.
        """
        return run_keys(self.config(job, point), self.corpus(job.variant, job.tuning))

    def _try(self, job: Job, watching: Callable[[Job, RunConfig], Any], report: Report) -> bool:
        """Run a job that is unfinished and runs in no other process; return whether this call ran the job."""
        folder = self.folder(job)
        with claimed(folder.with_name(f".{folder.name}.lock")) as mine:
            if not mine or self._ended(job):
                return False
            result: Result | Failure
            try:
                result = self._run(job, watching)
            except Interrupted:
                raise
            except (TimemixError, OSError) as error:
                diverged = isinstance(error, NotFinite)
                result = Failure(str(error), diverged, self._call, self._keys(job)[0] if diverged else None)
            except Exception as error:
                traceback.print_exc()
                result = Failure(f"{type(error).__name__}: {error}", call=self._call)
            self.files.write(job, result)
            if job.tuning:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            else:
                # Samples of the earlier model are outdated after a new run.
                folder.with_name("samples.json").unlink(missing_ok=True)
        report(job, result)
        return True

    def _run(self, job: Job, watching: Callable[[Job, RunConfig], Any]) -> Result:
        folder = self.folder(job)
        if not job.tuning and self.best_point(job.variant) is None:
            results = [self.result(j) for j in self.tuning_jobs(job.variant)]
            errors = [result.error for result in results if isinstance(result, Failure)]
            raise TimemixError(f"every tuning run failed: {errors[-1]}")
        config, keys = self.config(job), self._keys(job)
        if (same := self._same_run(keys, job)) is not None:
            copied, result = same
            shutil.rmtree(folder, ignore_errors=True)
            if copied.is_dir():
                # The caller writes result.json last, so an incomplete copy counts as unfinished.
                shutil.copytree(copied, folder, ignore=shutil.ignore_patterns("result.json"))
            return replace(result, taken_from=str(copied))
        trainer = begin_or_resume(config, folder)
        with watching(job, config) as watch:
            return replace(self._train(trainer, watch, job), key=keys[0])

    def _train(self, trainer: Trainer, watch: Watch, job: Job) -> Result:
        trainer.run(watch)
        rows = read_metrics(trainer.out)
        losses = [row["loss"] for row in rows if is_number(row.get("loss"))]
        # `Comparison` rejects a text without held-out tokens.
        assert trainer.validation.loss is not None
        result = Result(
            steps=trainer.step,
            tokens=trainer.tokens,
            seconds=trainer.seconds,
            tokens_per_second=trainer.tokens / trainer.seconds,
            parameters=sum(p.numel() for p in trainer.model.parameters()),
            train_loss=float(np.mean(losses[-max(1, len(losses) // 10) :])),
            valid_loss=trainer.validation.loss,
            precision=trainer.precision,
            valid_at={str(row.get("step")): row["valid_loss"] for row in rows if is_number(row.get("valid_loss"))},
        )
        if self.experiment.by_position and not job.tuning:
            by_position = loss_by_position(trainer.model, trainer.corpus.valid, precision=trainer.precision)
            result = replace(result, by_position=tuple(round(x, 5) for x in by_position.tolist()))
        return result

    def _same_run(self, keys: list[str], job: Job) -> tuple[Path, Result] | None:
        """Find a finished run with the same config and tokens in another comparison in `reuse`.

        Returns:
            Run folder or result file of the run, and its result; None if no run matches.
        """
        if self._reuse is None:
            return None
        for path, result in self.files.of_other_comparisons(self._reuse):
            if result.key in keys and self._whole(result, job):
                return path, result
        return None

    def memory(self, variant: Variant) -> float | None:
        """Return the peak memory of a training step of a variant in bytes, measured only once; None if unavailable."""
        return self._step_cost(variant).peak_memory

    def _step_cost(self, variant: Variant) -> StepCost:
        return step_cost(self._measured_config(variant), self.files.measurement(variant, "memory"))

    def _count_steps(self, variant: Variant) -> int | None:
        """Return the number of steps that fit into a budget of seconds, None for a budget of tokens."""
        seconds = self.experiment.seconds
        if seconds is None:
            return None
        path = self.files.measurement(variant, "budget")
        return steps_within(seconds, self._measured_config(variant), path, variant.name)

    def _measured_config(self, variant: Variant) -> RunConfig:
        """Return the config for measurements of a variant, which are those of the first tuning point."""
        config = self._first_config(variant)
        model = replace(config.model, vocab_size=self.corpus(variant).tokenizer.vocab_size)
        return replace(config, model=model, train=replace(config.train, device=self.device))


def _call_name() -> str:
    """Return a name that all processes of a call share: the run id of torchrun, or a random name without torchrun."""
    if run := os.environ.get("TORCHELASTIC_RUN_ID"):
        return f"{run} {os.getppid()}"
    return uuid.uuid4().hex
