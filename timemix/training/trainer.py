"""Training: one loop for every architecture, from token files to a run folder."""

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from timemix.config.run import RunConfig, TrainConfig
from timemix.data.batches import Batches
from timemix.data.corpus import Corpus
from timemix.errors import CannotWrite, DamagedFile, Interrupted, InvalidValue, NotFinite, ProcessLost, Unavailable
from timemix.evaluation.loss import cross_entropy, loss_per_token
from timemix.models.language_model import LanguageModel
from timemix.models.size import flops_per_token
from timemix.runs.folder import Progress, best_loss, checkpoints, newest, prune
from timemix.runs.metrics import Line, Metrics
from timemix.runs.save import save_checkpoint
from timemix.runtime.device import autocast, choose_device, choose_precision
from timemix.runtime.distributed import ALONE, World, my_rows, whole
from timemix.runtime.machine import matrix_product_peak, peak_memory
from timemix.runtime.threads import share
from timemix.storage.files import write_text
from timemix.storage.locks import FolderLock
from timemix.training.compiling import choose_compile
from timemix.training.hooks import Hook
from timemix.training.optim import build_optimizers, learning_rate
from timemix.training.parallel import in_parallel, without_exchange
from timemix.training.saving import gathered, restore_training
from timemix.training.signals import STOP_SIGNALS, collected_signals
from timemix.training.spikes import SpikeWatch

logger = logging.getLogger("timemix")


@dataclass
class TrainingProgress:
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


Watch = Callable[[TrainingProgress], None]


def check_shares(train: TrainConfig, world: World) -> None:
    """Raises InvalidValue where the processes cannot take equal parts of a batch."""
    if train.batch_size % (train.accumulation * world.size):
        raise InvalidValue(
            f"train.batch_size={train.batch_size} cannot be cut into {world.size} equal parts for the processes,"
            f" each in {train.accumulation} pieces; take a multiple of {train.accumulation * world.size}"
        )


def run_batches(config: RunConfig, corpus: Corpus) -> Batches:
    train = config.train
    return Batches(
        corpus.train,
        batch_size=train.batch_size,
        ctx_len=config.window,
        seed=train.seed,
        order=config.data.order,
    )


