"""Several processes train the same model as one process: losses, weights, each token once, and a common end."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import timemix
from tests.helpers.process_group import MASKED, SETTINGS, config, initial_config
from tests.helpers.runs import TEXT, small_config, write_text_file
from tests.helpers.tiers import slow
from timemix.cli import train as cli
from timemix.config.run import read_toml
from timemix.data.batches import Batches
from timemix.data.config import DataConfig
from timemix.data.prepare import prepare
from timemix.errors import Interrupted, InvalidValue, MissingFile, ProcessLost
from timemix.evaluation.loss import loss_per_token
from timemix.models.language_model import LanguageModel
from timemix.models.registry import list_architectures
from timemix.runs import folder as run_folder
from timemix.runs.listing import stored_parameters
from timemix.runtime import distributed
from timemix.runtime.distributed import World, my_rows
from timemix.storage.sharded import open_stored
from timemix.storage.tensors import open_tensors
from timemix.training.start import new_run, resume_run

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1"]
STRATEGIES = ("replicate", "shard")


def torchrun(*arguments, processes=2, **options):
    # Each launch has its own port, so that two launches do not connect to each other.
    launch = ["--nproc-per-node", str(processes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command = [*TORCHRUN, *launch, "-m", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def curve(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(k, math.nan) for k in ("step", "loss", "grad_norm", "valid_loss")) for line in lines]


def same_curve(a: Path, b: Path, tolerance: float) -> None:
    for x, y in zip(curve(a), curve(b), strict=True):
        assert x == pytest.approx(y, rel=tolerance, nan_ok=True)
    ours, theirs = (timemix.load(run, checkpoint="newest").model.state_dict() for run in (a, b))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=100 * tolerance, rtol=100 * tolerance)


def run_group(folder: Path, names: list[str]) -> Path:
    """Return runs of these settings, of two processes and of one."""
    group = torchrun("tests.helpers.process_group", folder, *names)
    _, errors = group.communicate(timeout=300)
    assert group.returncode == 0, errors
    for name in names:
        new_run(config(folder, name, "replicate"), folder / name).run()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs with default settings, and a run that one process started and two resume."""
    folder = tmp_path_factory.mktemp("processes")
    prepare(folder / "tokens", small_config(write_text_file(folder)).data)
    for strategy in STRATEGIES:

        def stop(progress):
            if progress.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Interrupted):
            new_run(config(folder, "plain", strategy), folder / f"handed-{strategy}").run(stop)
    return run_group(folder, ["plain"])


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Runs of all other settings."""
    folder = tmp_path_factory.mktemp("others")
    prepare(folder / "tokens", small_config(write_text_file(folder)).data)
    (folder / "chat.jsonl").write_text(MASKED)
    prepare(folder / "masked-tokens", DataConfig(str(folder / "chat.jsonl"), template="world"))
    return run_group(folder, [name for name in SETTINGS if name != "plain"])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["plain", *(slow(name) for name in SETTINGS if name != "plain")])
def test_two_processes_learn_what_one_does(request, name, strategy):
    folder = request.getfixturevalue("folder" if name == "plain" else "others")
    # Muon enlarges small singular values, together with their rounding errors. The LayerNorm after the small initial
    # embedding of rwkv7 enlarges rounding errors too.
    tolerance = {"float64": 1e-12, "masked": 1e-12, "rwkv7": 1e-7, "muon": 1e-4}.get(name, 1e-5)
    same_curve(folder / name, folder / f"{name}-{strategy}-2", tolerance)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_processes_count_the_same_steps_by_the_clock(folder, strategy):
    counted = [json.loads((folder / f"steps-{strategy}-{rank}.json").read_text()) for rank in range(2)]
    assert counted[0] == counted[1] >= 1
    assert read_toml(folder / f"clock-{strategy}" / "config.toml").train.steps == counted[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_draw_samples_while_they_train(folder, strategy):
    samples = (folder / f"handed-{strategy}" / "samples.txt").read_text()
    assert samples.startswith("--- step 4\n")
    assert len(samples) > 200


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_process_resumes_a_run_of_two(folder, strategy):
    trainer = resume_run(folder / f"stopped-{strategy}")
    # Two processes agree to stop at the next step.
    assert trainer.step == 4
    trainer.run()
    same_curve(folder / "plain", trainer.out, 1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_resume_a_run_of_one(folder, strategy):
    same_curve(folder / "plain", folder / f"handed-{strategy}", 1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_process_knows_the_loss_of_the_whole_text(folder, strategy):
    model = timemix.load(folder / f"handed-{strategy}", checkpoint="newest").model
    alone = [loss_per_token(model, np.arange(n) % 7, tokens_per_batch=16) for n in (17, 50, 81)]
    for rank in range(2):
        assert json.loads((folder / f"losses-{strategy}-{rank}.json").read_text()) == pytest.approx(alone, rel=1e-6)


def test_a_replicated_checkpoint_looks_as_that_of_one_process(folder):
    runs = folder / "plain", folder / "plain-replicate-2"
    listings = [sorted((p.name, p.stat().st_size) for p in run_folder.newest(r).glob("*.safetensors")) for r in runs]
    assert listings[0] == listings[1]


def test_a_sharded_checkpoint_is_a_file_per_process_and_an_index(folder):
    checkpoint = run_folder.newest(folder / "plain-shard-2")
    kinds = {"model": ("0-of-2", "1-of-2"), "training": ("0-of-2", "1-of-2")}
    files = {f"{stem}-{part}.safetensors" for stem, parts in kinds.items() for part in parts}
    indices = {"model.index.json", "training.index.json"}
    assert {p.name for p in checkpoint.iterdir()} == files | indices | {
        "config.toml",
        "tokenizer.json",
        "training.json",
    }
    sizes = [(checkpoint / f"model-{part}.safetensors").stat().st_size for part in kinds["model"]]
    whole = (run_folder.newest(folder / "plain") / "model.safetensors").stat().st_size
    assert max(sizes) < 0.65 * whole
    assert stored_parameters(checkpoint) == stored_parameters(run_folder.newest(folder / "plain"))


def test_a_missing_index_is_named(folder, tmp_path):
    run = shutil.copytree(folder / "plain-shard-2", tmp_path / "run")
    checkpoint = run_folder.newest(run)
    (checkpoint / "model.index.json").unlink()
    for path in (run, checkpoint):
        with pytest.raises(MissingFile, match="lacks model.index.json; restore"):
            timemix.load(path)


def test_every_reader_takes_the_whole_file_of_a_checkpoint_in_both_forms(folder, tmp_path):
    run = shutil.copytree(folder / "plain-shard-2", tmp_path / "run")
    checkpoint = run_folder.newest(run)
    shutil.copy(run_folder.newest(folder / "plain") / "model.safetensors", checkpoint)
    (checkpoint / "model-1-of-2.safetensors").unlink()
    (checkpoint / "model.index.json").write_text("{}")
    assert run_folder.newest(run) == checkpoint
    weights, whole = (timemix.load(path).model.state_dict() for path in (checkpoint, folder / "plain"))
    assert_equal_bits(weights, whole)
    assert stored_parameters(checkpoint) == stored_parameters(run_folder.newest(folder / "plain"))


@pytest.fixture(scope="module", params=[2, slow(4)])
def exact(request, folder, tmp_path_factory):
    """Copies of a run that two processes saved in shards, resumed and saved at once; initial values."""
    here = tmp_path_factory.mktemp("exact")
    prepare(here / "tokens", small_config(write_text_file(here)).data)
    for strategy in STRATEGIES:
        shutil.copytree(folder / "plain-shard-2", here / f"copied-{strategy}-{request.param}")
    group = torchrun("tests.helpers.process_group", here, "exact", processes=request.param)
    _, errors = group.communicate(timeout=300)
    assert group.returncode == 0, errors
    return here, request.param


def test_a_full_disk_in_one_process_leaves_the_last_checkpoint(exact):
    here, size = exact
    checkpoints = (here / f"full-{size}" / "checkpoints").iterdir()
    assert sorted(path.name for path in checkpoints) == ["step-00000001"]


def test_only_process_0_copies_a_sharded_model_for_a_sample(exact):
    here, size = exact
    # process_group.sample_without_copies
    assert (here / f"sampled-{size}" / "samples.txt").read_text().startswith("--- step 0")


def test_a_process_may_check_for_long_and_all_end_where_one_refuses(exact):
    here, size = exact
    # process_group.check_longer_than_an_exchange_waits
    assert not (here / f"refused-{size}").exists()


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = {}
    for stem in ("model", "training"):
        with open_stored(checkpoint, stem) as tensors:
            tensors.check_content()
            found |= {f"{stem}.{name}": tensors.tensor(name).clone() for name in tensors.shapes}
    return found


def assert_equal_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_any_number_of_processes_reads_shards_exactly(folder, exact, strategy):
    here, size = exact
    before = stored(run_folder.newest(folder / "plain-shard-2"))
    assert_equal_bits(stored(run_folder.newest(here / f"copied-{strategy}-{size}")), before)
    resume_run(here / f"copied-{strategy}-{size}").save()
    assert (run_folder.newest(here / f"copied-{strategy}-{size}") / "model.safetensors").exists()
    assert_equal_bits(stored(run_folder.newest(here / f"copied-{strategy}-{size}")), before)


@pytest.mark.parametrize("initial", ["zero", "original"])
@pytest.mark.parametrize("name", list_architectures())
def test_sharded_initial_values_are_those_of_one_process(exact, name, initial):
    here, size = exact
    torch.manual_seed(7)
    alone = LanguageModel(initial_config(name, initial)).state_dict()
    with open_tensors(here / f"initial-{name}-{initial}-{size}.safetensors") as file:
        assert_equal_bits({key: file.get_tensor(key) for key in file.keys()}, alone)  # noqa: SIM118


@given(
    size=st.integers(1, 5),
    rows=st.integers(1, 4),
    windows=st.integers(2, 40),
    order=st.sampled_from(["epoch", "random"]),
)
def test_the_processes_share_each_batch_and_each_epoch(size, rows, windows, order):
    tokens = np.arange(8 * (windows + 1) + 1)
    batch_size = size * rows
    batches = Batches(tokens, batch_size=batch_size, ctx_len=8, seed=3, order=order)
    seen: list[int] = []
    for step in range(math.ceil(windows / batch_size)):
        parts = [batches(step, my_rows(batch_size, World(rank, size)))[0] for rank in range(size)]
        assert [len(p) for p in parts] == [rows] * size
        np.testing.assert_array_equal(np.concatenate(parts), batches(step)[0])
        seen += np.concatenate(parts)[:, 0].tolist()
    if order == "epoch":
        epoch = seen[:windows]
        assert len(set(epoch)) == windows
        assert np.diff(sorted(epoch)).tolist() == [8] * (windows - 1)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    with pytest.raises(
        InvalidValue, match=r"train.batch_size=4 is not divisible by processes \(3\) .* a multiple of 3"
    ):
        new_run(small_config(write_text_file(tmp_path)), tmp_path / "run", World(0, 3))
    assert not (tmp_path / "run").exists()


def long_run(tmp_path: Path) -> tuple[list, Path]:
    out = tmp_path / "run"
    options = "--model.layers 1 --model.channels 16 --model.heads 2 --model.ctx-len 16 --train.batch-size 4"
    often = "--train.steps 100000 --train.save-every 20 --train.valid-every 1000 --train.precision float32"
    text = write_text_file(tmp_path, TEXT)
    return ["timemix", "train", "cpu-small", "--data", text, "--out", out, *options.split(), *often.split()], out


def wait_for_checkpoint(run: Path, group: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not (run_folder.checkpoints(run) if run.exists() else []):
        assert group.poll() is None, group.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


def children(parent: int) -> list[int]:
    """Return the processes that a process started, oldest first."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=True)
    return sorted(int(word) for word in listed.stdout.split())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ps") is None, reason="finds the processes of the run with ps")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_run_with_one_sentence(tmp_path, rank):
    command, out = long_run(tmp_path)
    group = torchrun(*command)
    wait_for_checkpoint(out, group)
    started = time.monotonic()
    os.kill(children(group.pid)[rank], signal.SIGKILL)
    _, errors = group.communicate(timeout=60)
    assert time.monotonic() - started < 60
    assert group.returncode != 0
    lines = re.findall(r"^timemix: .*$", errors, re.MULTILINE)
    assert len(lines) == 1, errors
    assert re.search(
        r"a process of this run has ended .*; the last good checkpoint is .*step-\d+; .*; resume with: .* --resume",
        lines[0],
    )
    assert "trainer.run" not in errors
    trainer = resume_run(out)
    before = trainer.step
    assert before >= 20
    trainer.train_step()
    assert trainer.step == before + 1


