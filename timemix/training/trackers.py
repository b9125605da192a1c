"""Trackers: they send metrics, settings and samples of a run to wandb, trackio or MLflow, or write metrics.csv.

tracking.json in the run folder holds the id of the run in each service, so that a resumed run continues its record.
"""

import csv
import importlib
import io
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from timemix.config.run import RunConfig, to_toml
from timemix.errors import DamagedFile, InvalidValue, TimemixError, Unavailable
from timemix.runs.metrics import Line, read_metrics
from timemix.storage.files import append, atomic_file, write_text
from timemix.storage.json_files import Misfit, read_json, to_record
from timemix.storage.settings import to_dict
from timemix.training.failures import first_line
from timemix.training.hooks import Tracker
from timemix.training.progress import Sample

DEFAULT_PROJECT = "timemix"

COLUMNS = (
    "step",
    "tokens",
    "seconds",
    "loss",
    "valid_loss",
    "valid_bits_per_byte",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "peak_share",
    "memory",
)
"""Columns of metrics.csv."""

LONGEST_PARAMETER = 500
"""Largest number of characters of a parameter in MLflow. config.toml, an artifact, has the whole values."""


@dataclass(frozen=True)
class Record:
    """A run in a tracking service, as stored in tracking.json."""

    project: str
    id: str


class _WithTables(Tracker):
    """Tracker of a service with the interface of wandb, in which samples are a table.

    Args:
        service: Module of the service.
        run: Run that `service.init` returned.
        id: Id of the run in the service.
    """

    def __init__(self, service: Any, run: Any, id: str) -> None:
        self._service, self._run, self.id = service, run, id

    def __call__(self, line: Line) -> None:
        self._run.log(_numbers(line), step=line["step"])

    def samples(self, samples: Sequence[Sample]) -> None:
        table = self._service.Table(columns=["step", "prompt", "text"], data=_rows(samples))
        self._run.log({"samples": table}, step=samples[0].step)


