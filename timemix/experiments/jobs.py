"""The jobs of a comparison, one run per job: their run folders, and the JSON files with their results."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from timemix.config.run import RunConfig, read_toml, to_toml
from timemix.data.corpus import Corpus
from timemix.errors import DamagedFile, FileError, MissingFile
from timemix.experiments.variants import Variant
from timemix.storage.files import write_text
from timemix.storage.json_files import OPTIONAL, Count, Misfit, read_json, to_json, to_record
from timemix.training.start import new_run, resolved, resume_run
from timemix.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Result:
    """Content of result.json after a successful job. Losses are in nats per token."""

    steps: Count
    """Number of training steps."""
    tokens: Count
    """Number of training tokens."""
    seconds: float
    """Training time in seconds, without validation and saving."""
    tokens_per_second: float
    parameters: Count
    """Number of parameters."""
    train_loss: float
    """Mean training loss over the last tenth of the logged losses."""
    valid_loss: float
    """Last held-out loss; in a tuning run, last loss on the end of the training text."""
    valid_at: dict[str, float]
    """Losses like `valid_loss`, by step."""
    by_position: tuple[float, ...] | None = field(default=None, metadata=OPTIONAL)
    """Held-out loss by position in the window, None unless the experiment sets `by_position`."""
    key: str | None = field(default=None, metadata=OPTIONAL)
    """Hash that identifies the run."""
    precision: str | None = field(default=None, metadata=OPTIONAL)
    """Precision of matrix products, None in a result of an earlier version."""
    taken_from: str | None = field(default=None, metadata=OPTIONAL)
    """Original run folder of a run that was copied from another comparison, None for a trained run."""


@dataclass(frozen=True)
class Failure:
    """Content of result.json after a failed job."""

    error: str
    """Error message."""
    diverged: bool | None = field(default=None, metadata=OPTIONAL)
    """Whether the loss diverged. A job with a diverged loss is not repeated, because the loss would diverge again."""
    call: str | None = field(default=None, metadata=OPTIONAL)
    """Name of the call of `timemix compare` that ran the job."""
    key: str | None = field(default=None, metadata=OPTIONAL)
    """Hash that identifies the run."""


@dataclass(frozen=True)
class Job:
    """One training run of a comparison."""

    variant: Variant
    number: int
    """Number of the tuning point in a tuning run, otherwise the seed."""
    tuning: bool
    """Whether the job is a tuning run."""

    @property
    def name(self) -> str:
        """Name for messages, such as "rwkv1 seed 2"."""
        return f"{self.variant.name} {'tuning' if self.tuning else 'seed'} {self.number}"


def read_result(data: dict[str, Any]) -> Result | Failure:
    """Return the content of a result.json as a dataclass.

    Raises:
        Misfit: A field is missing or does not fit.
    """
    return to_record(data, Failure) if "error" in data else to_record(data, Result)


def outcome(job: Job, result: Result | Failure) -> str:
    """Return the loss or the failure of a job as text. A tuning run is validated on the end of the training text."""
    if isinstance(result, Failure):
        return f"failed: {result.error}"
    return f"{'validation' if job.tuning else 'held-out'} loss {result.valid_loss:.4f}"


class ResultFiles:
    """The files with the results of a comparison: in its folder, and copies in a folder that holds nothing else.

    The second folder is small enough for a repository. A comparison in a new folder takes all results from there.

    Args:
        out: Folder of the comparison.
        results: Folder of the copies; None: no copies.
    """

    def __init__(self, out: Path, results: Path | None) -> None:
        self.out, self.results = out, results

    def folder(self, job: Job) -> Path:
        """Return the run folder of a job."""
        return self.out / "variants" / job.variant.name / f"{'tuning' if job.tuning else 'seed'}-{job.number}"

    def read(self, job: Job) -> Result | Failure | None:
        """Return the result or the failure of a job, None for an unfinished job.

        Raises:
            DamagedFile: The file is damaged.
        """
        # Another process may remove the folder between a test of its existence and the reading.
        with contextlib.suppress(MissingFile):
            return self._read(self.folder(job) / "result.json", job)
        return self.kept(job)

    def kept(self, job: Job) -> Result | Failure | None:
        """Return the copy of a result; None without a copy.

        Raises:
            DamagedFile: The file is damaged.
        """
        path = None if self.results is None else self._copy(self.results, job)
        return self._read(path, job) if path is not None and path.exists() else None

    def _read(self, path: Path, job: Job) -> Result | Failure:
        try:
            return read_result(read_json(path))
        except (Misfit, DamagedFile):
            raise DamagedFile(f"{path} is damaged; remove it to run {job.name} again") from None

    def write(self, job: Job, result: Result | Failure) -> None:
        """Write the result or the failure of a job to its run folder, and a copy of a final result."""
        write_text(self.folder(job) / "result.json", json.dumps(to_json(result)))
        self.copy(job, result)

    def copy(self, job: Job, result: Result | Failure) -> None:
        """Write the copy of a result, unless the copy exists or the job may run again."""
        if self.results is not None and (isinstance(result, Result) or result.diverged):
            # The run folder of a copied run exists on this machine only.
            plain = replace(result, taken_from=None) if isinstance(result, Result) else result
            path = self._copy(self.results, job)
            # An equal copy of a later version may have further fields, which must stay.
            with contextlib.suppress(FileError, Misfit):
                if read_result(read_json(path)) == plain:
                    return
            write_text(path, json.dumps(to_json(plain)) + "\n")

    def of_other_comparisons(self, reuse: Path) -> Iterator[tuple[Path, Result]]:
        """Yield the finished runs of other comparisons.

        Args:
            reuse: Folder of the comparisons, or of their result folders.

        Yields:
            Run folder and result of each run. If this comparison has a result folder, also the result file and the
            result of each run that has only a file.
        """
        folders = sorted(reuse.glob("*/variants/*/*/result.json"))
        found = [(path.parent, path) for path in folders if not path.resolve().is_relative_to(self.out.resolve())]
        if self.results is not None:
            found += [(path, path) for path in sorted(reuse.glob("*/*.json"))]
        for place, path in found:
            try:
                result = read_result(read_json(path))
            except (FileError, Misfit):
                continue
            if isinstance(result, Result):
                yield place, result

    def measurement(self, variant: Variant, name: str) -> Path:
        """Return the path of a measurement of a variant, such as "memory"."""
        if self.results is not None:
            return self.results / f"{variant.name}.{name}.json"
        return self.out / "variants" / variant.name / f"{name}.json"

    def _copy(self, results: Path, job: Job) -> Path:
        return results / f"{job.variant.name}.{self.folder(job).name}.json"


def refuse_foreign(out: Path) -> None:
    """Check that a folder in which an experiment begins has no files of something else.

    Args:
        out: An existing folder.

    Raises:
        FileError: The folder has files other than locks.
    """
    if any(not path.name.startswith(".") for path in out.iterdir()):
        raise FileError(f"{out} is not the folder of a comparison, and not empty; choose another folder")


def on_corpus(config: RunConfig, source: Path, corpus: Corpus, device: str) -> RunConfig:
    """Return a run's config with a prepared folder as data source, and with all values that `new_run` would set.

    Args:
        config: Config of the run.
        source: The prepared folder.
        corpus: Tokens of the prepared folder.
        device: PyTorch device.
    """
    data = config.data.with_source(str(source))
    return resolved(replace(config, data=data, train=replace(config.train, device=device)), corpus)


def begin_or_resume(config: RunConfig, folder: Path) -> Trainer:
    """Return a trainer that resumes a run at the newest checkpoint if the configs are equal, or starts a new run.

    The function replaces a folder that has another config, or that a killed process left without a config.

    Args:
        config: Config of the run. Equal configs may differ in the device and in the path of the tokens.
        folder: The run folder.

    Raises:
        TimemixError: The run cannot be created or resumed, for a reason that `new_run` or `resume_run` lists.
    """
    path = folder / "config.toml"
    if path.exists():
        theirs = read_toml(path)
        moved = replace(theirs.data, source=config.data.source, hold_out=config.data.hold_out)
        if replace(theirs, data=moved, train=replace(theirs.train, device=config.train.device)) == config:
            write_text(path, to_toml(config))
            return resume_run(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return new_run(config, folder)
