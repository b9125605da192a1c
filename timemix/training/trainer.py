"""The training loop of all architectures, from token files to a run folder."""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from timemix.config.run import RunConfig
from timemix.data.batches import Batches
from timemix.data.corpus import Corpus
from timemix.data.shards import mask_of
from timemix.errors import DamagedFile, Interrupted
from timemix.evaluation.documents import document_start
from timemix.generation.sampler import Sampler
from timemix.runs.folder import Progress, best_loss, last_good, newest, not_finite, prune
from timemix.runs.load import Loaded
from timemix.runs.metrics import Line
from timemix.runs.tuning import prepare
from timemix.runtime.device import choose_device, choose_precision
from timemix.runtime.distributed import ALONE, World, whole
from timemix.runtime.machine import matrix_product_peak
from timemix.runtime.threads import share
from timemix.storage.locks import FolderLock
from timemix.training.batch_loss import BatchLoss
from timemix.training.carried import check_documents
from timemix.training.feed import Feed
from timemix.training.hooks import Hook
from timemix.training.interval import Interval
from timemix.training.optim import begin_step, build_optimizers, learning_rate
from timemix.training.parallel import check_shares, losses_reported, new_model, without_exchange
from timemix.training.progress import Sample, TrainingProgress, Watch
from timemix.training.recorder import Recorder
from timemix.training.samples import check_prompts, cut_samples, whole_model, write_sample
from timemix.training.saving import Checkpoints, restore_training, tensors_to_save
from timemix.training.signals import STOP_SIGNALS, collected_signals
from timemix.training.spikes import BadBatches, SpikeWatch
from timemix.training.validation import Validation

logger = logging.getLogger("timemix")


