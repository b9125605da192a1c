"""Comparisons: variants trained on the same batches, each at its best learning rate, and what they reached.

OUT/experiment.json       the experiment and the hash of its text
OUT/data/N, N-tuning      tokens; the second holds out the end of the training text
OUT/variants/NAME/        tuning-N and seed-N: run folders, each with a result.json when it has ended
OUT/table.json, table.md, loss.png, report.html

Work is claimed by lock files, so any number of processes may run one comparison, and any of them may be killed.
"""

import itertools
import json
import math
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from timemix.checkpoint import load, read_json
from timemix.config import DataConfig, RunConfig, to_dict
from timemix.data import Corpus, hold_out_end, is_corpus, open_corpus, prepare, text_hash
from timemix.errors import UserError
from timemix.evaluate import loss_by_position
from timemix.experiments.experiment import TUNING_SEED, Experiment, Variant
from timemix.experiments.measure import measure_training
from timemix.experiments.plot import read_metrics
from timemix.files import claimed, write_text
from timemix.precision import choose_device
from timemix.train import Interrupted, Trainer, Watch, new_run, resume_run

Say = Callable[[str], None]
SECONDS_BETWEEN_LOOKS = 0.5
PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    variant: Variant
    number: int
    """Of the tuning point, or the seed."""
    tuning: bool

    @property
    def name(self) -> str:
        return f"{self.variant.name} {'tuning' if self.tuning else 'seed'} {self.number}"


