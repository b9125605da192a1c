"""A trained rwkv1 with a constant state: the same model as far as its curves are fitted, and an ordinary run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import timemix
from tests.helpers.models import varied
from tests.helpers.pairwise import pairwise
from tests.helpers.runs import small_config, small_trainer, with_model, write_text_file
from timemix import generate
from timemix.config.run import RunConfig, TrainConfig
from timemix.errors import InvalidValue
from timemix.evaluation.loss import loss_by_position
from timemix.experiments import convert as conversion
from timemix.models.registry import model_config
from timemix.models.rwkv1 import fitting
from timemix.models.rwkv1.to_exponential import with_exponentials
from timemix.runs import folder as run_folder
from timemix.runs.listing import list_runs
from timemix.training.start import new_run, resume_run


@pytest.fixture(autouse=True)
def _fewer_steps(request, monkeypatch):
    """The fast tier refines fits less; its bounds hold all the same."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(fitting, "STEPS", 60)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trainer = small_trainer(tmp_path_factory.mktemp("convert"), steps=60, save_every=60, valid_every=60)
    trainer.run()
    return trainer.out


def call(capsys, *arguments):
    from timemix.cli.main import main

    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


SMALL = {"vocab_size": 11, "layers": 2, "heads": 2, "channels": 8, "ctx_len": 12}


@pytest.mark.parametrize(("sizes", "tables"), pairwise([(12, 0), (1, 12), (3, 12)], [True, False], strength=1))
def test_where_the_fit_is_exact_it_is_the_same_model(sizes, tables):
    """As many exponentials as lags, or taps: any curve."""
    K, M = sizes
    old = varied(model_config("rwkv1", alpha=tables, beta=tables, gamma=tables, **SMALL))
    new, fits = with_exponentials(old, K, M)
    x = torch.randint(0, 11, (3, 12))
    torch.testing.assert_close(new(x)[0], old(x)[0], atol=2e-3 if M == 0 else 1e-10, rtol=0)
    assert max(fit.error for fit in fits) < (0.02 if M == 0 else 1e-12)
    assert [(fit.layer, fit.head) for fit in fits] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_taps_are_exact_and_the_rest_is_fitted():
    old = varied(model_config("rwkv1", alpha=False, **SMALL))
    new, fits = with_exponentials(old, 2, 3)
    f = torch.stack([b.mixer.f for b in old.blocks])
    curve = torch.stack([b.mixer.curve() for b in new.blocks])
    torch.testing.assert_close(curve[..., :3], f[..., :3])
    assert not torch.allclose(curve[..., 3:], f[..., 3:])
    without, _ = with_exponentials(old, 2)
    assert without.blocks[0].mixer.taps is None
    assert fits[0].f == pytest.approx(f[0, 0].tolist())


@pytest.mark.parametrize(
    ("model", "numbers", "words"),
    [
        (model_config("mha_pro", **SMALL), (4,), "a run of mha_pro cannot get a constant state; use a run of rwkv1"),
        (model_config("rwkv1_exp", **(SMALL | {"exponentials": 4})), (4,), "a run of rwkv1_exp cannot get"),
        (model_config("rwkv1", weights="free", **SMALL), (4,), "a free W has no curves"),
        (model_config("rwkv1", denominator="weighted", **SMALL), (4,), "weighted denominator"),
        (model_config("rwkv1", **SMALL), (0,), "exponentials is 0; it must be from 1 to the run's ctx_len, 12"),
        (model_config("rwkv1", **SMALL), (13,), "exponentials is 13"),
        (model_config("rwkv1", **SMALL), (4, 13), "taps is 13; it must be from 0"),
        (model_config("rwkv1", **SMALL), (4, -1), "taps is -1"),
    ],
)
def test_what_cannot_be_converted_is_refused(model, numbers, words):
    with pytest.raises(InvalidValue, match=words):
        with_exponentials(varied(model), *numbers)


def test_weights_that_are_not_finite_are_refused():
    old = varied(model_config("rwkv1", **SMALL))
    with torch.no_grad():
        old.blocks[1].mixer.f[0, 2] = float("nan")
    with pytest.raises(InvalidValue, match="not finite"):
        with_exponentials(old, 2)


