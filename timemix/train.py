"""Training: one loop for every architecture, from token files to a run folder."""

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from timemix import checkpoint
from timemix.config import RunConfig, TokenizerKind, Unknown, read_toml, to_toml
from timemix.data import Batches, Corpus, is_corpus, open_corpus, open_run_corpus
from timemix.errors import UserError
from timemix.evaluate import cross_entropy, loss_per_token
from timemix.files import cannot_write, write_text
from timemix.info import training_memory
from timemix.models import LanguageModel
from timemix.optim import build_optimizer, learning_rate
from timemix.precision import autocast, choose_device, choose_precision
from timemix.prepare import prepare


@dataclass
class Progress:
    """What a step tells whoever watches: a progress bar, a log, a test."""

    step: int
    steps: int
    tokens: int
    seconds: float
    loss: float
    """Nats per token, of this step."""
    tokens_per_second: float
    """Over the last steps, validation and saving left out."""
    valid_loss: float | None
    """The newest, nats per token."""


Watch = Callable[[Progress], None]


class NotFinite(UserError):
    """A loss or gradient that is not finite: the run would fail in the same way again."""


class Interrupted(Exception):
    """A signal ended the run after its step was saved."""

    def __init__(self, number: int, saved: Path) -> None:
        super().__init__(f"stopped; saved {saved}")
        self.number = number


def new_run(config: RunConfig, out: Path) -> "Trainer":
    """Run folder `out` for a config: prepares its tokens and writes config.toml; nothing is trained yet.

    Raises UserError when `out` exists, the text does not serve, or the machine lacks the memory.
    """
    _refuse_too_large(config)
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{out} exists already; choose another --out, or go on with --resume {out}") from None
    except OSError as error:
        raise UserError(cannot_write(out, error)) from None
    try:
        corpus = _corpus(config, out)
        config = resolved(config, corpus)
        _refuse_too_large(config)
        trainer = Trainer(config, out, corpus)
        write_text(out / "config.toml", to_toml(config))
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return trainer


def resolved(config: RunConfig, corpus: Corpus) -> RunConfig:
    """The config with what the tokens decide: vocabulary and tokenizer, and where a prepared folder lies."""
    made = corpus.tokenizer
    data = replace(config.data, tokenizer=cast(TokenizerKind, made.kind), unknown=cast(Unknown, made.unknown))
    if is_corpus(Path(data.source)):
        data = replace(data, source=str(Path(data.source).resolve()))
    return replace(config, model=replace(config.model, vocab_size=made.vocab_size), data=data)


def _corpus(config: RunConfig, out: Path) -> Corpus:
    """Tokens of a run: a prepared folder where it lies, else the text, prepared in the run folder."""
    source = Path(config.data.source)
    return open_corpus(source) if is_corpus(source) else prepare(out / "data", config.data, progress=True)


def resume_run(out: Path) -> "Trainer":
    """A run as its newest checkpoint left it, or at its start where it has none yet.

    Raises UserError when something in the folder is missing or damaged, or its data are not those it began with.
    """
    if not (out / "config.toml").exists():
        checkpoint.newest(out)
    config = read_toml(out / "config.toml")
    trainer = Trainer(config, out, open_run_corpus(out, config.data.source))
    if checkpoint.checkpoints(out):
        trainer.restore(checkpoint.newest(out))
    elif trainer.corpus.tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(f"the data of {out} have another vocabulary than its config.toml")
    else:
        (out / "metrics.jsonl").unlink(missing_ok=True)
    return trainer


