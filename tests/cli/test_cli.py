"""The command line as a person uses it: verbs, output, error sentences, exit status."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.commands import run_command
from tests.helpers.pages import blocks
from tests.helpers.runs import TEXT, write_text_file
from timemix.bench.measure import StepSpeed
from timemix.cli.compare import CompareArguments, _of_architectures
from timemix.cli.main import main
from timemix.errors import FileError, InvalidValue, NotFinite

ROOT = Path(__file__).parents[2]
VERBS = ("demo", "train", "sample", "eval", "compare", "convert", "inspect", "plot", "runs", "data", "bench", "info")
VERBS += ("completion", "chat")
QUICK = ["--train.steps", "6", "--train.valid-every", "3", "--train.batch-size", "2", "--model.channels", "16"]
TINY = [*QUICK, "--model.layers", "1"]


def run(*arguments, cwd=None, **options):
    return subprocess.run(
        [sys.executable, "-m", "timemix", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
        **options,
    )


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Runs a command in this process, in an empty folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    return partial(run_command, capsys)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "my.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as end:
            main(["train", "cpu-small", "--data", "my.txt", "--out", "runs/mine", *QUICK])
    assert not end.value.code
    return folder


@pytest.fixture
def use(call, trained, monkeypatch):
    """Runs a command in this process, in the folder of the trained run: (status, stdout, stderr)."""
    monkeypatch.chdir(trained)
    return call


def test_help_names_every_verb_quickly():
    start = time.perf_counter()
    result = run("--help")
    assert time.perf_counter() - start < 5
    for verb in VERBS:
        assert f"  {verb} " in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(call, verb):
    status, out, _ = call(verb, "--help")
    assert status == 0
    assert f"timemix {verb}" in out


@pytest.mark.parametrize("word", ["", "-h", "--help", "help"])
def test_bench_lists_its_verbs(call, word):
    status, out, err = call("bench", *filter(None, [word]))
    assert (status, err) == (0, "")
    assert all(f"  {verb} " in out for verb in ("op", "train", "sample"))


def test_train_writes_a_run_folder(trained):
    names = {p.name for p in (trained / "runs/mine").iterdir()}
    assert names == {".lock", "config.toml", "data", "metrics.jsonl", "checkpoints", "samples.txt", "loss.png"}
    assert (trained / "runs/mine/samples.txt").read_text().startswith("--- step 6\n")


def test_train_prints_plain_lines_and_its_choices_without_a_terminal(call, tmp_path):
    (tmp_path / "my.txt").write_text(TEXT)
    _, _, err = call("train", "--data", "my.txt", "--out", "r", *TINY)
    assert "rwkv1, " in err
    assert "wkv1 dense (fastest up to 256 positions), not compiled (" in err
    assert re.search(r"step 6/6  loss \d\.\d{3}  valid \d\.\d{3}", err)
    assert "\x1b" not in err


@pytest.mark.parametrize("arch", ["mha_rotary", "mha_pro"])
def test_the_architecture_is_a_flag(call, tmp_path, arch):
    (tmp_path / "my.txt").write_text(TEXT)
    status, _, err = call("train", "--data", "my.txt", "--out", "r", "--model.arch", arch, *TINY)
    assert status == 0
    assert f"{arch}, " in err
    assert call("sample", "r", "--prompt", "the", "--tokens", "5")[0] == 0


def test_sample_streams_prompt_and_text(trained, use):
    result = run("sample", "runs/mine", "--prompt", "the cat", "--tokens", "40", cwd=trained)
    assert result.stdout.startswith("the cat")
    assert len(result.stdout) == len("the cat") + 40 + 1
    assert use("sample", "runs/mine", "--prompt", "the cat", "--tokens", "40") == (0, result.stdout, result.stderr)


def test_sample_json_and_count(use):
    _, out, _ = use("sample", "runs/mine", "--prompt", "the", "--tokens", "9", "--count", "3", "--json")
    report = json.loads(out)
    assert [len(t) for t in report["texts"]] == [9, 9, 9]


def test_eval_reports_units_and_json(use):
    _, plain, _ = use("eval", "runs/mine", "--data", "my.txt")
    assert "nats per token" in plain
    assert "bits per byte" in plain
    report = json.loads(use("eval", "runs/mine", "--data", "my.txt", "--json")[1])
    assert report["tokens"] == len(TEXT)
    assert 0 < report["nats_per_token"] < 5


def test_eval_without_data_takes_the_held_out_text(trained, use):
    report = json.loads(use("eval", "runs/mine", "--json")[1])
    last = [json.loads(line) for line in (trained / "runs/mine/metrics.jsonl").read_text().splitlines()][-1]
    assert report["data"] == "the held-out text"
    assert report["nats_per_token"] == pytest.approx(last["valid_loss"], abs=0.01)


def test_a_vocabulary_without_line_ends_has_a_default_prompt(call, tmp_path):
    (tmp_path / "my.txt").write_text(TEXT.replace("\n", " "))
    assert call("train", "--data", "my.txt", "--out", "r", *TINY)[0] == 0
    assert call("sample", "r", "--tokens", "5")[0] == 0


def test_eval_counts_unknown_characters(trained, use):
    (trained / "odd.txt").write_text("the cat Ω sat", encoding="utf-8")
    status, out, _ = use("eval", "runs/mine", "--data", "odd.txt")
    assert status == 0
    assert "1 unknown" in out


def test_a_long_prompt_is_taken_from_its_end_and_says_so(use):
    status, _, err = use("sample", "runs/mine", "--prompt", "the cat " * 20, "--tokens", "3")
    assert status == 0
    assert "the prompt has 160 tokens, but ctx_len is 64; the model sees the last 64 tokens" in err


def test_info_shows_the_published_sizes(call):
    _, out, _ = call("info", "seed")
    for count in ("17,218,048", "18,563,328", "18,563,648"):
        assert count in out
    report = json.loads(call("info", "seed", "--model.arch", "mha_pro", "--json")[1])
    assert report["parameters"]["total"] == 18_563_648


def test_data_describes_and_prepares(call, tmp_path):
    (tmp_path / "my.txt").write_text(TEXT)
    status, out, _ = call("data", "my.txt", "--json")
    assert status == 0
    assert json.loads(out)["characters"] == len(TEXT)
    assert call("data", "my.txt", "--out", "tokens", "--data.tokenizer", "byte")[0] == 0
    assert call("train", "--data", "tokens", "--out", "r", *TINY)[0] == 0


def test_resume_of_a_complete_run_says_so(use):
    status, out, _ = use("train", "--resume", "runs/mine")
    assert status == 0
    assert "runs/mine is complete: 6 steps" in out


def test_ctrl_c_saves_and_resume_goes_on(call, tmp_path):
    (tmp_path / "my.txt").write_text(TEXT)
    process = subprocess.Popen(
        [sys.executable, "-m", "timemix", "train", "--data", "my.txt", "--out", "r", *QUICK, "--train.steps", "3000"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "r/metrics.jsonl").exists() or len((tmp_path / "r/metrics.jsonl").read_text()) < 200:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search("resume with: .*timemix train --resume r", err)
    assert "Traceback" not in err
    stopped_at = max(int(p.name[5:]) for p in (tmp_path / "r/checkpoints").iterdir())
    config = tmp_path / "r/config.toml"
    config.write_text(config.read_text().replace("steps = 3000", f"steps = {stopped_at + 2}"))
    status, _, err = call("train", "--resume", "r")
    assert status == 0, err
    assert f"resuming r after step {stopped_at}" in err


@pytest.mark.slow
def test_a_closed_pipe_is_quiet(trained):
    command = f"{sys.executable} -m timemix sample runs/mine --prompt the --tokens 3000 | head -c 20"
    result = subprocess.run(command, shell=True, cwd=trained, capture_output=True, text=True, check=False)
    assert len(result.stdout) == 20
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "unknown verb 'trian'; did you mean 'train'?"),
        (["train", "cpu-smal", "--out", "r"], "unknown preset 'cpu-smal'; did you mean 'cpu-small'?"),
        (["train", "--model.arch", "rwkv11", "--out", "r"], "unknown architecture 'rwkv11'; did you mean 'rwkv1'?"),
        (["train", "--data", "nothing.txt", "--out", "r"], "nothing.txt"),
        (["train", "--data", "mi.txt", "--out", "r"], "my.txt"),
        (["train", "--data", "empty.txt", "--out", "r"], "empty"),
        (["train", "--data", "binary.bin", "--out", "r"], "binary"),
        (["train", "--data", "latin.txt", "--out", "r"], "byte 3"),
        (["train", "--data", "latin.txt", "--data.encoding", "utf-7000", "--out", "r"], "utf-7000"),
        (["train", "--data", "short.txt", "--out", "r"], "tokens"),
        (["train", "--data", "my.txt", "--out", "my.txt"], "exists already"),
        (["train", "--data", "my.txt", "--out", "r", "--model.heads", "5"], "does not divide"),
        (["train", "--data", "my.txt", "--out", "r", "--model.layers", "0"], "must be at least 1"),
        (
            ["train", "--data", "my.txt", "--out", "r", "--model.layer", "3"],
            "did you mean '--model.layers'?",
        ),
        (
            ["train", "--data", "my.txt", "--out", "r", "--train.steps", "many"],
            "is 'many'; it must be a whole",
        ),
        (["train", "--data", "my.txt", "--out", "r", "--train.batch-size", "99999999"], "GiB are free"),
        (["train", "--data", "my.txt", "--out", "r", "--train.device", "gpu9"], "gpu9"),
        (
            ["train", "--data", "my.txt", "--out", "r", "--train.lora-modules", "mixer.key=8"],
            "--train.lora-modules needs --train.tune lora, but --train.tune is all; set --train.tune to lora",
        ),
        (
            ["train", "--data", "my.txt", "--out", "r", "--train.lora_rank=4"],
            "--train.lora-rank needs --train.tune lora",
        ),
        (["export", "old/run", "--to", "onnx", "--form", "native", "--out", "r"], "--form has no effect on --to onnx;"),
        (["train", "--data", "my.txt"], "missing --out (new folder for the run); see timemix train --help"),
        (["train", "--data=nothing.txt", "--out", "r"], "nothing.txt"),
        (["train", "--data", "my.txt", "--out", "r", "--train.seed", "9" * 30], "must be below 2^64"),
        (
            ["train", "--data", "my.txt", "--out", "r", "--model.ffn-ratio", "nan"],
            "--model.ffn-ratio is nan; it must be from 1",
        ),
        (["train", "--resume", "nothing"], "nothing"),
        (["train", "my.txt"], "unknown preset 'my.txt'; to train on this text: timemix train --data my.txt --out RUN"),
        (["train", "folder", "--out", "r"], "'folder'; to train on this text: timemix train --data folder --out RUN"),
        (["train", "empty.toml"], "of this file: timemix train --config empty.toml --out RUN"),
        (["train", "old/run"], "unknown preset 'old/run'; to resume this run: timemix train --resume old/run"),
        (["train", "", "--out", "r"], "the value after 'train' is empty; give a value"),
        (["train", "--out", "r", "--data="], "the value after '--data' is empty; give a value"),
        (["train", "--from", "", "--out", "r"], "the value after '--from' is empty; give a value"),
        (["runs", ""], "the value after 'runs' is empty; give a value"),
        (["convert", "", "--constant-state", "2", "--out", "r"], "the value after 'convert' is empty"),
        (["sample", "old"], "old is not a run folder: it has no config.toml; the runs in old are run"),
        (["plot", "old"], "old is not a run folder: it has no config.toml; the runs in old are run"),
        (["plot", "old/rum"], "there is no run folder old/rum; the runs in old are run"),
        (["sample", "my.txt"], "my.txt is a file, not a run folder; name a folder that training has written"),
        (["eval", "my.txt"], "RUN is my.txt, a file; to measure the loss of a run on a text: timemix eval RUN --data"),
        (["sample", "nothing"], "there is no run folder nothing"),
        (["sample", "folder"], "is not a run folder"),
        (["eval", "nothing", "--data", "my.txt"], "there is no run folder nothing"),
        (["plot", "nothing"], "nothing"),
        (["plot"], "missing RUN (run folders, one or more); see timemix plot --help"),
        (["plot", "folder", "--smoothing", "2"], "smoothing is 2.0; it must be from 0 to 1"),
        (["compare"], "name either an experiment (a .toml file, or one of activation, architectures"),
        (["compare", "recall", "--tasks"], "--tasks is empty; give at least one of recall-32, recall-64"),
        (["compare", "recall", "--tasks", ""], "the value after '--tasks' is empty; give a value"),
        (["compare", "recall", "--tasks", "recall-3"], "has no task 'recall-3'; did you mean 'recall-32'?"),
        (["compare", "heads", "--tasks"], "the experiment heads has no tasks; leave out --tasks"),
        (["compare", "head"], "there is no experiment 'head'; did you mean 'heads'?"),
        (["compare", "heads", "--arch", "rwkv1"], "or architectures with --arch"),
        (["compare", "nothing.toml"], "cannot read nothing.toml"),
        (["compare", "empty.toml"], "empty.toml: title is missing"),
        (
            ["compare", "my.txt"],
            "to compare architectures on a text: timemix compare --arch NAME NAME --data my.txt",
        ),
        (["compare", "binary.toml"], "binary.toml is damaged"),
        (["compare", "heads", "--data", "nothing.txt"], "nothing.txt"),
        (
            ["compare", "heads", "--data", "my.txt", "--out", "folder"],
            "folder is not the folder of a comparison, and not empty",
        ),
        (["compare", "--arch", "rwkv11"], "unknown architecture 'rwkv11'; did you mean 'rwkv1'?"),
        (["compare", "--arch", "rwkv1", "rwkv1"], "two variants have the name 'rwkv1'"),
        (["compare", "--arch", "rwkv1", "--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["compare", "--arch", "rwkv1", "--size", "sead"], "unknown preset 'sead'; did you mean 'seed'?"),
        (["compare", "heads", "--no-tune", "--data", "my.txt"], "--size and --no-tune need --arch"),
        (["compare", "heads", "--device", "cuda:77", "--data", "long.txt"], "device 'cuda:77' cannot be used"),
        (["compare", "heads", "--reuse", "nowhere", "--data", "long.txt"], "there is no folder nowhere"),
        (
            ["compare", "long-context", "--seeds", "3"],
            "trains no variants; leave out --seeds and --tokens",
        ),
        (["compare", "recall", "--tokens", "1k"], "generates its sequences; leave out --data, --valid and --tokens"),
        (["inspect", "nothing"], "there is no run folder nothing"),
        (["inspect", "folder"], "is not a run folder"),
        (["inspect", "folder", "--tokens", "1"], "--tokens is 1; it must be at least 2"),
        (["data", "nothing.txt"], "nothing.txt"),
        (["bench", "tain"], "unknown verb 'bench tain'; did you mean 'train'?"),
        (["info", "sead"], "unknown preset 'sead'; did you mean 'seed'?"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_one_sentence_and_status_2(call, tmp_path, arguments, words):
    (tmp_path / "my.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1") * 100)
    (tmp_path / "binary.toml").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "old/run").mkdir(parents=True)
    (tmp_path / "old/run/config.toml").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/letter.txt").write_text("dear")
    (tmp_path / "empty.toml").write_text("")
    (tmp_path / "long.txt").write_text(TEXT * 9)
    status, out, err = call(*arguments)
    assert status == 2
    assert words in err
    assert err.startswith("timemix: ")
    assert err.count("\n") == 1
    assert out == ""
    assert "Traceback" not in err
    assert not (tmp_path / "r").exists()


def test_compare_architectures_and_call_it_again(call, tmp_path, monkeypatch):
    # Memory is measured in processes of their own: in tests/test_compare.py.
    monkeypatch.setattr(
        "timemix.experiments.measurements.measure_training", lambda config, steps: StepSpeed(1.0, 64.0, None)
    )
    (tmp_path / "my.txt").write_text(TEXT)
    options = ["--data", "my.txt", "--arch", "rwkv1", "mha_shift", "--tokens", "1.536k", "--seeds", "2", "--no-tune"]
    status, out, err = call("compare", *options, "--out", "c", "--json")
    assert status == 0
    table = json.loads(out)
    assert [(row["name"], row["chosen"]) for row in table["variants"]] == [("rwkv1", {}), ("mha_shift", {})]
    assert err.splitlines()[-1] == "the comparison is in c: loss.png, report.html, table.md"
    status, out, err = call("compare", *options, "--out", "c")
    assert status == 0
    assert out == (tmp_path / "c/table.md").read_text()
    assert "held-out loss" not in err
    assert (
        call("plot", "c/variants/rwkv1/seed-1", "c/variants/rwkv1/seed-2", "--out", "p.svg", "--smoothing", "0")[0] == 0
    )
    # The runs are ordinary runs.
    assert call("sample", "c/variants/mha_shift/seed-1", "--prompt", "the", "--tokens", "3")[0] == 0


@pytest.mark.parametrize(
    ("archs", "points"),
    [(("rwkv1", "rwkv7"), [6, 3]), (("rwkv6", "rwkv7", "llama"), [3, 3, 3]), (("rwkv4",), [3]), (("mha_pro",), [6])],
)
def test_compare_tunes_what_each_architecture_has(archs, points):
    experiment = _of_architectures(CompareArguments(arch=archs))
    assert [len(experiment.points_of(variant)) for variant in experiment.variants] == points


def test_compare_stopped_by_ctrl_c_goes_on(tmp_path):
    (tmp_path / "my.txt").write_text(TEXT)
    options = ["--data", "my.txt", "--arch", "rwkv1", "--seeds", "1", "--no-tune", "--out", "c"]
    process = subprocess.Popen(
        [sys.executable, "-m", "timemix", "compare", *options], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "c/variants/rwkv1/seed-1/metrics.jsonl"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and len(metrics.read_text()) > 200:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    estimate, stopped = err.splitlines()
    assert re.fullmatch(r"unfinished runs: 1, about [\d:]+ in one process", estimate)
    assert stopped == "timemix: stopped; the same command resumes the comparison in c"
    (saved,) = (tmp_path / "c/variants/rwkv1/seed-1/checkpoints").iterdir()
    config = metrics.with_name("config.toml")
    assert int(saved.name[5:]) < int(re.search(r"steps = (\d+)", config.read_text())[1])


def test_inspect_prints_draws_and_gives_json(trained, use):
    status, out, err = use("inspect", "runs/mine", "--tokens", "200")
    assert status == 0, err
    assert re.search(r"^    3  ffn    value ", out, re.MULTILINE)
    pictures = [line for line in out.splitlines() if line.endswith(".png")]
    assert pictures == [f"runs/mine/inspect/{name}.png" for name in ("tables", "projections", "shift")]
    assert all((trained / p).stat().st_size > 3000 for p in pictures)
    _, out, _ = use("inspect", "runs/mine", "--data", "my.txt", "--tokens", "200", "--json", "--out", "i")
    assert len(json.loads(out)["projections"]) == 4 * 6


def test_a_run_without_held_out_text_needs_a_text(call, tmp_path):
    write_text_file(tmp_path)
    status, _, err = call("train", "--data", "text.txt", "--out", "all", "--data.valid-fraction", "0", *TINY)
    assert status == 0, err
    sentences = {
        "eval": "a loss needs at least 2 tokens, but the held-out text of the run has 0; name a text",
        "inspect": "the held-out text of the run has 0 tokens, but at least 2 are needed; add --data",
    }
    for verb, words in sentences.items():
        status, _, err = call(verb, "all")
        assert status == 2
        assert err == f"timemix: {words}\n"


def test_inspect_of_a_run_without_weights_says_what_can_be_shown(call, trained, tmp_path):
    shutil.copytree(trained / "runs/mine", tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine/checkpoints")
    status, _, err = call("inspect", "mine")
    assert status == 2
    assert "mine has no checkpoint" in err
    assert err.endswith("draw its losses with: timemix plot mine\n")


def test_prompt_characters_outside_the_vocabulary_are_named(use):
    status, _, err = use("sample", "runs/mine", "--prompt", "the Ωmega")
    assert status == 2
    assert "Ω" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--temperature", "-1", "--temperature is -1.0; it must be at least 0"),
        ("--top-k", "-1", "--top-k is -1; it must be a whole number, at least 0\n"),
        ("--top-p", "0", "--top-p is 0.0"),
        ("--tokens", "0", "at least 1"),
        ("--prompt", "", "empty"),
        ("--checkpoint", "77", "it has best, newest"),
        ("--seed", "-1", "--seed is -1; it must be"),
        ("--count", "0", "--count is 0; it must be at least 1"),
    ],
)
def test_wrong_sampling_values(use, option, value, words):
    status, _, err = use("sample", "runs/mine", option, value)
    assert status == 2
    assert words in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_the_readme_as_it_stands(tmp_path):
    """Every command and every block of Python of the README runs; the training is shorter."""
    (tmp_path / "my.txt").write_text(TEXT + "It was so.\n" * 40)
    result = run("demo", "--steps", "20", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(re.findall("^Sample ", result.stdout, re.MULTILINE)) == 3
    next_commands = re.findall(r"^  (.*timemix .*)$", result.stdout, re.MULTILINE)
    assert len(next_commands) == 3
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    (commands,) = blocks(ROOT / "README.md", "sh")
    lines = commands.splitlines() + next_commands[:2]
    assert len(lines) > 6
    for line in lines:
        if line.startswith("timemix train cpu-small"):
            line = line.partition("#")[0] + " ".join(QUICK)
        if line.startswith("timemix compare"):
            line = line.partition("#")[0] + "--tokens 3072 --seeds 2 --no-tune"
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    for block in blocks(ROOT / "README.md", "python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            InvalidValue("train.batch_size=3 is odd; lower model.ctx_len."),
            "--train.batch-size=3 is odd; lower --model.ctx-len.",
        ),
        (InvalidValue("'train.lr' is quoted, a/train.lr and train.lr.txt are files"), None),
        (InvalidValue("--train.lr is a flag, model.nothing no setting"), None),
        (FileError("c.toml: train.lr is 0"), None),
        (NotFinite("try a smaller train.lr"), "try a smaller --train.lr"),
    ],
)
def test_settings_are_printed_as_flags(error, sentence, monkeypatch, capsys):
    def fail(arguments):
        raise error

    monkeypatch.setattr("timemix.cli.train.train", fail)
    monkeypatch.setattr("timemix.cli.compare.compare", fail)
    with pytest.raises(SystemExit):
        main(["train"])
    assert capsys.readouterr().err == f"timemix: {sentence or error}\n"
    # The settings of a comparison are in its file.
    with pytest.raises(SystemExit):
        main(["compare"])
    assert capsys.readouterr().err == f"timemix: {error}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("sample runs/mine --top-p 2", "--top-p is 2.0; it must be above 0 and at most 1"),
        ("sample runs/mine --seed -1", "--seed is -1; it must be a whole number from 0 to 2^64 - 1"),
        ("eval runs/mine --text-key a", "--text-key has no effect without --data; leave --text-key out, or add --data"),
        (
            "eval runs/mine --data.keep-nul",
            "--keep-nul has no effect without --data; leave --keep-nul out, or add --data",
        ),
        (
            "inspect runs/mine --encoding=latin-1",
            "--encoding has no effect without --data; leave --encoding out, or add --data",
        ),
        ("eval runs/mine --stride 0", "--stride is 0; it must be a whole number from 1 to ctx_len (64)"),
        (
            "eval runs/mine --carry-state",
            "--carry-state is True, but the context of rwkv1 is bounded by ctx_len; leave it out, or use a run of"
            " rwkv1_exp, rwkv4, rwkv5, rwkv6, rwkv7",
        ),
        ("plot runs/mine --smoothing 3", "--smoothing is 3.0; it must be from 0 to 1"),
        ("bench op --heads 3", "--heads 3 does not divide --channels 512; nearest divisors: 2, 4"),
        ("bench op --ctx-lens 8 0", "--ctx-lens is [8, 0]; it must be one or more numbers, each at least 1"),
        ("bench op --batch-size 0", "--batch-size is 0; it must be at least 1"),
        ("demo --seconds 0", "--seconds is 0.0; it must be above 0 and finite"),
        ("demo --steps 0", "--steps is 0; it must be at least 1"),
        ("convert runs/mine --constant-state 2 --finetune 2 --lr -1 --out c", "--lr is -1.0; it must be at least 0"),
    ],
)
def test_errors_of_the_library_name_the_options_of_the_verb(use, arguments, sentence):
    assert use(*arguments.split()) == (2, "", f"timemix: {sentence}\n")