def test_the_new_run_is_like_any_other(run, tmp_path, capsys):
    out = tmp_path / "new"
    status, text, _ = call(capsys, "convert", run, "--constant-state", 8, "--taps", 1, "--out", out)
    assert status == 0
    assert "8 exponentials, 1 taps" in text
    assert {p.name for p in out.iterdir()} >= {"config.toml", "checkpoints", "fit.png", "convert.json"}
    report = json.loads((out / "convert.json").read_text())
    assert len(report["fits"]) == 8
    loaded, old = timemix.load(out), timemix.load(run)
    assert (loaded.config.model.arch, loaded.config.model.exponentials) == ("rwkv1_exp", 8)
    assert loaded.config.start == str(old.folder)

    status, text, _ = call(capsys, "eval", out, "--json")
    own = json.loads(text)["nats_per_token"]
    assert own == pytest.approx(json.loads(call(capsys, "eval", run, "--json")[1])["nats_per_token"], abs=0.02)
    assert run_folder.read_progress(loaded.folder).valid_loss == pytest.approx(own)
    assert len(generate(loaded, "the cat", tokens=100)[0]) == 100
    assert call(capsys, "inspect", out)[0] == 0
    options = ["--train.steps", 3, "--train.contexts", 3, "--train.precision", "float32"]
    status, _, errors = call(capsys, "train", "--from", out, "--out", tmp_path / "next", *options)
    assert status == 0, errors


def test_without_fine_tuning_the_new_run_is_complete(run, tmp_path, capsys):
    out = tmp_path / "new"
    assert call(capsys, "convert", run, "--constant-state", 8, "--out", out)[0] == 0
    (listed,) = list_runs(out)
    assert (listed.state, listed.step, listed.steps) == ("complete", 0, 0)
    assert listed.valid_loss == run_folder.read_progress(run_folder.newest(out)).valid_loss is not None
    assert not (out / ".lock.json").exists()
    more = f"{out} is complete: 0 steps; train it longer with: timemix train --resume {out} --train.steps 2000\n"
    assert call(capsys, "train", "--resume", out) == (0, more, "")
    status, _, errors = call(capsys, "train", "--from", out, "--out", tmp_path / "next")
    assert (status, errors) == (2, "timemix: --train.steps is 0; give a new run at least 1 step\n")
    assert not (tmp_path / "next").exists()

    weights = run_folder.newest(out) / "model.safetensors"
    before = weights.read_bytes()
    status, _, errors = call(capsys, "train", "--resume", out, "--train.steps", 2)
    assert status == 0, errors
    assert (list_runs(out)[0].state, list_runs(out)[0].step) == ("complete", 2)
    assert (run_folder.newest(out) / "model.safetensors").read_bytes() != before


def test_a_failed_conversion_leaves_no_lock(run, tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyError("a failure")

    monkeypatch.setattr(conversion, "losses_by_range", fail)
    with pytest.raises(KeyError):
        conversion.convert_run(conversion.Conversion(8, tmp_path / "new"), timemix.load(run), lambda *_: None)
    assert not (tmp_path / "new" / ".lock.json").exists()


def test_several_sizes_and_a_fine_tune(run, tmp_path, capsys):
    out = tmp_path / "new"
    options = ["--constant-state", 1, 8, "--finetune", 20, "--lr", 2e-3, "--out", out, "--json"]
    status, text, errors = call(capsys, "convert", run, *options)
    assert status == 0, errors
    report = json.loads(text)
    assert json.loads((out / "convert.json").read_text()) == report
    one, eight = report["converted"]
    assert one["before"]["0-1"] > eight["before"]["0-1"]
    for row in report["converted"]:
        assert row["after"]["4-8"] < row["before"]["4-8"]
        assert set(row["after"]) == set(report["original"]) == {"0-1", "1-4", "4-8", "8-16"}
    loaded = timemix.load(out / "8", checkpoint="newest")
    assert (loaded.config.train.contexts, loaded.config.train.batch_size) == (4, 1)
    forget = loaded.model.blocks[0].mixer.forget
    assert (forget != np.float32(-np.log(1 - 1 / 16))).all()
    assert (out / "8" / "loss.png").exists()


@pytest.mark.parametrize(
    ("arch", "sentence"),
    [
        ("mha_rotary", "a run of mha_rotary cannot get a constant state; use a run of rwkv1"),
        ("rwkv7", "a run of rwkv7 already has a constant state; use the run as it is"),
    ],
)
def test_an_unfit_architecture_is_one_sentence_on_the_command_line(tmp_path, capsys, arch, sentence):
    trainer = small_trainer(tmp_path, arch)
    trainer.run()
    status, _, errors = call(capsys, "convert", trainer.out, "--constant-state", 4, "--out", tmp_path / "new")
    assert (status, errors.count("\n")) == (2, 1)
    assert sentence in errors
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--out my.txt", "my.txt exists already; choose another folder"),
        ("--out new --data nothing.txt", "'nothing.txt' is not a file, folder or download"),
        ("--out new --finetune 1 --lr -1", "--lr is -1.0; it must be at least 0"),
        ("--out new --lr 1", "--lr has no effect without --finetune; leave --lr out, or add --finetune STEPS"),
        ("--out new --constant-state", "--constant-state has no number; give at least one, such as"),
        ("--out new --constant-state 2 3 2", "--constant-state is 2 3 2; give each number once"),
    ],
)
def test_a_bad_option_is_refused_before_the_fit(run, tmp_path, monkeypatch, capsys, options, sentence):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("")
    monkeypatch.setattr(fitting, "STEPS", None)  # A fit would fail.
    given = [] if "--constant-state" in options else ["--constant-state", 2]
    arguments = [*given, *options.split()]
    status, _, errors = call(capsys, "convert", run, *arguments)
    assert (status, errors.count("\n")) == (2, 1)
    assert errors.startswith(f"timemix: {sentence}")
    assert not Path("new").exists()


