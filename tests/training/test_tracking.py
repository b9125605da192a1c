"""Metrics of a run, its warnings, and its hooks."""

import contextlib
import json
import math
import os
import sys

import numpy as np
import pytest
import torch

from tests.helpers.runs import small_config, small_trainer, write_text_file
from timemix.data.config import DataConfig
from timemix.data.prepare import prepare
from timemix.errors import CannotWrite, HookFailed, InvalidValue, NotFinite, Unavailable
from timemix.models.size import flops_per_token
from timemix.runs.metrics import Metrics
from timemix.runtime import machine
from timemix.runtime.machine import peak_memory
from timemix.training.failures import Failures
from timemix.training.hooks import TensorBoard, load_hook
from timemix.training.spikes import SpikeWatch
from timemix.training.start import new_run, resume_run


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_line_holds_what_the_run_measured(tmp_path, monkeypatch):
    peak = 1e9
    monkeypatch.setattr("timemix.training.trainer.matrix_product_peak", lambda precision, device: peak)
    trainer = small_trainer(tmp_path, log_every=1, warmup=0.5)
    trainer.run()
    line = lines(trainer.out)[3]
    assert line["lr"] == pytest.approx(0.01 * 3 / 4)
    assert line["tokens"] == 3 * 4 * 16
    flops = 3 * flops_per_token(trainer.config.model)
    assert line["peak_share"] == pytest.approx(flops * line["tokens_per_second"] / peak)
    assert 50e6 < line["memory"] < 100e9
    assert line["tokens_per_second"] > 0


def test_the_speed_is_tokens_by_seconds_of_training(tmp_path):
    trainer = small_trainer(tmp_path, steps=80, log_every=40, valid_every=40)
    trainer.run()
    first, second = lines(trainer.out)[1:]
    spent = second["seconds"] - first["seconds"]
    assert second["tokens_per_second"] == pytest.approx(40 * 4 * 16 / spent, rel=0.05)


def test_the_gradient_norm_is_that_of_the_whole_gradient(tmp_path):
    trainer = small_trainer(tmp_path, precision="float64", clip=0)
    _, norm = trainer.train_step()
    squares = sum(float((p.grad**2).sum()) for p in trainer.model.parameters() if p.grad is not None)
    assert norm == pytest.approx(math.sqrt(squares), rel=1e-12)


def test_the_peak_is_about_that_of_a_product_timed_by_hand():
    device = torch.device("cpu")
    found = machine.matrix_product_peak("float32", device)
    assert 1e9 < found < 1e14
    assert machine.matrix_product_peak("float32", device) == found


def test_peak_memory_grows_with_what_is_taken():
    before = peak_memory(torch.device("cpu"))
    kept = torch.ones(60_000_000)
    after = peak_memory(torch.device("cpu"))
    assert before is not None
    assert after is not None
    assert after >= before
    assert after > kept.nbytes


class TestSpikes:
    LOSSES = 2 + 0.05 * np.random.default_rng(0).standard_normal(300)

    def test_usual_noise_is_no_spike(self):
        watch = SpikeWatch(6.0)
        assert not any(watch(x) for x in self.LOSSES)

    def test_its_mean_and_deviation_are_those_of_the_losses(self):
        watch = SpikeWatch(6.0)
        for loss in self.LOSSES[:80]:
            watch(loss)
        mean, variance, seen = watch.state
        assert mean == pytest.approx(self.LOSSES[:80].mean(), rel=1e-9)
        assert variance == pytest.approx(self.LOSSES[:80].var(), rel=1e-9)
        assert seen == 80

    def test_a_jump_is_a_spike_and_a_lasting_rise_is_reported_a_few_times(self):
        watch = SpikeWatch(6.0)
        for loss in self.LOSSES:
            watch(loss)
        mean, variance, _ = watch.state
        assert mean == pytest.approx(2, abs=0.03)
        sentence = f"the loss is 2.600, after {mean:.3f} ± {math.sqrt(variance):.3f} in the steps before"
        assert watch(2.6) == sentence
        rises = [watch(4.0) is not None for _ in range(300)]
        assert rises[0]
        assert not any(rises[150:])

    def test_no_spike_before_fifty_losses_or_without_a_threshold(self):
        assert not any(SpikeWatch(6.0)(x) for x in [1.0] * 49 + [100.0])
        watch = SpikeWatch(0.0)
        assert not any(watch(x) for x in [*self.LOSSES, 100.0])


