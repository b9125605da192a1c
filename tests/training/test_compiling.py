"""Compiling and its fallbacks, and freed memory that the allocator keeps."""

import resource
import shutil
import subprocess
import sys

import pytest
import torch

from tests.helpers.runs import small_config, small_trainer, with_model, write_text_file
from timemix.errors import InvalidValue, Unavailable
from timemix.ops.common import fused
from timemix.runtime import machine
from timemix.training import batch_loss, compiling
from timemix.training.compiling import COMPILE_FROM, choose_compile
from timemix.training.start import new_run, resume_run

CPU = torch.device("cpu")


def test_auto_compiles_long_runs_where_it_can(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert choose_compile("auto", COMPILE_FROM, CPU) == (True, "the run is long enough for compiling to save time")
    assert choose_compile("auto", COMPILE_FROM / 2, CPU) == (False, "the run is too short for compiling to save time")
    assert choose_compile("on", 1, CPU) == (True, "asked for")
    assert choose_compile("auto", COMPILE_FROM, torch.device("cuda")) == (
        False,
        "the run is too short for compiling to save time",
    )
    assert choose_compile("off", COMPILE_FROM, CPU) == (False, "asked for")
    reason = "compiling would replace the model's own C code"
    assert choose_compile("auto", COMPILE_FROM, CPU, fused=True) == (False, reason)
    assert choose_compile("auto", COMPILE_FROM, CPU, processes=2) == (False, "compiling supports one process only")


@pytest.mark.parametrize(
    ("arch", "compiles", "fields"),
    [
        ("rwkv1", False, {}),
        ("rwkv4", False, {}),
        ("rwkv5", False, {}),
        ("rwkv6", False, {}),
        ("rwkv7", False, {}),
        ("rwkv5", False, {"without": ("gate",)}),
        ("rwkv7", False, {"without": ("gate",)}),
        ("rwkv6", True, {"heads": 1, "channels": 320}),
        ("mha_pro", True, {}),
    ],
)
def test_auto_compiles_only_models_without_c_kernels(monkeypatch, tmp_path, arch, compiles, fields):
    """torch.compile would replace the C code of the recurrence by operations in PyTorch."""
    monkeypatch.setattr(shutil, "which", lambda name, *path: f"/bin/{name}")
    monkeypatch.setattr(compiling, "COMPILE_FROM", 0)
    monkeypatch.setattr(batch_loss, "compiled_model", lambda model, *more: model)
    config = with_model(small_config(write_text_file(tmp_path), arch), **fields)
    assert new_run(config, tmp_path / "run").batch_loss.compiled == compiles


def test_without_a_compiler_the_reason_is_given(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert choose_compile("auto", COMPILE_FROM, CPU) == (False, "no C++ compiler is installed")
    sentence = r"train.compile is 'on', but no C\+\+ compiler is installed; leave train.compile out"
    with pytest.raises(InvalidValue, match=sentence):
        small_trainer(tmp_path, compile="on")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("asked", ["auto", "on"])
def test_a_failed_compilation_falls_back_unless_compile_is_on(monkeypatch, tmp_path, caplog, asked):
    def broken(model, **options):
        def call(*args, **options):
            raise torch._dynamo.exc.TorchDynamoException("CppCompileError: out of luck\nmore")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(compiling, "COMPILE_FROM", 0)
    monkeypatch.setattr(fused, "available", lambda: False)
    trainer = small_trainer(tmp_path, compile=asked)
    assert trainer.batch_loss.compiled
    if asked == "on":
        with pytest.raises(Unavailable, match="the model cannot be compiled: CppCompileError: out of luck; leave"):
            trainer.run()
        return
    trainer.run()
    assert not trainer.batch_loss.compiled
    assert caplog.text.count("out of luck); training continues uncompiled") == 1
    whole = small_trainer(tmp_path, name="whole", compile="off")
    whole.run()
    assert whole.validation.loss == trainer.validation.loss


@pytest.mark.slow
@pytest.mark.skipif(compiling.cpp_compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("arch", ["rwkv1", "mha_pro", "rwkv7"])
def test_a_compiled_run_learns_and_resumes_the_same(tmp_path, arch):
    whole = small_trainer(tmp_path, arch, name="whole", compile="on")
    losses = [whole.train_step() for _ in range(8)]
    plain = small_trainer(tmp_path, arch, name="plain", compile="off")
    for ours, theirs in zip(losses, [plain.train_step() for _ in range(8)], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    stopped = small_trainer(tmp_path, arch, name="stopped", compile="on")
    again = [stopped.train_step() for _ in range(4)]
    stopped.save()
    stopped.lock.release()
    resumed = resume_run(stopped.out)
    again += [resumed.train_step() for _ in range(4)]
    assert again == losses


def test_freed_memory_is_kept():
    code = (
        "import resource, torch; from timemix.runtime.machine import keep_freed_memory; keep_freed_memory()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for i in range(8):\n"
        "    if i == 4: before = faults()\n"
        "    torch.ones(2**22) + torch.ones(2**22)\n"
        "print(faults() - before)"
    )
    if sys.platform != "linux":
        pytest.skip("other systems have other allocators")

    def faults() -> int:
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    # If freed memory were returned, at least one tensor of 16 MiB would need new pages in each of 4 rounds. Sometimes
    # the memory layout of a process makes the allocator return it anyway: seen in a quarter of the processes.
    assert any(faults() * resource.getpagesize() < 4 * 2**24 / 3 for _ in range(8))


def test_speed_and_bandwidth_are_those_of_the_machine():
    assert 1e8 < machine.memory_bandwidth(CPU) < 1e13
    assert machine.memory_bandwidth(CPU) == machine.memory_bandwidth(CPU)