def test_windows_of_several_contexts(tmp_path):
    """A stopped and resumed run is bit-identical to a whole run. An architecture whose context ends is refused."""
    config = small_config(write_text_file(tmp_path), "rwkv1_exp", contexts=3, batch_size=2, save_every=4)
    config = with_model(config, exponentials=4, taps=2)
    whole = new_run(config, tmp_path / "whole")
    assert whole.batches(0)[0].shape == (2, 48)
    assert whole.tokens_per_step == 96
    whole.run()
    halted = new_run(config, tmp_path / "halted")

    def crash(progress):
        if progress.step == 5:
            raise KeyError("power cut")

    with pytest.raises(KeyError):
        halted.run(crash)
    resume_run(halted.out).run()
    a, b = (timemix.load(tmp_path / n, checkpoint="newest").model.state_dict() for n in ("whole", "halted"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(InvalidValue, match=r"train.contexts is 2, but the context of rwkv1 is bounded by ctx_len"):
        RunConfig(train=TrainConfig(contexts=2))
    with pytest.raises(InvalidValue, match=r"train.contexts is 0"):
        TrainConfig(contexts=0)


@torch.no_grad()
@pytest.mark.parametrize("ctx_len", [5, 6])
def test_losses_past_the_context(ctx_len):
    """Whenever its context ends, rwkv1 re-reads the newest half; rwkv1_exp continues."""
    text = np.random.default_rng(0).integers(0, 11, 41).astype(np.uint8)
    small = SMALL | {"ctx_len": ctx_len}
    old = varied(model_config("rwkv1", **small))
    length, half = 3 * ctx_len, ctx_len // 2
    rows = torch.from_numpy(text[: 2 * length + 1].astype(np.int64))
    inputs, targets = rows[:-1].view(2, length), rows[1:].view(2, length)
    expected = []
    for t in range(length):
        begin = max(0, -(-(t + 1 - ctx_len) // (ctx_len - half))) * (ctx_len - half)
        logits, _ = old(inputs[:, begin : t + 1])
        expected.append(float(F.cross_entropy(logits[:, -1], targets[:, t])))
    np.testing.assert_allclose(loss_by_position(old, text, contexts=3), expected, rtol=1e-9)
    new = varied(model_config("rwkv1_exp", **(small | {"exponentials": 3})))
    logits, _ = new(inputs)
    own = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(0)
    np.testing.assert_allclose(loss_by_position(new, text, contexts=3), own, rtol=1e-9)
    with pytest.raises(InvalidValue, match=f"a window of {9 * ctx_len} needs"):
        loss_by_position(old, text, contexts=9)


def test_settings_out_of_range():
    for fields, words in (
        ({"exponentials": 0}, "model.exponentials is 0; it must be at least 1"),
        ({"exponentials": 13}, "model.exponentials is 13; it must be at most 12"),
        ({"taps": -1}, "model.taps is -1"),
    ):
        with pytest.raises(InvalidValue, match=words):
            model_config("rwkv1_exp", ctx_len=12, **fields)