def test_a_spike_is_reported_with_its_step_and_its_batch_saved(tmp_path, caplog):
    trainer = small_trainer(tmp_path, steps=62, save_bad_batches=True)

    def spoil(progress):
        if progress.step == 60:
            trainer.model.head.weight.data.mul_(-20)

    trainer.run(spoil)
    assert "step 61: the loss is " in caplog.text
    record = json.loads((trainer.out / "bad-batches" / "step-00000061.json").read_text())
    inputs, targets = trainer.batches(60)
    assert record["step"] == 61
    assert record["why"].startswith("the loss is ")
    np.testing.assert_array_equal(np.array(record["tokens"])[:, :-1], inputs)
    np.testing.assert_array_equal(np.array(record["tokens"])[:, 1:], targets)
    assert record["texts"] == [trainer.corpus.tokenizer.decode(row) for row in record["tokens"]]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_batch_of_a_loss_that_is_not_finite_is_kept(tmp_path, what):
    trainer = small_trainer(tmp_path, save_bad_batches=True)

    def poison(progress):
        if progress.step == 6:
            if what == "loss":
                trainer.model.head.weight.data.fill_(math.nan)
            else:
                trainer.model.head.weight.register_hook(lambda g: g * math.inf)

    with pytest.raises(NotFinite, match=f"the {what} is not finite at step 7"):
        trainer.run(poison)
    record = json.loads((trainer.out / "bad-batches" / "step-00000007.json").read_text())
    assert record["why"] == f"the {what} is not finite"
    np.testing.assert_array_equal(np.array(record["tokens"])[:, :-1], trainer.batches(6)[0])


@pytest.mark.parametrize("what", ["a spike", "not finite"])
def test_a_batch_that_cannot_be_saved_is_a_warning(tmp_path, monkeypatch, caplog, what):
    def fail(*arguments):
        raise CannotWrite("no space left on the device")

    def spoil(progress):
        if progress.step == 60 and what == "a spike":
            trainer.model.head.weight.data.mul_(-20)
        elif progress.step == 60:
            trainer.model.head.weight.register_hook(lambda g: g * math.inf)

    monkeypatch.setattr("timemix.training.spikes.write_bad_batch", fail)
    trainer = small_trainer(tmp_path, steps=62, save_bad_batches=True)
    with contextlib.nullcontext() if what == "a spike" else pytest.raises(NotFinite, match="not finite at step 61"):
        trainer.run(spoil)
    assert "step 61: no space left on the device; the batch is not saved" in caplog.text


def test_no_batches_are_kept_unasked(tmp_path):
    trainer = small_trainer(tmp_path)
    with pytest.raises(NotFinite):
        trainer.run(lambda p: trainer.model.head.weight.data.fill_(math.nan))
    assert not (trainer.out / "bad-batches").exists()


def test_a_hook_gets_every_line(tmp_path):
    trainer = small_trainer(tmp_path)
    seen: list[dict] = []
    trainer.run(hooks=[seen.append])
    assert seen == lines(trainer.out)