class Wandb(_WithTables):
    """Tracker that logs to Weights & Biases.

    Args:
        wandb: The module `wandb`.
        out: Run folder.
        config: Config of the run.
        project: Project of the service.
        id: Id of the run in the service; None starts a new run.

    Attributes:
        id: Id of the run in the service.
    """

    label = "wandb"

    def __init__(self, wandb: Any, out: Path, config: RunConfig, project: str, id: str | None) -> None:
        run = wandb.init(
            project=project,
            name=out.resolve().name,
            id=id,
            resume=None if id is None else "allow",
            dir=os.environ.get("WANDB_DIR", str(out)),
            config=to_dict(config),
            # A resumed run may have changed settings.
            allow_val_change=True,
        )
        super().__init__(wandb, run, str(run.id))

    def close(self, *, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


class Trackio(_WithTables):
    """Tracker that logs to trackio. The name of the run there is its id, because trackio resumes runs by their name.

    Args:
        trackio: The module `trackio`.
        out: Run folder.
        config: Config of the run.
        project: Project of the service.
        id: Name of the run in the service; None starts a new run.

    Attributes:
        id: Name of the run in the service.
    """

    label = "trackio"

    def __init__(self, trackio: Any, out: Path, config: RunConfig, project: str, id: str | None) -> None:
        name = id or f"{out.resolve().name}-{secrets.token_hex(4)}"
        # trackio prints to stdout, which belongs to the result of a command.
        with redirect_stdout(sys.stderr):
            run = trackio.init(
                project=project,
                name=name,
                config=to_dict(config),
                resume="never" if id is None else "allow",
                embed=False,
            )
        super().__init__(trackio, run, name)

    def close(self, *, complete: bool) -> None:
        with redirect_stdout(sys.stderr):
            self._service.finish()


class Mlflow(Tracker):
    """Tracker that logs to MLflow.

    Args:
        mlflow: The module `mlflow`.
        out: Run folder.
        config: Config of the run.
        project: Experiment of the service.
        id: Id of the run in the service; None starts a new run.

    Attributes:
        id: Id of the run in the service.
    """

    label = "mlflow"

    def __init__(self, mlflow: Any, out: Path, config: RunConfig, project: str, id: str | None) -> None:
        self._mlflow = mlflow
        if id is None:
            mlflow.set_experiment(project)
            self.id = str(mlflow.start_run(run_name=out.resolve().name).info.run_id)
            mlflow.log_params({name: str(value)[:LONGEST_PARAMETER] for name, value in _flat(to_dict(config)).items()})
        else:
            # MLflow refuses changed parameters, and a resumed run may have changed settings.
            self.id = str(mlflow.start_run(run_id=id).info.run_id)
        mlflow.log_text(to_toml(config), "config.toml")

    def __call__(self, line: Line) -> None:
        self._mlflow.log_metrics(_numbers(line), step=line["step"])

    def samples(self, samples: Sequence[Sample]) -> None:
        text = "".join(f"{sample.heading}\n{sample.text}\n\n" for sample in samples)
        self._mlflow.log_text(text, f"samples/step-{samples[0].step:08d}.txt")

    def close(self, *, complete: bool) -> None:
        self._mlflow.end_run("FINISHED" if complete else "FAILED")


class Csv(Tracker):
    """Tracker that writes metrics.csv in the run folder, with the lines of metrics.jsonl as rows.

    Args:
        out: Run folder. Lines that metrics.jsonl already has become the first rows.
    """

    label = "csv"

    def __init__(self, out: Path) -> None:
        self._path = out / "metrics.csv"
        lines = read_metrics(out) if (out / "metrics.jsonl").exists() else []
        with atomic_file(self._path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(_row(line) for line in lines)
        self._unwritten: list[Line] = []

    def __call__(self, line: Line) -> None:
        self._unwritten.append(line)
        text = io.StringIO(newline="")
        csv.writer(text).writerows(_row(each) for each in self._unwritten)
        append(self._path, text.getvalue().encode())
        self._unwritten = []

    def samples(self, samples: Sequence[Sample]) -> None:
        """Do nothing, because samples.txt holds the texts."""

    def close(self, *, complete: bool) -> None:
        """Do nothing, because each row is already written."""


SERVICES: Mapping[str, Callable[..., Wandb | Trackio | Mlflow]] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}
"""Trackers of services, by name. The name is also the name of the module and of the extra."""


def check_tracker(name: str | None, project: str | None) -> None:
    """Check that a tracker can start with a project, as far as known before a run.

    Args:
        name: Name of a tracker: one of SERVICES, "csv", which needs no package, or None without a tracker.
        project: Project of the service, None for the default.

    Raises:
        InvalidValue: `project` is given without a service.
        Unavailable: The package of the service is not installed.
    """
    if name is not None and name in SERVICES:
        _module(name)
    elif project is not None:
        reason = "has no effect on csv, which is a file; leave it out" if name else "needs --track; name a service"
        raise InvalidValue(f"track_project={project!r} {reason}")


def start_tracker(name: str, out: Path, config: RunConfig, project: str | None = None) -> Tracker:
    """Start the record of a run, or continue the record whose id is in tracking.json.

    Args:
        name: Name of a tracker: one of SERVICES, or "csv".
        out: Run folder.
        config: Config of the run.
        project: Project of the service. Default: the project in tracking.json, else `DEFAULT_PROJECT`. With another
            project than in tracking.json, a new record starts.

    Raises:
        Unavailable: The service does not start.
        FileError: tracking.json or metrics.jsonl is damaged, or a file cannot be written.
    """
    if name == "csv":
        return Csv(out)
    saved = _saved(out / "tracking.json", name)
    project = project or (saved.project if saved else DEFAULT_PROJECT)
    id = saved.id if saved and saved.project == project else None
    try:
        tracker = SERVICES[name](_module(name), out, config, project, id)
    except TimemixError:
        raise
    except (Exception, SystemExit) as error:
        raise Unavailable(
            f"{name} does not start: {type(error).__name__}: {first_line(error)}; correct the cause, or leave --track"
            " out"
        ) from error
    _save(out / "tracking.json", name, Record(project, tracker.id))
    return tracker


def _module(name: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise _missing(name) from error
    # A folder such as ./wandb imports as an empty module.
    if getattr(module, "__file__", None) is None:
        raise _missing(name)
    return module


def _missing(name: str) -> Unavailable:
    return Unavailable(f"{name} is not installed; run: pip install 'timemix[{name}]'")


def _saved(path: Path, name: str) -> Record | None:
    if not path.exists() or name not in (data := read_json(path)):
        return None
    try:
        return to_record(data[name], Record)
    except Misfit as error:
        raise DamagedFile(f"{path} is damaged: {error}; remove it, and a new record starts") from error


def _save(path: Path, name: str, record: Record) -> None:
    data = read_json(path) if path.exists() else {}
    write_text(path, json.dumps(data | {name: asdict(record)}, indent=1) + "\n")


def _numbers(line: Line) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "step" and value is not None}


def _row(line: Line) -> list[Any]:
    return [line.get(name) for name in COLUMNS]


def _rows(samples: Sequence[Sample]) -> list[list[Any]]:
    return [[sample.step, sample.prompt or "", sample.text] for sample in samples]


def _flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