class Comparison:
    """The folder of a comparison and what is left to do in it.

    `prompts`: those of the experiment, or the beginning of the held-out text.

    Raises UserError when the folder holds something else, the text changed since it was begun, or the vocabulary lacks
    a character of a prompt.
    """

    def __init__(self, experiment: Experiment, out: Path, *, reuse: Path | None = None, device: str = "auto") -> None:
        self.experiment, self.out, self.device = experiment, out, device
        self._reuse = reuse
        self._began = time.time()
        self._points = experiment.tuning_points()
        with claimed(out / ".data.lock", wait=True):
            self._check_folder()
            self._corpora = {data: self._corpus(i, data) for i, data in enumerate(self._data_configs())}
        corpora = [corpus for _, corpus in (pair[False] for pair in self._corpora.values())]
        self.prompts = experiment.prompts or (corpora[0].tokenizer.decode(corpora[0].valid[:PROMPT_TOKENS]),)
        for corpus, prompt in itertools.product(corpora, experiment.prompts):
            corpus.tokenizer.encode(prompt)

    def _data_configs(self) -> list[DataConfig]:
        first = [self.experiment.config(v, self._points[0], self.experiment.seeds[0]) for v in self.experiment.variants]
        # Only what decides the tokens; the order of batches does not.
        return list(dict.fromkeys(replace(config.data, order="random") for config in first))

    def _check_folder(self) -> None:
        path = self.out / "experiment.json"
        texts = [text_hash(data) for data in self._data_configs()]
        ours = json.loads(json.dumps({"experiment": asdict(self.experiment), "texts": texts}))
        # Words and verdicts may be mended later; what a run is may not.
        if not path.exists():
            if any(not p.name.startswith(".") for p in self.out.iterdir()):
                raise UserError(f"{self.out} is no comparison's folder and not empty; choose another --out")
            write_text(path, json.dumps(ours, indent=1))
            return
        theirs = read_json(path)
        if other := _difference(theirs.get("experiment"), ours["experiment"]):
            raise UserError(f"{self.out} holds another experiment (different: {other}); choose another --out")
        if theirs.get("texts") != texts:
            raise UserError(f"the text changed since {self.out} was begun: its hash differs; choose another --out")

    def _corpus(self, number: int, config: DataConfig) -> dict[bool, tuple[Path, Corpus]]:
        """Prepared folder and tokens, for the seeds (False) and for tuning (True)."""
        source = Path(config.source)
        if is_corpus(source):
            whole, corpus = source.resolve(), open_corpus(source)
        else:
            whole = (self.out / "data" / str(number)).resolve()
            corpus = open_corpus(whole) if is_corpus(whole) else prepare(whole, config, progress=True)
        tuning = (self.out / "data" / f"{number}-tuning").resolve()
        held_out = (
            open_corpus(tuning)
            if is_corpus(tuning)
            else hold_out_end(corpus, tuning, valid_tokens=config.valid_tokens or len(corpus.valid))
        )
        return {False: (whole, corpus), True: (tuning, held_out)}

    def tokenizer_hash(self, variant: Variant) -> str:
        """What identifies the tokens that a variant's losses are per."""
        config = self.experiment.config(variant, self._points[0], self.experiment.seeds[0])
        return self._corpora[replace(config.data, order="random")][False][1].tokenizer.hash

    def folder(self, job: Job) -> Path:
        return self.out / "variants" / job.variant.name / f"{'tuning' if job.tuning else 'seed'}-{job.number}"

    def config(self, job: Job) -> RunConfig:
        """The run of a job, its tokens in a prepared folder."""
        point = self.point(job)
        seed = TUNING_SEED if job.tuning else job.number
        config = self.experiment.config(job.variant, point, seed, self._steps(job.variant))
        source, _ = self._corpora[replace(config.data, order="random")][job.tuning]
        # The prepared folder holds what the other fields of `data` decide.
        data = DataConfig(source=str(source), order=config.data.order)
        return replace(config, data=data, train=replace(config.train, device=self.device))

    def point(self, job: Job) -> dict[str, Any]:
        """Tuning point of a job; empty where every tuning run failed."""
        return self._points[job.number] if job.tuning else self.best_point(job.variant) or {}

    def tuning_jobs(self, variant: Variant) -> list[Job]:
        return [Job(variant, i, True) for i in range(len(self._points))] if len(self._points) > 1 else []

    def seed_jobs(self, variant: Variant) -> list[Job]:
        return [Job(variant, seed, False) for seed in self.experiment.seeds]

    def result(self, job: Job) -> dict[str, Any] | None:
        """What a job reached, `{"error": ...}` where it failed, None where it has not ended."""
        path = self.folder(job) / "result.json"
        return read_json(path) if path.exists() else None

    def best_point(self, variant: Variant) -> dict[str, Any] | None:
        """The tuning point of the lowest held-out loss, None where tuning is not complete or every run failed."""
        jobs = self.tuning_jobs(variant)
        if not jobs:
            return self._points[0]
        results = [self.result(job) for job in jobs]
        if any(r is None for r in results):
            return None
        losses = [(r or {}).get("valid_loss", math.inf) for r in results]
        return self._points[int(np.argmin(losses))] if min(losses) < math.inf else None

    def run(self, watching: Callable[[Job, RunConfig], Any], say: Say) -> None:
        """Runs what no other process runs, until every job has ended, here or elsewhere.

        A run that fails is noted in its result.json and tried again by the next call. Raises Interrupted on Ctrl-C
        or SIGTERM; the next call goes on from there.
        """
        jobs = [job for v in self.experiment.variants for job in self.tuning_jobs(v)]
        jobs += [job for v in self.experiment.variants for job in self.seed_jobs(v)]
        while left := [job for job in jobs if not self._ended(job)]:
            if not any(self._try(job, watching, say, len(jobs)) for job in left if self._ready(job)):
                time.sleep(SECONDS_BETWEEN_LOOKS)

    def _ready(self, job: Job) -> bool:
        return job.tuning or all(self._ended(j) for j in self.tuning_jobs(job.variant))

    def _ended(self, job: Job) -> bool:
        path = self.folder(job) / "result.json"
        if not path.exists():
            return False
        return "error" not in read_json(path) or path.stat().st_mtime >= self._began

    def _try(self, job: Job, watching: Callable[[Job, RunConfig], Any], say: Say, of: int) -> bool:
        """Runs a job unless another process does or did; whether it ran."""
        folder = self.folder(job)
        with claimed(folder.with_name(f".{folder.name}.lock")) as mine:
            if not mine or self._ended(job):
                return False
            try:
                result = self._run(job, watching)
            except Interrupted:
                raise
            except UserError as error:
                result = {"error": str(error)}
            except Exception as error:
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"}
            write_text(folder / "result.json", json.dumps(result))
            if job.tuning:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        ended = sum(self._ended(j) for v in self.experiment.variants for j in self.tuning_jobs(v) + self.seed_jobs(v))
        told = f"failed: {result['error']}" if "error" in result else f"held-out loss {result['valid_loss']:.4f}"
        say(f"{job.name}: {told} ({ended} of {of})")
        return True

    def _run(self, job: Job, watching: Callable[[Job, RunConfig], Any]) -> dict[str, Any]:
        folder = self.folder(job)
        if not job.tuning and self.best_point(job.variant) is None:
            errors = [r["error"] for j in self.tuning_jobs(job.variant) if (r := self.result(j)) and "error" in r]
            raise UserError(f"every tuning run failed: {errors[-1]}")
        config = self.config(job)
        _, corpus = self._corpora_of(config)
        key = _key(config, corpus)
        if (same := self._same_run(key)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(same, folder)
            return read_json(folder / "result.json") | {"taken_from": str(same)}
        if (folder / "config.toml").exists():
            trainer = resume_run(folder)
        else:
            # A process killed while it made the folder left no config.
            shutil.rmtree(folder, ignore_errors=True)
            trainer = new_run(config, folder)
        with watching(job, config) as watch:
            return self._train(trainer, watch) | {"key": key}

    def _corpora_of(self, config: RunConfig) -> tuple[Path, Corpus]:
        return next(
            pair for both in self._corpora.values() for pair in both.values() if str(pair[0]) == config.data.source
        )

    def _train(self, trainer: Trainer, watch: Watch) -> dict[str, Any]:
        trainer.run(watch)
        rows = read_metrics(trainer.out)
        losses = [row["loss"] for row in rows if "loss" in row]
        result: dict[str, Any] = {
            "steps": trainer.step,
            "tokens": trainer.tokens,
            "seconds": trainer.seconds,
            "tokens_per_second": trainer.tokens / trainer.seconds,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "train_loss": float(np.mean(losses[-max(1, len(losses) // 10) :])),
            "valid_loss": trainer.valid_loss,
            "valid_at": {str(row["step"]): row["valid_loss"] for row in rows if "valid_loss" in row},
        }
        if self.experiment.by_position:
            by_position = loss_by_position(trainer.model, trainer.corpus.valid, precision=trainer.precision)
            result["by_position"] = [round(x, 5) for x in by_position.tolist()]
        return result

    def _same_run(self, key: str) -> Path | None:
        """A finished run of another comparison under `reuse` with the same config and tokens."""
        if self._reuse is None:
            return None
        for path in sorted(self._reuse.glob("*/variants/*/*/result.json")):
            if path.is_relative_to(self.out):
                continue
            result = read_json(path)
            if result.get("key") == key and ("by_position" in result or not self.experiment.by_position):
                return path.parent
        return None

    def _steps(self, variant: Variant) -> int | None:
        """Steps that fit into a budget of seconds, measured once per variant; None for a budget of tokens."""
        seconds = self.experiment.seconds
        if seconds is None:
            return None
        path = self.out / "variants" / variant.name / "budget.json"
        with claimed(path.with_name(".budget.lock"), wait=True):
            if not path.exists():
                config = self.experiment.config(variant, self._points[0], self.experiment.seeds[0])
                (_, corpus) = self._corpora[replace(config.data, order="random")][False]
                model = replace(config.model, vocab_size=corpus.tokenizer.vocab_size)
                measured = measure_training(replace(config, model=model), steps=20)
                if "error" in measured:
                    raise UserError(measured["error"])
                steps = max(1, int(seconds / measured["step_seconds"]))
                write_text(path, json.dumps({"steps": steps, "step_seconds": measured["step_seconds"]}))
            return int(read_json(path)["steps"])

    def memory(self, variant: Variant) -> int | None:
        """Peak memory in bytes of a training step of a variant, measured once."""
        path = self.out / "variants" / variant.name / "memory.json"
        if not path.exists():
            run = next((self.folder(j) for j in self.seed_jobs(variant) if "error" not in (self.result(j) or {})), None)
            measured = {} if run is None else measure_training(load(run).config, steps=1)
            write_text(path, json.dumps(measured))
        return read_json(path).get("peak_memory")

    def samples(self, variant: Variant, tokens: int = 200) -> dict[str, str]:
        """What the first seed's model writes after each prompt."""
        from timemix.generation import generate
        from timemix.sampling import Sampler

        job = self.seed_jobs(variant)[0]
        if "error" in (self.result(job) or {"error": ""}):
            return {}
        path = self.out / "variants" / variant.name / "samples.json"
        if not path.exists() or list(read_json(path)) != list(self.prompts):
            loaded = load(self.folder(job), device=str(choose_device(self.device)[0]))
            sampler = Sampler(top_a=0.02)
            texts = {p: generate(loaded, p, tokens=tokens, sampler=sampler)[0] for p in self.prompts}
            write_text(path, json.dumps(texts))
        return read_json(path)


def _key(config: RunConfig, corpus: Corpus) -> str:
    """Identifies what a run computes: its config and tokens, not where they lie or what device is used."""
    info = corpus.info
    hashes = [info["train"]["sha256"], info["valid"]["sha256"], info["tokenizer"]["sha256"]]
    plain = replace(config, data=replace(config.data, source=""), train=replace(config.train, device=""))
    return sha256(json.dumps([to_dict(plain), hashes], sort_keys=True).encode()).hexdigest()


def _difference(theirs: Any, ours: dict[str, Any]) -> str:
    """Names of the fields that decide a run and differ; empty where none does."""
    if not isinstance(theirs, dict):
        return "damaged"
    differ = [n for n in ("tokens", "seconds", "seeds", "preset", "tune") if theirs.get(n) != ours[n]]
    if _without_source(theirs.get("base")) != _without_source(ours["base"]):
        differ.append("base")
    if [(v["name"], v["set"]) for v in theirs.get("variants", [])] != [(v["name"], v["set"]) for v in ours["variants"]]:
        differ.append("variants")
    return ", ".join(differ)


def _without_source(base: Any) -> Any:
    """What decides a run but the place of its text, which is known by its hash."""
    data = {k: v for k, v in base.get("data", {}).items() if k not in ("source", "valid")}
    return {k: v for k, v in base.items() if k != "data"} | ({"data": data} if data else {})