def test_hooks_are_named_as_module_and_function(tmp_path, monkeypatch):
    (tmp_path / "my_hooks.py").write_text("def write(line): line['seen'] = True\nnumber = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    line: dict = {}
    load_hook("my_hooks:write")(line)
    assert line == {"seen": True}
    sys.modules.pop("my_hooks")
    for name in ("my_hooks", "my_hooks:read", "nothing_here:write", "my_hooks:number", "./my_hooks.py:write", ":", ""):
        with pytest.raises(InvalidValue, match="hook .*as module:function"):
            load_hook(name)
    (tmp_path / "failing.py").write_text("raise RuntimeError('no key')\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    for name, reason in (("failing", "RuntimeError: no key"), ("broken", "SyntaxError: invalid syntax")):
        with pytest.raises(InvalidValue, match=f"hook '{name}:f' cannot be imported: {reason}.*; correct the module"):
            load_hook(f"{name}:f")


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_each_step_once_also_after_a_crash(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra [tensorboard] is not installed")
    trainer = small_trainer(tmp_path, save_every=4, log_every=1, valid_every=100)

    def crash(progress):
        if progress.step == 6:
            raise KeyError("power cut")

    with pytest.raises(KeyError):
        trainer.run(crash, hooks=[TensorBoard(tmp_path / "board", 0)])
    resumed = resume_run(trainer.out)
    resumed.run(hooks=[TensorBoard(tmp_path / "board", resumed.step)])
    written = [(line["step"], line["loss"]) for line in lines(trainer.out) if "loss" in line]
    shown = scalars(tmp_path / "board")
    assert [step for step, _ in shown["loss"]] == list(range(1, 9))
    assert [loss for _, loss in shown["loss"]] == pytest.approx([loss for _, loss in written])
    assert {"lr", "grad_norm", "tokens_per_second", "memory", "valid_loss"} <= shown.keys()


def test_tensorboard_shows_the_samples_as_text(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = small_trainer(tmp_path, sample_every=4, sample_prompts=("the cat", "a"))
    trainer.run(hooks=[TensorBoard(tmp_path / "board", 0)], samples_at_end=True)
    events = event_accumulator.EventAccumulator(str(tmp_path / "board"), {"tensors": 0}).Reload()
    for prompt in ("the cat", "a"):
        found = events.Tensors(f"samples/{prompt}/text_summary")
        assert [event.step for event in found] == [4, 8]
        assert found[0].tensor_proto.string_val[0].decode().startswith(f"    {prompt}")


def test_without_tensorboard_the_error_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(Unavailable, match=r"pip install 'timemix\[tensorboard\]'"):
        TensorBoard(tmp_path, 0)


def test_metrics_that_could_not_be_written_come_with_the_next(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write({"step": 1})
    os.chmod(tmp_path, 0o700)
    monkeypatch.setattr(metrics, "path", tmp_path / "nowhere" / "metrics.jsonl")
    with pytest.raises(CannotWrite, match="cannot write"):
        metrics.write({"step": 2})
    monkeypatch.setattr(metrics, "path", tmp_path / "metrics.jsonl")
    metrics.write({"step": 3})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_validation_on_the_training_text_is_refused(tmp_path):
    text = write_text_file(tmp_path)
    text.with_name("copy.txt").write_text(text.read_text())
    with pytest.raises(InvalidValue, match="the validation text is the training text"):
        prepare(tmp_path / "tokens", DataConfig(source=str(text), valid=str(text.with_name("copy.txt"))))


def test_the_held_out_text_is_no_part_of_any_batch(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(600))
    trainer_config = small_config(write_text_file(tmp_path, text), steps=40)
    trainer = new_run(trainer_config, tmp_path / "run")
    seen = set(np.concatenate([np.concatenate(trainer.batches(step)).ravel() for step in range(40)]).tolist())
    held_out = set(np.asarray(trainer.corpus.valid).tolist())
    assert len(held_out) == 60
    assert not seen & held_out


class Wordless(Exception):
    def __str__(self):
        raise ValueError("no words")


RAISED = [RuntimeError("the service is down"), OSError(), KeyError("x"), BrokenPipeError(), SystemExit(3), Wordless()]


@pytest.mark.parametrize("error", RAISED)
def test_a_hook_that_raises_is_reported_once_and_training_continues(tmp_path, caplog, error):
    trainer = small_trainer(tmp_path, log_every=1)
    seen = []

    def service(line):
        if 3 <= line["step"] <= 6:
            raise error
        seen.append(line["step"])

    trainer.run(hooks=[service, lambda line: seen.append(-line["step"])])
    name = f"{__name__}:{service.__qualname__}"
    fails, works = caplog.messages
    assert fails.startswith(f"hook {name} fails at step 3: {type(error).__name__}")
    assert ("the service is down" in fails) == isinstance(error, RuntimeError)
    assert fails.endswith("; training continues and calls the hook at each line")
    assert works == f"hook {name} works again after 4 failures"
    assert [step for step in seen if step > 0] == [1, 2, 7, 8]
    assert [-step for step in seen if step < 0] == list(range(1, 9))
    assert [line["step"] for line in lines(trainer.out)] == list(range(9))


def test_a_hook_may_stop_the_run_which_is_saved(tmp_path, caplog):
    trainer = small_trainer(tmp_path, log_every=1, valid_every=100, save_every=100, hook_errors="stop")

    def service(line):
        if line["step"] == 5:
            raise ConnectionError("no route to host")

    with pytest.raises(HookFailed, match=r"fails at step 5: ConnectionError: no route to host; .* saved .*-00000005$"):
        trainer.run(hooks=[service])
    assert caplog.messages == []
    resumed = resume_run(trainer.out)
    assert resumed.step == 5
    resumed.run()
    assert [line["step"] for line in lines(trainer.out)] == list(range(9))


def test_repeated_failures_are_reported_once_per_cause_and_counted():
    warnings = []
    failures = Failures("the file", warnings.append)
    for cause in ("full", "full", "full", "locked", "full"):
        failures.failed(cause, f"the file cannot be written: {cause}")
    failures.worked()
    failures.worked()
    failures.failed("full", "once more")
    failures.close()
    assert warnings == [
        "the file cannot be written: full",
        "the file cannot be written: locked",
        "the file cannot be written: full",
        "the file works again after 5 failures",
        "once more",
    ]
    for _ in range(3):
        failures.failed("full", "to the end")
    failures.close()
    assert warnings[-2:] == ["to the end", "the file failed until the end of the run: 3 failures"]


def test_metrics_that_a_full_disk_refuses_are_reported_once(tmp_path, monkeypatch, caplog):
    trainer = small_trainer(tmp_path, steps=20, log_every=1, full_disk="continue")
    write = Metrics.write

    def refuse(metrics, line):
        if 2 <= line["step"] <= 18:
            monkeypatch.setattr(metrics, "path", tmp_path / "nowhere" / "metrics.jsonl")
        else:
            monkeypatch.setattr(metrics, "path", trainer.out / "metrics.jsonl")
        write(metrics, line)

    monkeypatch.setattr(Metrics, "write", refuse)
    trainer.run()
    fails, works = caplog.messages
    assert "cannot write" in fails
    assert "training continues" in fails
    assert works.endswith("metrics.jsonl works again after 17 failures")
    assert [line["step"] for line in lines(trainer.out)] == list(range(21))