def test_a_process_lost_before_or_after_the_training_is_one_sentence(tmp_path, monkeypatch):
    def lose(*arguments):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    monkeypatch.setattr(distributed, "joined", lambda: contextlib.nullcontext(World(0, 2)))
    monkeypatch.setattr(cli, "_train", lose)
    with pytest.raises(ProcessLost, match="has ended or does not answer; no checkpoint was saved yet;"):
        cli.train(["--out", str(tmp_path / "run")])


@pytest.mark.slow
def test_ctrl_c_saves_once_and_an_error_is_printed_once(tmp_path):
    command, out = long_run(tmp_path)
    group = torchrun(*command, start_new_session=True)
    wait_for_checkpoint(out, group)
    # A terminal sends the signal to all processes at once.
    os.killpg(group.pid, signal.SIGINT)
    _, errors = group.communicate(timeout=60)
    assert len(re.findall(r"^timemix: stopped; saved .*step-\d+; resume with: ", errors, re.MULTILINE)) == 1, errors
    lines = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(set(lines))

    again = torchrun(*command)
    _, errors = again.communicate(timeout=60)
    assert again.returncode != 0
    assert len(re.findall(r"^timemix: .*run exists already; choose another folder", errors, re.MULTILINE)) == 1, errors
    assert "Traceback" not in errors.split("ChildFailedError")[0].split("torch/distributed")[0]