class Trainer:
    """A model in training, its optimizers and its place in the data, in each process of a `world`.

    `step` counts finished optimizer steps. Batches and dropout are functions of (seed, step), so the step is the
    position in the data and in the random numbers.

    The processes take equal parts of each batch. Process 0 alone writes: metrics, checkpoints, what went wrong.
    """

    def __init__(
        self, config: RunConfig, out: Path, corpus: Corpus, lock: FolderLock | None = None, world: World = ALONE
    ) -> None:
        train = config.train
        self.config, self.out, self.corpus, self.world = config, out, corpus, world
        self.lock = lock or FolderLock(out)
        self.device, self.device_reason = choose_device(train.device, world.local_rank)
        self.precision, self.precision_reason = choose_precision(train.precision, self.device)
        check_shares(train, world)
        self.batches = run_batches(config, corpus)
        torch.manual_seed(train.seed)
        self.model = LanguageModel(config.model)
        self.model.to(self.device, torch.float64 if self.precision == "float64" else torch.float32)
        self.model.recompute = train.recompute
        self.recipe = self.model.block.recipe(config.model)
        self._parallel_model = in_parallel(self.model, train.strategy, world)
        flops = 3 * flops_per_token(config.model) * train.steps * self.tokens_per_step
        self.compiled, self.compile_reason = choose_compile(
            train.compile,
            flops,
            self.device,
            world.size,
            fused=self.model.block.runs_in_c(config.model, self.precision, self.device),
        )
        # One shape of batch, so no code for any shape; validation calls the model as it is.
        self._training_model = self._parallel_model
        if self.compiled:
            self._training_model = cast(torch.nn.Module, torch.compile(self.model, dynamic=False))
        self.optimizers = build_optimizers(self.model, train, self.precision, self.recipe)
        self.metrics = Metrics(out / "metrics.jsonl")
        self.step = 0
        self.seconds = 0.0
        self.valid_loss: float | None = None
        self.valid_step: int | None = None
        self.best_loss = math.inf
        self._losses: list[float] = []
        self._received: list[int] = []
        self._told: list[float] = [0.0] * len(STOP_SIGNALS)
        self._spikes = SpikeWatch(train.spike)

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.window

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.tokens_per_step

    @property
    def data_hashes(self) -> dict[str, str]:
        """What identifies the training data: sha256 of both splits and of the tokenizer."""
        info = self.corpus.info
        splits = {split: info.split(split).sha256 for split in ("train", "valid")}
        return splits | {"tokenizer": self.corpus.tokenizer.hash}

    def restore(self, folder: Path) -> None:
        """Goes back to a checkpoint. Raises DamagedFile where it is damaged or of other data."""
        progress = restore_training(folder, self.model, self.optimizers)
        if progress.data != self.data_hashes:
            raise DamagedFile(f"the data are not those that {self.out} was trained on: their hashes differ")
        self.step = progress.step
        self.seconds = progress.seconds
        self.valid_loss = progress.valid_loss
        self.valid_step = progress.valid_step
        self.best_loss = best_loss(self.out)
        self._losses = list(progress.losses_since_line)
        self._spikes.state = progress.usual_loss

    def tidy(self) -> None:
        """Removes what comes after the newest checkpoint, and older ones that a killed process still wanted to."""
        self.metrics.cut(self.step if self.step else -1)
        if self.step:
            prune(self.out)

    def loss_of(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets (B, T) given inputs (B, T)."""
        with autocast(self.precision, self.device):
            try:
                logits, _ = self._training_model(inputs)
            except torch._dynamo.exc.TorchDynamoException as error:
                if self.config.train.compile == "on":
                    raise Unavailable(
                        f"the model cannot be compiled: {_first_line(error)}; leave train.compile out"
                    ) from error
                self._warn(f"the model cannot be compiled ({_first_line(error)}); training goes on without")
                self.compiled, self._training_model = False, self._parallel_model
                logits, _ = self._training_model(inputs)
        return self.model.block.training_loss(cross_entropy(logits, targets), logits)

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; returns its loss in nats per token, before the update, and the gradient norm.

        Raises NotFinite, with weights unchanged, when loss or gradient is not finite.
        """
        config = self.config.train
        # A compiled model does not.
        share()
        lr = learning_rate(config, self.step, self.recipe.warmup_floor)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            optimizer.zero_grad(set_to_none=True)
        seeds = np.random.SeedSequence([config.seed, self.step, self.world.rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        batch = self.batches(self.step, my_rows(config.batch_size, self.world))
        inputs, targets = (torch.from_numpy(a).to(self.device) for a in batch)
        local_loss = 0.0
        pieces = list(zip(inputs.chunk(config.accumulation), targets.chunk(config.accumulation), strict=True))
        for i, (piece_inputs, piece_targets) in enumerate(pieces, 1):
            with nullcontext() if i == len(pieces) else without_exchange(self._parallel_model):
                piece = self.loss_of(piece_inputs, piece_targets) / config.accumulation
                piece.backward()
            local_loss += piece.item()
        # In one exchange: each costs two processes on a small machine up to 2 ms.
        loss, *self._told = self.world.sum(local_loss / self.world.size, *self._signals_here())
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            self._keep_batch(self.step, f"the {what} is not finite")
            raise NotFinite(f"{self._not_finite(what, self.step + 1)}; try a smaller train.lr")
        if spike := self._spikes(loss):
            self._keep_batch(self.step, spike)
            self._warn(f"step {self.step + 1}: {spike}")
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return loss, norm

    def _signals_here(self) -> list[float]:
        """For each of the signals that stop a run, 1 where this process has got it."""
        return [float(number in self._received) for number in STOP_SIGNALS]

    def _warn(self, sentence: str) -> None:
        if self.world.first:
            logger.warning("%s", sentence)

    def _keep_batch(self, step: int, why: str) -> None:
        """Writes the batch after `step` steps to bad-batches, where the config asks for it."""
        if not (self.config.train.save_bad_batches and self.world.first):
            return
        inputs, targets = self.batches(step)
        windows = np.concatenate([inputs, targets[:, -1:]], 1)
        texts = [self.corpus.tokenizer.decode(row) for row in windows]
        record = {"step": step + 1, "why": why, "tokens": windows.tolist(), "texts": texts}
        path = self.out / "bad-batches" / f"step-{step + 1:08d}.json"
        write_text(path, json.dumps(record, ensure_ascii=False, indent=1))

    def _not_finite(self, what: str, step: int) -> str:
        return f"the {what} is not finite at step {step}; {self._last_good()}"

    def _last_good(self) -> str:
        kept = checkpoints(self.out)
        return f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was saved yet"

    def validate(self) -> float | None:
        """Loss on the whole held-out text in nats per token, None where there is none.

        Raises NotFinite when it is not finite.
        """
        if len(self.corpus.valid) < 2:
            return None
        loss = loss_per_token(self.model, self.corpus.valid, precision=self.precision, world=self.world)
        if not math.isfinite(loss):
            raise NotFinite(f"{self._not_finite('validation loss', self.step)}; try a smaller train.lr")
        self.valid_loss, self.valid_step = loss, self.step
        return loss

    def save(self, *, go_on: bool = False) -> Path | None:
        """Writes a checkpoint and removes those that are neither newest nor best; returns it, in process 0.

        When the disk is full the checkpoints before stay; raises CannotWrite then, or, to `go_on`, warns.
        """
        weights, training = gathered(self.model, self.optimizers, self.world)
        progress = Progress(
            step=self.step,
            tokens=self.tokens,
            seconds=self.seconds,
            valid_loss=self.valid_loss,
            valid_step=self.valid_step,
            losses_since_line=tuple(self._losses),
            usual_loss=self._spikes.state,
            data=self.data_hashes,
        )

        def write() -> Path | None:
            tokenizer = self.corpus.tokenizer
            try:
                saved = save_checkpoint(self.out, weights, training, self.config, tokenizer, progress)
            except CannotWrite as error:
                sentence = f"step {self.step}: {error}; {self._last_good()}"
                if not go_on:
                    raise CannotWrite(sentence) from error
                self._warn(f"{sentence}; training goes on")
                return None
            prune(self.out)
            return saved

        return self.world.first_does(write)

    def run(self, watch: Watch = lambda progress: None, hook: Hook | None = None) -> Path:
        """Trains to the last step; returns the newest checkpoint.

        Writes metrics.jsonl and checkpoints; `watch` is called after each step, `hook` with each line of metrics.jsonl,
        both in process 0. `seconds` counts training steps alone, not validation or saving.

        On Ctrl-C or SIGTERM saves and raises Interrupted. Raises NotFinite when the loss is not finite, CannotWrite
        when the disk is full, TimemixError when another process works on the run or one of this run's has gone.
        """
        self.world.first_does(self.lock.take)
        try:
            with collected_signals(self._received, escalate=self.world.size == 1):
                self._run_or_tell(watch, hook)
        finally:
            self.lock.release()
        return newest(self.out)

    def _run_or_tell(self, watch: Watch, hook: Hook | None) -> None:
        try:
            self._run(watch, hook)
        except RuntimeError as error:
            if not self.world.lost(error):
                raise
            raise ProcessLost(
                f"a process of this run has ended or does not answer; {self._last_good()};"
                " any number of processes can resume it"
            ) from error

    def _run(self, watch: Watch, hook: Hook | None) -> None:
        config = self.config.train
        (peak,) = self.world.sum(matrix_product_peak(self.precision, self.device))
        flops = 3 * flops_per_token(self.config.model)
        if self.step == 0:
            self._write({"step": 0, "tokens": 0, "seconds": 0.0, "valid_loss": self.validate()}, hook)
        seconds_then = self.seconds
        steps_then = self.step
        speed = 0.0
        while self.step < config.steps:
            start = time.perf_counter()
            loss, norm = self.train_step()
            step_seconds = time.perf_counter() - start
            self.seconds += step_seconds
            self._losses.append(loss)
            at_end = self.step == config.steps
            line: Line = {}
            if self.step % config.log_every == 0 or at_end:
                speed = (self.step - steps_then) * self.tokens_per_step / (self.seconds - seconds_then)
                line |= {
                    "loss": float(np.mean(self._losses)),
                    "lr": learning_rate(config, self.step - 1, self.recipe.warmup_floor),
                    "grad_norm": norm,
                    "tokens_per_second": speed,
                    "peak_share": flops * speed / peak,
                    "memory": peak_memory(self.device),
                }
                self._losses, seconds_then, steps_then = [], self.seconds, self.step
            improved = False
            if self.step % config.valid_every == 0 or at_end:
                valid_loss = self.validate()
                line |= {"valid_loss": valid_loss}
                improved = valid_loss is not None and valid_loss < self.best_loss
                if valid_loss is not None and improved:
                    self.best_loss = valid_loss
            if line:
                place = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)}
                self._write(place | line, hook)
            if self.world.first:
                watch(
                    TrainingProgress(
                        self.step,
                        config.steps,
                        self.tokens,
                        self.seconds,
                        loss,
                        speed or self.tokens_per_step / step_seconds,
                        self.valid_loss,
                    )
                )
            # Several processes must agree: what came after their exchange waits for the next step.
            told = self._signals_here() if self.world.size == 1 else self._told
            if any(told):
                saved = self.save()
                raise Interrupted(STOP_SIGNALS[told.index(max(told))], saved)
            if improved or self.step % config.save_every == 0 or at_end:
                self.save(go_on=config.full_disk == "continue" and not at_end)

    def _write(self, line: Line, hook: Hook | None) -> None:
        """A line of metrics.jsonl, and for the hook."""
        if not self.world.first:
            return
        try:
            self.metrics.write(line)
        except CannotWrite as error:
            if self.config.train.full_disk == "stop":
                raise
            self._warn(f"{error}; training goes on")
        if hook is not None:
            hook(line)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
