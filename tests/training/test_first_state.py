"""State tuning that begins with the state of a session (`--from-state`)."""

from dataclasses import replace

import pytest
import torch

import timemix
from tests.helpers.commands import run_command
from tests.helpers.ends import same_end, stop_at
from tests.helpers.runs import small_config, small_trainer
from timemix.config.run import read_toml
from timemix.errors import Interrupted, InvalidValue
from timemix.generation.session import load_session
from timemix.interop.export import export_run
from timemix.runs.load import load
from timemix.training.start import new_run, resume_run

SLOW = pytest.mark.slow
RECURRENT = ["rwkv7", *(pytest.param(arch, marks=SLOW) for arch in ("rwkv4", "rwkv5", "rwkv6"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the text text.txt, the trained run `rwkv7` and the session after a text, the.state."""
    folder = tmp_path_factory.mktemp("first")
    small_trainer(folder, "rwkv7", name="rwkv7", steps=6).run()
    save_session(folder, "rwkv7")
    return folder


def save_session(folder, arch):
    """Write the session after a text of 16 tokens, of which the newest is not in the state yet."""
    run = timemix.load(folder / arch)
    engine = timemix.Engine(run.model, run.tokenizer)
    engine.add(timemix.Request(run.tokenizer.encode("the cat ").tolist(), tokens=8, keep_session=True))
    events = [event for _ in range(12) if engine.busy for event in engine.step()]
    assert events[-1].session.unread == 1
    timemix.save_session(events[-1].session, folder / "the.state", run.model)


def tuned_config(folder, arch="rwkv7", state="the.state", **train):
    config = small_config(folder / "text.txt", arch, tune="state", **({"lr": 5e-2} | train))
    return replace(config, start=str(folder / arch), start_state=str(folder / state))


def continued(folder, arch, tokens):
    """Return the logits of the frozen model after the session, whose token-shift is set to zero."""
    model = load(folder / arch).model
    session = load_session(folder / "the.state", model)
    with torch.no_grad():
        _, state = model(torch.tensor([session.tokens[-1:]]), session.state)
        for layer in state.layers:
            for name in ("mixer_shift", "ffn_shift"):
                layer[name].zero_()
        return model(tokens, state)[0]


@pytest.mark.parametrize("arch", RECURRENT)
def test_the_first_forward_continues_the_session(tmp_path, arch):
    small_trainer(tmp_path, arch, name=arch, steps=4).run()
    save_session(tmp_path, arch)
    tokens = torch.arange(10)[None] % 7
    model = new_run(tuned_config(tmp_path, arch), tmp_path / "run", progress=False).model.eval()
    with torch.no_grad():
        own = model(tokens)[0]
        assert torch.allclose(own, continued(tmp_path, arch, tokens), atol=1e-5)
        assert not torch.allclose(own, load(tmp_path / arch).model(tokens)[0], atol=1e-4)
        assert torch.allclose(load(tmp_path / "run").model(tokens)[0], own, atol=1e-6)


@SLOW
def test_dropout_does_not_change_the_first_state(folder, tmp_path):
    config = tuned_config(folder)
    config = replace(config, model=replace(config.model, dropout=0.5))
    own = new_run(config, tmp_path / "dropout", progress=False).model.state_dict()
    plain = new_run(tuned_config(folder), tmp_path / "plain", progress=False).model.state_dict()
    assert all(torch.equal(own[name], x) for name, x in plain.items())


@SLOW
@pytest.mark.parametrize("arch", ["rwkv4", "rwkv1_exp", "rwkv7"])
def test_an_exported_state_is_tuned_further(tmp_path, arch):
    """The state of an export has no token-shift, so the first forward equals the continued session."""
    small_trainer(tmp_path, arch, name=arch, steps=2).run()
    first = replace(tuned_config(tmp_path, arch, lr=0.5), start_state=None)
    new_run(first, tmp_path / "style", progress=False).run()
    export_run(tmp_path / "style", "state", tmp_path / "exported", checkpoint="newest")
    again = new_run(tuned_config(tmp_path, arch, "exported/learned.state"), tmp_path / "again", progress=False)
    tokens = torch.arange(10)[None] % 7
    base = load(tmp_path / arch).model
    session = load_session(tmp_path / "exported/learned.state", base)
    with torch.no_grad():
        own = again.model.eval()(tokens)[0]
        assert torch.allclose(own, base(tokens, session.state)[0], atol=1e-5)
        assert not torch.allclose(own, base(tokens)[0], atol=1e-3)


@SLOW
def test_a_stopped_run_does_not_need_the_session_again(folder, tmp_path):
    (tmp_path / "the.state").write_bytes((folder / "the.state").read_bytes())
    config = replace(tuned_config(folder, steps=6), start_state=str(tmp_path / "the.state"))
    new_run(config, tmp_path / "whole", progress=False).run()
    with pytest.raises(Interrupted):
        new_run(config, tmp_path / "stopped", progress=False).run(stop_at(3))
    (tmp_path / "the.state").unlink()
    resume_run(tmp_path / "stopped").run()
    same_end(tmp_path / "whole", tmp_path / "stopped")


def test_a_session_of_rwkv1_exp_after_a_text_is_refused(tmp_path):
    small_trainer(tmp_path, "rwkv1_exp", name="rwkv1_exp", steps=1).run()
    save_session(tmp_path, "rwkv1_exp")
    with pytest.raises(InvalidValue, match="a state of rwkv1_exp depends on its position in the text, and a learned"):
        new_run(tuned_config(tmp_path, "rwkv1_exp"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@SLOW
def test_the_command_line(folder, tmp_path, capsys):
    small = ("--data", folder / "text.txt", "--train.tune", "state", "--train.steps", 2, "--quiet")
    command = ("train", "--from", folder / "rwkv7", *small)
    assert run_command(capsys, *command, "--from-state", folder / "the.state", "--out", tmp_path / "run")[0] == 0
    assert read_toml(tmp_path / "run/config.toml").start_state == str(folder / "the.state")
    again = ("train", "--config", tmp_path / "run/config.toml", "--out", tmp_path / "again", "--quiet")
    assert run_command(capsys, *again)[0] == 0
    same_end(tmp_path / "run", tmp_path / "again")
    onwards = ("train", "--from", tmp_path / "run", *small, "--out", tmp_path / "next")
    assert run_command(capsys, *onwards)[0] == 0
    assert read_toml(tmp_path / "next/config.toml").start_state is None


def wrong_files(folder, tmp_path):
    """Return files that are no session of `rwkv7`, and a part of the message for each file."""
    content = (folder / "the.state").read_bytes()
    (tmp_path / "short").write_bytes(content[:-50])
    (tmp_path / "text").write_text("the cat")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    other = small_trainer(tmp_path, "rwkv7", name="other", steps=1, seed=2)
    other.run()
    save_session(tmp_path, "other")
    return {
        "missing": "missing",
        "short": "short is damaged",
        "text": "text is damaged",
        "empty": "empty is damaged",
        "folder": "folder",
        "the.state": "holds a session of another model (rwkv7); use it with the run that saved it",
        "text.txt": "is damaged",
    }


@SLOW
def test_wrong_files_and_options(folder, tmp_path, capsys):
    command = ("train", "--from", folder / "rwkv7", "--data", folder / "text.txt", "--out", tmp_path / "run", "--quiet")
    for name, message in wrong_files(folder, tmp_path).items():
        status, out, err = run_command(capsys, *command, "--train.tune", "state", "--from-state", tmp_path / name)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert message in err
    given = ("--from-state", folder / "the.state")
    for tune in ("all", "lora"):
        status, out, err = run_command(capsys, *command, *given, "--train.tune", tune)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"needs --train.tune 'state', but --train.tune is '{tune}'; set --train.tune to 'state'" in err
    alone = ("train", "--data", folder / "text.txt", "--out", tmp_path / "run", *given)
    status, _, err = run_command(capsys, *alone, "--train.tune", "state")
    assert (status, err.count("\n")) == (2, 1)
    assert "needs trained weights; start from a run (--from RUN)" in err
    status, _, err = run_command(capsys, "train", "--resume", folder / "rwkv7", *given)
    assert (status, err.count("\n")) == (2, 1)
    assert "--from-state gives the first state of a new run, and" in err
    assert not (tmp_path / "run").exists()
