"""The function `train`, which trains a model in one call."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timemix.config.presets import preset
from timemix.config.run import BUDGETS, RunConfig, check_budget
from timemix.errors import InvalidValue
from timemix.runs.load import Loaded, load
from timemix.storage.settings import from_dict, to_dict
from timemix.training.hooks import Hook
from timemix.training.progress import Watch
from timemix.training.start import new_run, resume_run


def train(
    config: RunConfig | str | None,
    out: str | Path,
    *,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | str | None = None,
    train: Mapping[str, Any] | None = None,
    resume: bool = False,
    watch: Watch | None = None,
    hook: Hook | None = None,
) -> Loaded:
    """Train a model in one process, and return its best checkpoint.

    `train("cpu-small", "runs/mine", data="text.txt", train={"steps": 500})` does the same as
    `timemix train cpu-small --data text.txt --out runs/mine --train.steps 500`.

    Args:
        config: Name of a preset, or the config of the run. None with `resume`, because the run folder has the config.
        out: Run folder to create, or an existing run folder with `resume`.
        model: Settings of the model that replace settings of the config, such as `{"layers": 2}`.
        data: Settings of the text, or the source alone: a file, folder, glob or prepared folder, "builtin", the name of
            a download such as "tinyshakespeare", or "hf:NAME".
        train: Settings of the training, such as `{"steps": 500}`.
        resume: Whether to continue the run from its newest checkpoint. With `resume`, `train` may change settings, such
            as `{"steps": 1000}` or `{"lr": 1e-3}`.
        watch: Function that is called with a `TrainingProgress` after each step.
        hook: Function that is called with each line of metrics.jsonl, as a dictionary.

    Returns:
        The checkpoint with the lowest validation loss, loaded on the CPU, with the model in eval mode.

    Raises:
        InvalidValue: A setting or the text is not supported.
        AlreadyExists: `out` exists (without `resume`).
        MissingFile: `out` does not exist (with `resume`), or the text does not exist.
        FileError: A file is damaged, in use or cannot be written.
        Unavailable: The machine lacks the device or the memory.
        NotFinite: The loss or a gradient is not finite.
        HookFailed: The hook raised an exception, and `train.hook_errors` is "stop". The newest checkpoint holds the
            last finished step.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP stopped the run. The newest checkpoint holds the last finished step.
    """
    out = Path(out)
    changes = {"model": model, "data": {"source": data} if isinstance(data, str) else data, "train": train}
    if resume:
        if config is not None or model or data:
            raise InvalidValue(
                "config, model and data cannot change when a run is resumed; give None as config, and only settings of"
                " train"
            )
        trainer = resume_run(out, train=train)
    elif config is None:
        raise InvalidValue("config is None; give a preset or a RunConfig, or resume=True")
    else:
        trainer = new_run(_changed(config, changes), out)
    try:
        if not trainer.is_complete:
            trainer.run(watch or (lambda progress: None), [] if hook is None else [hook])
    finally:
        trainer.lock.release()
    return load(out)


def _changed(config: RunConfig | str, changes: dict[str, Mapping[str, Any] | None]) -> RunConfig:
    """Return a config, or the config of a preset, with the given changes of settings."""
    for part, own in changes.items():
        if not isinstance(own, Mapping | None):
            raise InvalidValue(f"{part} is {own!r}; it must be a dictionary of settings")
    if not isinstance(config, str | RunConfig):
        raise InvalidValue(f"config is {config!r}; it must be the name of a preset or a RunConfig")
    given = {part: dict(own) for part, own in changes.items() if own}
    check_budget(given.get("train", {}))
    if isinstance(config, str):
        config = preset(config, given.get("model", {}).get("arch"))
    if not given:
        return config
    tables = to_dict(config)
    for name in BUDGETS if set(BUDGETS) & given.get("train", {}).keys() else ():
        tables["train"].pop(name, None)
    return from_dict(RunConfig, tables | {part: tables[part] | own for part, own in given.items()})