class Trainer:
    """A model in training, its optimizer and its place in the data.

    `step` counts finished optimizer steps. Batches are a function of (seed, step), so the step is the
    position in the data.
    """

    def __init__(self, config: RunConfig, out: Path, corpus: Corpus) -> None:
        train = config.train
        self.config, self.out, self.corpus = config, out, corpus
        self.device, self.device_reason = choose_device(train.device)
        self.precision, self.precision_reason = choose_precision(train.precision, self.device)
        torch.manual_seed(train.seed)
        model = LanguageModel(config.model)
        self.model = model.to(self.device, torch.float64 if self.precision == "float64" else torch.float32)
        self.optimizer = build_optimizer(self.model, train)
        self.batches = Batches(
            corpus.train,
            batch_size=train.batch_size,
            ctx_len=config.model.ctx_len,
            seed=train.seed,
            order=config.data.order,
        )
        self.step = 0
        self.seconds = 0.0
        self.valid_loss: float | None = None
        self.valid_step: int | None = None
        self.best_loss = math.inf

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.model.ctx_len

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.tokens_per_step

    @property
    def data_hashes(self) -> dict[str, str]:
        """What identifies the training data: sha256 of both splits and of the tokenizer."""
        info = self.corpus.info
        splits = {split: info[split]["sha256"] for split in ("train", "valid")}
        return splits | {"tokenizer": self.corpus.tokenizer.hash}

    def restore(self, folder: Path) -> None:
        """Goes back to a checkpoint; lines of metrics.jsonl after it are cut off."""
        progress = checkpoint.restore_training(folder, self.model, self.optimizer)
        if progress.get("data") != self.data_hashes:
            raise UserError(f"the data are not those that {self.out} was trained on: their hashes differ")
        self.step = progress["step"]
        self.seconds = progress["seconds"]
        self.valid_loss = progress["valid_loss"]
        self.valid_step = progress["valid_step"]
        self.best_loss = checkpoint.best_loss(self.out)
        path = self.out / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            write_text(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= self.step))

    def loss_of(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets (B, T) given inputs (B, T)."""
        with autocast(self.precision, self.device):
            logits, _ = self.model(inputs)
        return cross_entropy(logits, targets)

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; returns its loss in nats per token, before the update, and the gradient norm.

        Raises UserError, with weights unchanged, when loss or gradient is not finite.
        """
        config = self.config.train
        lr = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        inputs, targets = (torch.from_numpy(a).to(self.device) for a in self.batches(self.step))
        loss = 0.0
        pieces = zip(inputs.chunk(config.accumulation), targets.chunk(config.accumulation), strict=True)
        for piece_inputs, piece_targets in pieces:
            piece = self.loss_of(piece_inputs, piece_targets) / config.accumulation
            piece.backward()
            loss += piece.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise NotFinite(self._not_finite(what, self.step + 1))
        self.optimizer.step()
        self.step += 1
        return loss, norm

    def _not_finite(self, what: str, step: int) -> str:
        kept = checkpoint.checkpoints(self.out)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was saved yet"
        return f"the {what} is not finite at step {step}; {last}; try a smaller --train.lr"

    def validate(self) -> float | None:
        """Loss on the whole held-out text in nats per token, None where there is none.

        Raises UserError when it is not finite.
        """
        if len(self.corpus.valid) < 2:
            return None
        loss = loss_per_token(self.model, self.corpus.valid, precision=self.precision)
        if not math.isfinite(loss):
            raise NotFinite(self._not_finite("validation loss", self.step))
        self.valid_loss, self.valid_step = loss, self.step
        return loss

    def save(self) -> Path:
        """Writes a checkpoint and removes those that are neither newest nor best."""
        folder = checkpoint.save_checkpoint(
            self.out,
            self.step,
            self.model,
            self.config,
            self.corpus.tokenizer,
            self.optimizer,
            {
                "tokens": self.tokens,
                "seconds": self.seconds,
                "valid_loss": self.valid_loss,
                "valid_step": self.valid_step,
                "data": self.data_hashes,
            },
        )
        checkpoint.prune(self.out)
        return folder

    def run(self, watch: Watch = lambda progress: None) -> Path:
        """Trains to the last step; returns the newest checkpoint.

        Writes metrics.jsonl and checkpoints. `seconds` counts training steps alone, not validation or
        saving. On Ctrl-C or SIGTERM saves and raises `Interrupted`; raises UserError when the loss is not
        finite or the disk is full.
        """
        config = self.config.train
        with _signals() as received, _appending(self.out / "metrics.jsonl") as write:
            if self.step == 0:
                write({"step": 0, "tokens": 0, "seconds": 0.0, "valid_loss": self.validate()})
            losses: list[float] = []
            seconds_then = self.seconds
            speed = 0.0
            while self.step < config.steps:
                start = time.perf_counter()
                loss, norm = self.train_step()
                step_seconds = time.perf_counter() - start
                self.seconds += step_seconds
                losses.append(loss)
                at_end = self.step == config.steps
                line: dict[str, Any] = {}
                if self.step % config.log_every == 0 or at_end:
                    elapsed = self.seconds - seconds_then
                    speed = len(losses) * self.tokens_per_step / elapsed
                    line |= {
                        "loss": float(np.mean(losses)),
                        "lr": learning_rate(config, self.step - 1),
                        "grad_norm": norm,
                        "tokens_per_second": speed,
                    }
                    losses, seconds_then = [], self.seconds
                improved = False
                if self.step % config.valid_every == 0 or at_end:
                    valid_loss = self.validate()
                    line |= {"valid_loss": valid_loss}
                    improved = valid_loss is not None and valid_loss < self.best_loss
                    if valid_loss is not None and improved:
                        self.best_loss = valid_loss
                if line:
                    write({"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3), **line})
                watch(
                    Progress(
                        self.step,
                        config.steps,
                        self.tokens,
                        self.seconds,
                        loss,
                        speed or self.tokens_per_step / step_seconds,
                        self.valid_loss,
                    )
                )
                if received:
                    raise Interrupted(received[0], self.save())
                if improved or self.step % config.save_every == 0 or at_end:
                    self.save()
        return checkpoint.newest(self.out)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _refuse_too_large(config: RunConfig) -> None:
    """Raises UserError when the run would not fit the memory that is free now."""
    device, _ = choose_device(config.train.device)
    precision, _ = choose_precision(config.train.precision, device)
    needed = training_memory(config.model, config.train, precision)
    free = free_memory(device)
    if free is not None and needed > free:
        raise UserError(
            f"this run needs about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free;"
            f" lower --train.batch-size ({config.train.batch_size}) or cut it with --train.accumulation"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes of memory free on a device, None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM instead of dying of it; a second one acts as usual."""
    received: list[int] = []
    old: dict[signal.Signals, Any] = {}

    def note(number: int, frame: Any) -> None:
        received.append(number)
        for each, handler in old.items():
            signal.signal(each, handler)

    try:
        for each in (signal.SIGINT, signal.SIGTERM):
            old[each] = signal.signal(each, note)
    except ValueError:
        pass  # Only the main thread may take signals; elsewhere they are not ours.
    try:
        yield received
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)


@contextmanager
def _appending(path: Path) -> Iterator[Callable[[dict], None]]:
    """Gives a function that appends a line of JSON at once.

    Raises UserError when the disk is full.
    """
    # Unbuffered: what a full disk refuses must not be tried again on closing.
    with path.open("ab", buffering=0) as file:

        def write(line: dict) -> None:
            try:
                file.write(json.dumps(line).encode() + b"\n")
            except OSError as error:
                raise UserError(cannot_write(path, error)) from error

        yield write
