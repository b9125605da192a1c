"""Other context lengths: equal results within the old context, sensible tables past it, and further training."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import timemix
from tests.helpers.models import varied
from tests.helpers.runs import TEXT, small_config, small_trainer, with_model, write_text_file
from timemix.data.config import DataConfig
from timemix.data.prepare import prepare
from timemix.errors import InvalidValue, Unfit
from timemix.models.language_model import LanguageModel
from timemix.models.registry import model_config
from timemix.runs import folder as run_folder
from timemix.training.start import new_run, resume_run


def resized(model: LanguageModel, ctx_len: int) -> LanguageModel:
    other = LanguageModel(replace(model.config, ctx_len=ctx_len)).double()
    other.load_state_dict(model.block.resized(model.state_dict(), model.config, ctx_len))
    return other


MIXERS = {
    "rwkv1": {},
    "rwkv1 weighted": {"denominator": "weighted"},
    "rwkv1 without alpha": {"alpha": False},
    "rwkv1 without tables": {"alpha": False, "beta": False, "gamma": False},
    "rwkv1_exp": {"exponentials": 1, "taps": 1},
    "mha_rotary": {},
    "mha_shift": {},
    "mha_pro": {},
}


@pytest.mark.parametrize("ctx_len", [1, 5, 12, 13, 40])
@pytest.mark.parametrize("name", MIXERS)
def test_within_both_contexts_it_is_the_same_model(name, ctx_len):
    model = varied(
        model_config(name.split()[0], vocab_size=11, layers=2, heads=3, channels=12, ctx_len=12, **MIXERS[name])
    )
    other = resized(model, ctx_len)
    T = min(ctx_len, 12)
    tokens = torch.randint(0, 11, (2, T))
    torch.testing.assert_close(other(tokens)[0], model(tokens)[0], atol=1e-10, rtol=1e-10)
    longest = torch.randint(0, 11, (1, ctx_len))
    assert other(longest)[0].isfinite().all()


@pytest.mark.parametrize("arch", ["rwkv1", "mha_pro"])
def test_longer_tables_are_the_mean_of_the_last_quarter_and_level(arch):
    model = varied(model_config(arch, vocab_size=11, layers=1, heads=2, channels=8, ctx_len=16))
    mixer = model.blocks[0].mixer
    time = torch.arange(16, dtype=torch.float64)
    with torch.no_grad():
        # The same W as with constant tables, expressed by growing ones.
        mixer.alpha.copy_((0.07 * time).exp().expand(2, 16))
        mixer.beta.copy_((-0.07 * time).exp().expand(2, 16))
        mixer.f.copy_((0.07 * time).exp().expand(2, 16) * torch.tensor([[1.0], [0.5]]))
    longer = resized(model, 24).blocks[0].mixer
    torch.testing.assert_close(longer.alpha, torch.ones(2, 24).double())
    torch.testing.assert_close(longer.beta, torch.ones(2, 24).double())
    torch.testing.assert_close(longer.f, torch.tensor([[1.0], [0.5]]).double().expand(2, 24))
    torch.testing.assert_close(longer.gamma[16:], model.blocks[0].mixer.gamma[12:].mean().expand(8))


def test_tables_that_cross_zero_are_extended_as_they_are():
    model = varied(model_config("rwkv1", vocab_size=11, layers=1, heads=2, channels=8, ctx_len=8))
    with torch.no_grad():
        model.blocks[0].mixer.alpha[0, 3] = -0.5
    mixer, longer = model.blocks[0].mixer, resized(model, 10).blocks[0].mixer
    for name in ("f", "alpha", "beta"):
        table = getattr(mixer, name)
        expected = torch.cat([table, table[:, 6:].mean(1, keepdim=True).expand(2, 2)], 1)
        torch.testing.assert_close(getattr(longer, name), expected)


def test_a_free_w_can_be_cut_but_not_extended():
    config = model_config("rwkv1", vocab_size=11, layers=1, heads=2, channels=8, ctx_len=8, weights="free")
    model = LanguageModel(config).double()
    assert resized(model, 5).blocks[0].mixer.f.shape == (2, 5, 5)
    with pytest.raises(
        InvalidValue, match="a free W cannot be extended from ctx_len 8 to 9; set model.ctx_len to at most 8"
    ):
        model.block.resized(model.state_dict(), config, 9)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trainer = small_trainer(tmp_path_factory.mktemp("start"), steps=40, save_every=40, valid_every=20)
    trainer.run()
    return trainer


class TestGoingOnFromARun:
    @pytest.fixture(autouse=True)
    def _same_text(self, tmp_path):
        write_text_file(tmp_path)

    def config(self, run, source, **model):
        config = small_config(source, steps=6, valid_every=3, save_every=3)
        return with_model(replace(config, start=str(run.out)), vocab_size=run.config.model.vocab_size, **model)

    def test_it_begins_with_the_weights_of_the_other(self, run, tmp_path):
        trainer = new_run(self.config(run, tmp_path / "text.txt"), tmp_path / "next")
        for name, tensor in run.model.state_dict().items():
            assert torch.equal(trainer.model.state_dict()[name], tensor)
        trainer.run()
        first = json.loads((trainer.out / "metrics.jsonl").read_text().splitlines()[0])
        assert first["valid_loss"] == run.validation.loss
        assert timemix.load(trainer.out).config.start == str(run.out)

    def test_with_a_longer_context_the_loss_stays_near(self, run, tmp_path):
        trainer = new_run(self.config(run, tmp_path / "text.txt", ctx_len=24, dropout=0.1), tmp_path / "next")
        assert trainer.validate() < run.validation.loss + 0.5 < math.log(trainer.config.model.vocab_size)
        trainer.run()

    def test_a_new_text_is_read_with_the_old_vocabulary(self, run, tmp_path):
        (tmp_path / "new.txt").write_text("the hat. " * 100)
        trainer = new_run(self.config(run, tmp_path / "new.txt"), tmp_path / "next")
        assert trainer.corpus.tokenizer.hash == run.corpus.tokenizer.hash
        assert trainer.corpus.tokenizer.decode(trainer.corpus.train[:8]) == "the hat."

    def test_unknown_characters_are_named(self, run, tmp_path):
        (tmp_path / "new.txt").write_text("the hät. " * 100)
        with pytest.raises(Unfit, match=r"the vocabulary has no 'ä' \(U\+00E4\)"):
            new_run(self.config(run, tmp_path / "new.txt"), tmp_path / "next")
        assert not (tmp_path / "next").exists()

    def test_another_vocabulary_is_refused_and_its_characters_named(self, run, tmp_path):
        (tmp_path / "new.txt").write_text(TEXT.replace("d", "ö"))
        prepare(tmp_path / "tokens", DataConfig(source=str(tmp_path / "new.txt")))
        with pytest.raises(InvalidValue, match=r"the vocabulary of .*tokens is not that of .*'ö' .*, .*'d' "):
            new_run(self.config(run, tmp_path / "tokens"), tmp_path / "next")

    def test_another_model_is_refused(self, run, tmp_path):
        words = r"model.channels=32 differs from 16 in .*step-\d+; leave model.channels out"
        with pytest.raises(InvalidValue, match=words):
            new_run(self.config(run, tmp_path / "text.txt", channels=32), tmp_path / "next")
        assert not (tmp_path / "next").exists()

    def test_killed_before_its_first_checkpoint_it_begins_with_them_again(self, run, tmp_path):
        config = self.config(run, tmp_path / "text.txt", ctx_len=20)
        new_run(config, tmp_path / "whole").run()
        killed = new_run(config, tmp_path / "killed")

        def crash(progress):
            if progress.step == 2:
                raise KeyError("power cut")

        with pytest.raises(KeyError):
            killed.run(crash)
        assert [c.name for c in run_folder.checkpoints(killed.out)] == ["step-00000000"]
        resume_run(killed.out).run()
        a, b = (timemix.load(tmp_path / name, checkpoint="newest").model.state_dict() for name in ("whole", "killed"))
        assert all(torch.equal(a[name], b[name]) for name in a)

    def test_on_the_command_line(self, run, tmp_path, capsys):
        from timemix.cli.main import main

        def call(*arguments):
            with pytest.raises(SystemExit) as stop:
                main(["train", "--from", str(run.out), "--out", str(tmp_path / "next"), *arguments])
            return stop.value.code, capsys.readouterr().err

        status, errors = call("cpu-small")
        assert (status, "Traceback" in errors) == (2, False)
        assert call("--model.arch", "mha_rotary")[0] == 2
        status, errors = call("--model.ctx-len", "24", "--train.steps", "4", "--train.lr", "1e-4")
        assert status == 0, errors
        config = timemix.load(tmp_path / "next").config
        assert (config.model.ctx_len, config.model.channels, config.train.batch_size) == (24, 16, 4)
        assert config.data.source == run.config.data.source


def test_the_differences_of_vocabularies(tmp_path):
    def tokenizer(text, name, **options):
        (tmp_path / f"{name}.txt").write_text(text * 20)
        return prepare(tmp_path / name, DataConfig(source=str(tmp_path / f"{name}.txt"), **options)).tokenizer

    a, b = tokenizer("abc ", "a"), tokenizer("abd ", "b")
    assert a.differences(b) == "only the first vocabulary has 'c' (U+0063), only the second vocabulary has 'd' (U+0064)"
    assert (
        a.differences(tokenizer("abc ", "byte", tokenizer="byte"))
        == "the first tokenizer is of kind character, the second of kind byte"
    )
    assert np.array_equal(a.encode("abc"), [1, 2, 3])