class Trainer:
    """A model in training with its optimizers, in each process of a run.

    Batches and dropout depend only on the seed and the step. The number of finished steps therefore determines the
    position in the data and the random numbers. The processes take equal parts of each batch. Only process 0 writes
    metrics, checkpoints and bad batches.

    Use `new_run` or `resume_run` to create a trainer with its run folder.

    Args:
        config: Config of the run, with a number of steps.
        out: Run folder.
        corpus: Tokens of the run.
        lock: Lock of the run folder. Default: a new lock, which `run` takes.
        world: The processes of the run.

    Attributes:
        model: The model, sharded with `train.strategy` "shard".
        batch_loss: The training loss of a batch, from the compiled or uncompiled model.
        optimizers: Optimizers of the model.
        step: Number of finished optimizer steps.
        seconds: Seconds of training so far, without validation and saving.
        validation: The validation losses so far, and the early stop.
        start_hash: Hash of the model whose weights are frozen (`train.tune`); None if all weights are trained.
        device: Device of the model. `device_reason` is the reason for the choice of the device.
        precision: Precision of matrix products. `precision_reason` is the reason for the choice of the precision.

    Raises:
        InvalidValue: The settings do not fit the corpus or the number of processes.
        Unavailable: The machine lacks the device.
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
        check_documents(config, world)
        separator: int | None = None
        if not config.data.cross_documents:
            separator = document_start(corpus.tokenizer, "data.cross_documents is False")
        check_prompts(train.sample_prompts, corpus.tokenizer)
        self.batches = Batches(
            corpus.train, batch_size=train.batch_size, ctx_len=config.window, seed=train.seed, order=config.data.order
        )
        self._feed = Feed(self.batches, train.batch_size, world, self.device)
        torch.manual_seed(train.seed)
        dtype = torch.float64 if self.precision == "float64" else torch.float32
        is_filled = train.tune != "all"
        self.model, self._parallel_model = new_model(
            config.model, train.strategy, world, self.device, dtype, is_filled=is_filled
        )
        prepare(self.model, train)
        self.start_hash: str | None = None
        self.model.recompute = train.recompute
        self.recipe = self.model.block.recipe(config.model)
        self.batch_loss = BatchLoss(
            config,
            self.model,
            self._parallel_model,
            self.batches,
            precision=self.precision,
            document_start=separator,
            processes=world.size,
            warn=self._warn,
        )
        self.optimizers = build_optimizers(self.model, train, self.precision, self.recipe)
        self.step = 0
        self.seconds = 0.0
        self.validation = Validation(
            self.model, corpus, train.patience, precision=self.precision, document_start=separator, world=world
        )
        self._interval = Interval(config, self.device)
        self._received: list[int] = []
        self._reasons_to_stop: list[float] = [0.0] * (len(STOP_SIGNALS) + 1)
        self._spikes = SpikeWatch(train.spike)
        is_kept = train.save_bad_batches and world.first
        self._bad_batches = BadBatches(out / "bad-batches", self.batches, corpus.tokenizer, self._warn, is_on=is_kept)
        self._recorder = Recorder(out / "metrics.jsonl", train, world, self._warn)
        self._checkpoints = Checkpoints(out, config, corpus.tokenizer, world, self._warn)

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens in a batch, over all processes."""
        return self.config.train.batch_size * self.config.window

    @property
    def tokens(self) -> int:
        """Number of tokens trained on so far."""
        return self.step * self.tokens_per_step

    @property
    def is_complete(self) -> bool:
        """Whether the run has finished its last step or stopped early."""
        return self.step >= self.config.train.steps or self.validation.stopped_early

    @property
    def data_hashes(self) -> dict[str, str]:
        """Hashes that identify the training data: both splits and their loss masks, the tokenizer, the frozen model."""
        splits = {name: self.corpus.info.split(name) for name in ("train", "valid")}
        hashes = {name: split.sha256 for name, split in splits.items()}
        hashes |= {mask_of(name): split.counted.sha256 for name, split in splits.items() if split.counted is not None}
        frozen = {"start": self.start_hash} if self.start_hash else {}
        return hashes | {"tokenizer": self.corpus.tokenizer.hash} | frozen

    def restore(self, folder: Path) -> None:
        """Load a checkpoint and continue from its step.

        Args:
            folder: A checkpoint of this run.

        Raises:
            FileError: A file is missing, damaged or does not fit the model, or the training data have changed.
        """
        progress = restore_training(folder, self.model, self.optimizers, self.world)
        if self.batch_loss.carried is not None:
            self.batch_loss.carried.restore(folder, progress.step)
        if progress.data != self.data_hashes:
            raise DamagedFile(
                f"the data differ from those that {self.out} was trained on; restore them, or start a new run"
            )
        self.step = progress.step
        self.seconds = progress.seconds
        self.validation.loss, self.validation.step = progress.valid_loss, progress.valid_step
        self.validation.best, self.validation.without_gain = best_loss(self.out), progress.validations_without_gain
        self._interval.losses = list(progress.losses_since_line)
        self._spikes.state = progress.usual_loss

    def tidy(self) -> None:
        """Remove metrics and samples after the current step, and old checkpoints that a killed process left behind."""
        self._recorder.metrics.cut(self.step if self.step else -1)
        cut_samples(self.out, self.step)
        if self.step:
            prune(self.out)

    def train_step(self) -> tuple[float, float]:
        """Run one optimizer step.

        Returns:
            The loss in nats per token before the update, and the gradient norm before clipping.

        Raises:
            NotFinite: The loss or a gradient is not finite. The weights are unchanged.
        """
        config = self.config.train
        # LanguageModel.forward also calls `share`, but compiled code skips the call.
        share()
        lr = learning_rate(config, self.step, self.recipe.warmup_floor)
        begin_step(self.optimizers, lr)
        seeds = np.random.SeedSequence([config.seed, self.step, self.world.rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        inputs, targets = (rows.chunk(config.accumulation) for rows in self._feed(self.step))
        pieces = list(zip(inputs, targets, strict=True))
        losses: list[Tensor] = []
        self.batch_loss.begin(self.step)
        for i, (piece_inputs, piece_targets) in enumerate(pieces):
            with nullcontext() if i == len(pieces) - 1 else without_exchange(self._parallel_model):
                piece = self.batch_loss.of_piece(piece_inputs, piece_targets, i)
                piece.backward()
            # The loss is copied, because the next piece of the batch overwrites the output of a CUDA graph.
            losses.append(piece.detach().clone())
        clipped = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        if self.device.type != "cpu":
            self._feed.prepare(self.step + 1)
        # In a step, the CPU waits for the device only at this point.
        *piece_losses, norm = torch.stack([*losses, whole(clipped)]).tolist()
        # All values share one exchange, because an exchange of two processes on a small machine takes up to 2 ms.
        loss, *self._reasons_to_stop = self.world.sum(sum(piece_losses) / self.world.size, *self._reasons_here())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            self._bad_batches.keep(self.step, f"the {what} is not finite")
            raise not_finite(self.out, what, self.step + 1)
        if self.batch_loss.counted != 0 and (spike := self._spikes(loss)):
            self._bad_batches.keep(self.step, spike)
            self._warn(f"step {self.step + 1}: {spike}")
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return loss, norm

    def _reasons_here(self) -> list[float]:
        """Return flags (0 or 1) for reasons to stop in this process: each of STOP_SIGNALS, then failed hooks."""
        hooks = self._recorder.fatal is not None
        return [float(number in self._received) for number in STOP_SIGNALS] + [float(hooks)]

    def _warn(self, sentence: str) -> None:
        if self.world.first:
            logger.warning("%s", sentence)

    def validate(self) -> float | None:
        """Return the loss on the whole held-out text in nats per token, or None without held-out text.

        All processes must call this method.

        Raises:
            NotFinite: The loss is not finite.
        """
        loss = self.validation.measure()
        if loss is None:
            return None
        if not math.isfinite(loss):
            raise not_finite(self.out, "validation loss", self.step)
        self.validation.loss, self.validation.step = loss, self.step
        return loss

    def sample(self, prompts: Sequence[str] = (), sampler: Sampler | None = None) -> tuple[Sample, ...]:
        """Generate a text for each prompt, append the texts to samples.txt and pass them to hooks.

        All processes must call this method.

        Args:
            prompts: Starts of the texts. Default: `train.sample_prompts`, or one text that begins as in
                `default_prompt`.
            sampler: Sampler of the tokens. Default: temperature 1, no filter.

        Returns:
            The texts with their prompts in process 0, nothing in other processes.
        """
        model = whole_model(self.model, self.config.train.strategy, self.world)
        loaded = Loaded(model, self.corpus.tokenizer, self.config, self.out)
        starts = prompts or self.config.train.sample_prompts or (None,)

        def write() -> tuple[Sample, ...]:
            samples = tuple(write_sample(loaded, self.step, start, sampler) for start in starts)
            self._recorder.samples(samples)
            return samples

        # The other processes wait without a time limit, because a hook may take long.
        return self.world.first_does(write) or ()

    def save(self, *, go_on: bool = False) -> Path | None:
        """Save a checkpoint, and remove the checkpoints that are neither newest nor best.

        All processes must call this method. If saving fails, all earlier checkpoints stay.

        Args:
            go_on: Whether to warn and continue if the disk is full or not writable.

        Returns:
            Path of the checkpoint in process 0, or None in other processes and if saving failed.

        Raises:
            CannotWrite: The disk is full or not writable, and `go_on` is False.
            NotFinite: A weight is not finite.
        """
        weights, state = tensors_to_save(self.model, self.optimizers)
        if self.batch_loss.carried is not None:
            state |= self.batch_loss.carried.tensors(self.step)
        progress = Progress(
            step=self.step,
            tokens=self.tokens,
            seconds=self.seconds,
            valid_loss=self.validation.loss,
            valid_step=self.validation.step,
            losses_since_line=tuple(self._interval.losses),
            usual_loss=self._spikes.state,
            validations_without_gain=self.validation.without_gain,
            data=self.data_hashes,
        )
        return self._checkpoints.write({"model": weights, "training": state}, progress, go_on=go_on)

    def run(
        self, watch: Watch = lambda progress: None, hooks: Sequence[Hook] = (), *, samples_at_end: bool = False
    ) -> Path:
        """Train to the last step or to an early stop.

        All processes must call this method, which writes metrics.jsonl and checkpoints.

        Args:
            watch: Function that process 0 calls with the progress after each step.
            hooks: Functions that process 0 calls with each line of metrics.jsonl. A `Tracker` also gets the samples.
            samples_at_end: Whether to generate samples after the last step.

        Returns:
            The newest checkpoint.

        Raises:
            Interrupted: Ctrl-C, SIGTERM or SIGHUP arrived. The newest checkpoint holds the last finished step.
            NotFinite: The loss, a gradient or a weight is not finite.
            CannotWrite: The disk is full or not writable.
            HookFailed: A hook raised an exception, and `train.hook_errors` is "stop". The newest checkpoint holds the
                last finished step.
            InUse: Another process works on the run.
            ProcessLost: Another process of this run has ended or does not answer.
        """
        self.world.first_does(self.lock.take)
        self._recorder.begin(hooks)
        try:
            with (
                collected_signals(self._received, escalate=self.world.size == 1),
                losses_reported(self.world, lambda: last_good(self.out)),
            ):
                has_ended = False
                try:
                    self._run(watch, samples_at_end)
                    has_ended = True
                finally:
                    self._recorder.end_hooks(complete=has_ended)
                self._recorder.refuse_failed(f"the run in {self.out} is complete")
        finally:
            self._recorder.close()
            self._checkpoints.close()
            self.lock.release()
        return newest(self.out)

    def _run(self, watch: Watch, samples_at_end: bool) -> None:
        config = self.config.train
        (peak,) = self.world.sum(matrix_product_peak(self.precision, self.device))
        if self.step == 0:
            self._recorder.record({"step": 0, "tokens": 0, "seconds": 0.0} | self._validated())
        self._interval.begin(self.step, self.seconds, peak)
        newest_loss = math.nan
        while not self.is_complete:
            began = time.perf_counter()
            loss, norm = self.train_step()
            step_seconds = time.perf_counter() - began
            self.seconds += step_seconds
            # The loss of a batch without counted targets is always 0.
            if self.batch_loss.counted != 0:
                self._interval.losses.append(loss)
                newest_loss = loss
            is_last = self.step == config.steps
            line: Line = {}
            improved = False
            if self.step % config.valid_every == 0 or is_last:
                line |= self._validated()
                improved = self.validation.count()
            # The validation may have ended the run, whose last losses must not be lost.
            if self.step % config.log_every == 0 or self.is_complete:
                lr = learning_rate(config, self.step - 1, self.recipe.warmup_floor)
                line = self._interval.measure(self.step, self.seconds, lr, norm) | line
            if line:
                self._recorder.record(
                    {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)} | line
                )
            speed = self._interval.tokens_per_second or self.tokens_per_step / step_seconds
            is_due = config.sample_every > 0 and self.step % config.sample_every == 0
            self._show(watch, newest_loss, speed, self.sample() if is_due and not self.is_complete else ())
            self._stop_if_asked()
            if improved or self.step % config.save_every == 0 or self.is_complete:
                self.save(go_on=config.full_disk == "continue" and not self.is_complete)
            if samples_at_end and self.is_complete:
                samples = self.sample()
                if config.sample_every or config.sample_prompts:
                    self._show(watch, newest_loss, speed, samples)

    def _validated(self) -> Line:
        """Validate, and return the fields of a metrics line about the validation."""
        loss = self.validate()
        bits = self.validation.bits_per_byte
        return {"valid_loss": loss} | ({} if bits is None else {"valid_bits_per_byte": bits})

    def _show(self, watch: Watch, loss: float, speed: float, samples: tuple[Sample, ...]) -> None:
        if self.world.first:
            steps = self.config.train.steps
            valid = self.validation.loss, self.validation.step
            watch(TrainingProgress(self.step, steps, self.tokens, self.seconds, loss, speed, *valid, samples))

    def _stop_if_asked(self) -> None:
        """Save a checkpoint and raise an error, if a stop signal arrived or if a failed hook must end the run."""
        # All processes must agree to stop, so a reason that arises after their exchange takes effect at the next step.
        reasons = self._reasons_here() if self.world.size == 1 else self._reasons_to_stop
        if not any(reasons):
            return
        saved = self.save()
        first = reasons.index(max(reasons))
        if first < len(STOP_SIGNALS):
            raise Interrupted(STOP_SIGNALS[first], saved)
        self._recorder.refuse_failed(f"training stopped, as train.hook_errors is 'stop'; saved {saved}")
