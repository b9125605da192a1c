"""Runs that train an initial state or low-rank terms beside frozen weights."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import timemix
from tests.helpers.commands import run_command
from tests.helpers.ends import same_end, stop_at
from tests.helpers.models import heads_of
from tests.helpers.published import TEXT, imported
from tests.helpers.runs import small_config, small_trainer
from tests.helpers.serving import served
from timemix.config.run import read_toml
from timemix.data.config import DataConfig
from timemix.errors import DamagedFile, Interrupted, InvalidValue, MissingFile
from timemix.evaluation.loss import cross_entropy
from timemix.evaluation.texts import evaluate
from timemix.generation.decode import build_step
from timemix.generation.session import load_session
from timemix.interop.export import export_run
from timemix.models.learned_state import LearnedState
from timemix.runs.load import load
from timemix.runtime.distributed import World
from timemix.server.engine_thread import Served
from timemix.storage.torch_files import read_torch_file
from timemix.training.memory import training_memory
from timemix.training.parallel import check_shares
from timemix.training.start import new_run, resume_run

RECURRENT = ["rwkv1_exp", "rwkv4", "rwkv5", "rwkv6", "rwkv7"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the text text.txt and the trained run `rwkv7`."""
    folder = tmp_path_factory.mktemp("tuned")
    small_trainer(folder, "rwkv7", name="rwkv7", steps=6).run()
    return folder


def tuned_config(folder, tune, arch="rwkv7", **train):
    config = small_config(folder / "text.txt", arch, tune=tune, **({"lr": 5e-2, "weight_decay": 0.1} | train))
    return replace(config, start=str(folder / arch))


def with_state(arch):
    """Return a model with a learned state of random numbers, and the parameters of the state."""
    torch.manual_seed(3)
    model = timemix.build_model(arch, vocab_size=11, ctx_len=12, layers=2, channels=16, **heads_of(arch, 4)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Some initial values are zero, and would hide the state.
            if "mixer" in name and parameter.ndim == 2:
                parameter.normal_(std=0.3)
    model.learned_state = LearnedState(model.blocks)
    model.requires_grad_(False).double()
    with torch.no_grad():
        for parameter in model.learned_state.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.learned_state.requires_grad_(True)
    return model, list(model.learned_state.parameters())


def batch(length=12):
    generator = torch.Generator().manual_seed(4)
    return torch.randint(11, (3, length + 1), generator=generator)


def loss(model, tokens):
    return cross_entropy(model(tokens[:, :-1])[0], tokens[:, 1:])


@pytest.mark.parametrize("arch", RECURRENT)
def test_gradient_of_the_state_equals_finite_differences(arch):
    model, parameters = with_state(arch)
    tokens, step = batch(), 1e-5
    for own, gradient in zip(parameters, torch.autograd.grad(loss(model, tokens), parameters), strict=True):
        for at in (0, own.numel() // 2, own.numel() - 1):
            ends = []
            for sign in (step, -2 * step):
                with torch.no_grad():
                    own.view(-1)[at] += sign
                    ends.append(loss(model, tokens))
            with torch.no_grad():
                own.view(-1)[at] += step
            found = (ends[0] - ends[1]) / (2 * step)
            assert gradient.view(-1)[at].item() == pytest.approx(found.item(), rel=1e-5, abs=1e-9)
        assert gradient.abs().max() > 1e-6


@pytest.mark.parametrize("recompute", ["none", "cheap", "all"])
@pytest.mark.parametrize("arch", RECURRENT)
def test_gradient_in_float32_equals_that_in_float64(arch, recompute):
    wide, parameters = with_state(arch)
    expected = torch.autograd.grad(loss(wide, batch()), parameters)
    model, parameters = with_state(arch)
    model.float().recompute = recompute
    for own, exact in zip(torch.autograd.grad(loss(model, batch()), parameters), expected, strict=True):
        assert own.double().sub(exact).abs().max() <= 1e-4 * exact.abs().max()


@pytest.mark.parametrize("arch", RECURRENT)
def test_a_text_begins_with_the_learned_state(arch):
    """Training, prefill and single steps begin with the same state, and no call changes the parameters."""
    model, parameters = with_state(arch)
    before, tokens = [each.clone() for each in parameters], batch()
    with torch.no_grad():
        expected, _ = model(tokens)
        state = model.init_state(3)
        steps = []
        for token in tokens.split(1, 1):
            logits, state = model(token, state)
            steps.append(logits)
        assert torch.allclose(torch.cat(steps, 1), expected, atol=1e-9)
        model.learned_state = None
        assert not torch.allclose(model(tokens)[0], expected, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


@pytest.mark.parametrize("tune", ["state", "lora"])
def test_only_the_named_parameters_change(folder, tmp_path, tune):
    trainer = new_run(tuned_config(folder, tune), tmp_path / "run", progress=False)
    begun = trainer.validate()
    assert begun == evaluate(folder / "rwkv7").nats_per_token
    trainer.run()
    weights, base = trainer.model.state_dict(), load(folder / "rwkv7").model.state_dict()
    frozen = {name: x for name, x in weights.items() if not name.endswith((".down", ".up")) and "learned" not in name}
    assert len(frozen) == len(base)
    assert all(torch.equal(x, base[name.replace(".base", ".weight")]) for name, x in frozen.items())
    saved = load_file(load(tmp_path / "run", checkpoint="newest").folder / "model.safetensors")
    assert saved.keys() == weights.keys() - frozen.keys()
    loaded = load(tmp_path / "run")
    assert evaluate(loaded).nats_per_token == pytest.approx(trainer.validation.best, abs=1e-6)
    assert trainer.validation.best < begun


@pytest.mark.parametrize("tune", ["state", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_stopped_or_killed_run_ends_like_the_undisturbed_one(folder, tmp_path, tune):
    config = tuned_config(folder, tune, steps=9)
    new_run(config, tmp_path / "whole", progress=False).run()
    with pytest.raises(Interrupted):
        new_run(config, tmp_path / "stopped", progress=False).run(stop_at(3))
    resume_run(tmp_path / "stopped").run()
    same_end(tmp_path / "whole", tmp_path / "stopped")

    def die(progress):
        if progress.step == 6:
            raise MemoryError

    with pytest.raises(MemoryError):
        new_run(config, tmp_path / "killed", progress=False).run(die)
    resumed = resume_run(tmp_path / "killed")
    assert resumed.step == 4
    resumed.run()
    same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    "arch", ["rwkv1", "rwkv7", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("rwkv4", "llama", "mha_pro"))]
)
def test_merged_weights_give_the_logits_of_the_terms(tmp_path, arch):
    small_trainer(tmp_path, arch, name=arch, steps=2).run()
    trainer = new_run(tuned_config(tmp_path, "lora", arch, steps=4), tmp_path / "run", progress=False)
    trainer.run()
    tokens = torch.arange(32).view(2, 16) % trainer.config.model.vocab_size
    # With gradients, linear maps compute their low-rank terms; without, they merge the terms into their weights.
    own = trainer.model.eval()(tokens)[0].detach()
    with torch.no_grad():
        assert torch.allclose(trainer.model(tokens)[0], own, atol=1e-6)
        assert torch.allclose(load(tmp_path / "run", checkpoint="newest").model(tokens)[0], own, atol=1e-6)
        assert not torch.allclose(load(tmp_path / arch).model(tokens)[0], own, atol=1e-3)


def test_lora_of_any_rank_begins_exactly_at_the_base(folder, tmp_path):
    config = tuned_config(folder, "lora", lora_rank=40, lora_modules=("mixer.*", "ffn.value"))
    trainer = new_run(config, tmp_path / "run", progress=False)
    assert trainer.model.blocks[0].mixer.key.up.shape == (16, 40)
    tokens = torch.arange(16)[None]
    expected = load(folder / "rwkv7").model(tokens)[0]
    assert torch.equal(trainer.model.eval()(tokens)[0], expected)
    assert torch.equal(load(tmp_path / "run").model(tokens)[0], expected)


RANKS = ("*", "mixer.*=3", "mixer.key=5", "ffn.value=2")


def test_the_last_name_that_matches_sets_the_rank(folder, tmp_path):
    config = tuned_config(folder, "lora", lora_rank=7, lora_modules=RANKS)
    trainer = new_run(config, tmp_path / "run", progress=False)
    trainer.run()
    block = trainer.model.blocks[1]
    found = {name: len(own) for name, own in block.named_parameters() if name.endswith("down")}
    assert {found[f"{name}.down"] for name in ("mixer.receptance", "mixer.value", "mixer.output")} == {3}
    assert [found[f"{name}.down"] for name in ("mixer.key", "ffn.key", "ffn.value")] == [5, 7, 2]
    assert [module.scale for module in (block.mixer.key, block.ffn.key, block.ffn.value)] == [16 / 5, 16 / 7, 8]
    tokens = torch.arange(16)[None]
    own = trainer.model.eval()(tokens)[0]
    loaded = load(tmp_path / "run", checkpoint="newest").model
    assert torch.allclose(loaded(tokens)[0], own, atol=1e-6)
    export_run(tmp_path / "run", "pth", tmp_path / "exported", checkpoint="newest")
    written = read_torch_file(tmp_path / "exported/model.pth")["blocks.1.ffn.value.weight"]
    down, up = block.ffn.value.down, block.ffn.value.up
    assert torch.allclose(written, block.ffn.value.base + 8 * up @ down, atol=1e-6)
    assert not torch.equal(written, block.ffn.value.base)


@pytest.mark.slow
def test_a_stopped_run_with_several_ranks_ends_like_the_undisturbed_one(folder, tmp_path):
    config = tuned_config(folder, "lora", steps=6, lora_modules=RANKS)
    new_run(config, tmp_path / "whole", progress=False).run()
    with pytest.raises(Interrupted):
        new_run(config, tmp_path / "stopped", progress=False).run(stop_at(3))
    resume_run(tmp_path / "stopped").run()
    same_end(tmp_path / "whole", tmp_path / "stopped")
    with pytest.raises(
        InvalidValue,
        match=r"train.lora_modules=\* cannot change when .* is resumed: the run has \* mixer.\*=3 mixer.key=5 ffn",
    ):
        resume_run(tmp_path / "stopped", train={"lora_modules": ("*",), "steps": 20})


@pytest.fixture(scope="module")
def style(folder):
    """A run that has tuned a state beside the weights of `rwkv7`, and its exported session."""
    new_run(tuned_config(folder, "state", lr=0.5), folder / "style", progress=False).run()
    return folder / "style"


def test_an_exported_state_continues_in_the_base_like_the_run(style, capsys):
    status, _, err = run_command(capsys, "export", style, "--to", "state", "--out", style.parent / "exported")
    assert (status, err) == (0, "")
    path = style.parent / "exported/learned.state"
    session = load_session(path, load(style.parent / "rwkv7").model)
    assert (session.tokens, session.unread, int(session.state.position)) == ((), 0, 0)
    options = ("--tokens", 30, "--seed", 5)
    _, own, _ = run_command(capsys, "sample", style, *options)
    _, loaded, _ = run_command(capsys, "sample", style.parent / "rwkv7", "--load-state", path, *options)
    _, plain, _ = run_command(capsys, "sample", style.parent / "rwkv7", *options)
    assert own == loaded != plain
    _, prompted, _ = run_command(
        capsys, "sample", style.parent / "rwkv7", "--load-state", path, "--prompt", "the ", *options
    )
    assert prompted == run_command(capsys, "sample", style, "--prompt", "the ", *options)[1]


def test_a_server_of_the_base_reads_an_exported_state(style, tmp_path):
    export_run(style, "state", tmp_path / "exported")
    base, own = load(style.parent / "rwkv7"), "state-" + 32 * "a"
    with served([Served("mine", timemix.Engine(base.model, base.tokenizer), "float32", 1)]) as server:
        content = (tmp_path / "exported/learned.state").read_bytes()
        assert server.call(f"/v1/states/{own}", content, "PUT").json["tokens"] == 0
        body = {"state": own, "prompt": "the ", "max_tokens": 20, "seed": 0}
        answer = server.call("/v1/completions", body).json["choices"][0]["text"]
        assert answer == timemix.generate(load(style), "the ", tokens=20)[0]
        chat = {"state": own, "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 5}
        assert server.call("/v1/chat/completions", chat).status == 200
        empty = server.call("/v1/completions", {"state": own, "max_tokens": 5})
        assert empty.json["error"]["message"] == "the prompt is empty; give at least one token"


def test_the_session_is_little_larger_than_the_state(tmp_path):
    config = small_config(tmp_path / "text.txt", "rwkv7")
    (tmp_path / "text.txt").write_text("the cat sat. " * 99)
    config = replace(config, model=replace(config.model, channels=256, heads=4))
    new_run(replace(config, train=replace(config.train, steps=1)), tmp_path / "rwkv7", progress=False).run()
    tuned = replace(config, train=replace(config.train, tune="state", steps=1), start=str(tmp_path / "rwkv7"))
    new_run(tuned, tmp_path / "run", progress=False).run()
    export_run(tmp_path / "run", "state", tmp_path / "exported")
    matrices = 2 * 4 * 64 * 64 * 4
    assert matrices < (tmp_path / "exported/learned.state").stat().st_size < 1.1 * matrices


def test_every_step_of_generation_begins_with_the_learned_state(style):
    expected = timemix.generate(load(style), "the ", tokens=9)
    mapped = load(style, mapped=True).model
    assert mapped.is_mapped
    tokens, rows, counts = torch.tensor([3, 4, 5]), torch.zeros(1, dtype=torch.int64), torch.tensor([3])
    logits = []
    for model in (mapped, load(style).model):
        for backend in ("auto", "model"):
            logits.append(build_step(model, backend=backend)(tokens, model.init_state(1), rows, counts)[0])
    assert all(torch.allclose(each, logits[0], atol=1e-5) for each in logits)
    assert timemix.generate(load(style, mapped=True), "the ", tokens=9) == expected


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["state", "lora"])
def test_frozen_weights_in_other_number_formats(tmp_path, tune):
    """Weights in bfloat16 are trained in float32, and a run in float64 loads in float64."""
    base = imported(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    old = read_toml(base / "config.toml")
    for precision, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        train = replace(old.train, steps=2, tune=tune, precision=precision, lr=1e-2)
        config = replace(old, train=train, data=DataConfig(source=str(tmp_path / "text.txt")), start=str(base))
        trainer = new_run(config, tmp_path / precision, progress=False)
        trainer.run()
        loaded = load(tmp_path / precision)
        assert {x.dtype for x in loaded.model.state_dict().values()} == {dtype}
        assert evaluate(loaded).nats_per_token == pytest.approx(trainer.validation.best, abs=1e-6)
    timemix.generate(load(tmp_path / "float32", mapped=True), "the ", tokens=3)


@pytest.mark.slow
def test_an_export_merges_low_rank_terms(folder, tmp_path):
    trainer = new_run(tuned_config(folder, "lora"), tmp_path / "run", progress=False)
    trainer.run()
    export_run(tmp_path / "run", "pth", tmp_path / "exported", checkpoint="newest")
    found = read_torch_file(tmp_path / "exported/model.pth")
    assert torch.equal(found["blocks.1.att.key.weight"], trainer.model.blocks[1].mixer.key.weight)
    own = load(tmp_path / "run", checkpoint="newest").model.state_dict()
    export_run(tmp_path / "run", "hf", tmp_path / "hf", checkpoint="newest")
    written = load_file(tmp_path / "hf/model.safetensors")
    assert written.keys() == {f"model.{name}" for name in own}
    assert all(torch.equal(written[f"model.{name}"], x) for name, x in own.items())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("to", ["pth", "hf", "gguf", "onnx"])
def test_other_programs_cannot_begin_with_a_learned_state(style, tmp_path, capsys, to):
    status, out, err = run_command(capsys, "export", style, "--to", to, "--out", tmp_path / "exported")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "has a learned state, which no published form holds; export it with --to state" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_tuned_run_can_be_tuned_again(style, folder, tmp_path):
    again = replace(tuned_config(folder, "state", lr=0.5, seed=2), start=str(style))
    trainer = new_run(again, tmp_path / "again", progress=False)
    assert trainer.validate() == evaluate(style).nats_per_token
    trainer.run()
    export_run(tmp_path / "again", "state", tmp_path / "exported")
    load_session(tmp_path / "exported/learned.state", load(folder / "rwkv7").model)


def test_the_estimate_counts_frozen_weights_once(folder):
    model = replace(tuned_config(folder, "all").model, channels=256, heads=4, vocab_size=4096)
    small = {name: training_memory(model, tuned_config(folder, name).train, "float32") for name in ("state", "lora")}
    whole = training_memory(model, tuned_config(folder, "all").train, "float32")
    assert small["state"] < small["lora"] < 0.5 * whole


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"lora_modules": ("mixer.kye",)},
            "train.lora_modules has 'mixer.kye', which matches no linear map of a block;",
        ),
        ({"lora_modules": ()}, "train.lora_modules is empty; give at least one name, such as mixer.key"),
        (
            {"lora_modules": ("mixer.key=0",)},
            "train.lora_modules has 'mixer.key=0'; it must be NAME=RANK",
        ),
        ({"lora_modules": ("mixer.key=",)}, "train.lora_modules has 'mixer.key='; it must be NAME=RANK"),
        ({"lora_modules": ("=8",)}, "train.lora_modules has '=8'; it must be NAME=RANK"),
        (
            {"lora_modules": ("mixer.key=4,ffn.key",)},
            "train.lora_modules has 'mixer.key=4,ffn.key'; it must be NAME=RANK with a rank from 1 to 65536, such as"
            " mixer.key=16, and spaces between several of them",
        ),
        ({"lora_modules": ("mixer.kye=4",)}, "train.lora_modules has 'mixer.kye', which matches no linear map"),
        ({"lora_rank": 0}, "train.lora_rank is 0; it must be at least 1"),
        ({"lora_alpha": 0.0}, "train.lora_alpha is 0.0; it must be above 0 and finite"),
        ({"optimizer": "muon"}, "train.optimizer is 'muon', which trains all matrices, but train.tune is 'lora';"),
    ],
)
def test_settings_that_cannot_work(folder, tmp_path, train, message):
    with pytest.raises(InvalidValue) as error:
        new_run(tuned_config(folder, "lora", **train), tmp_path / "run")
    assert str(error.value).startswith(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arch", ["rwkv1", pytest.param("llama", marks=pytest.mark.slow)])
def test_an_architecture_without_a_recurrent_state(tmp_path, arch):
    small_trainer(tmp_path, arch, name=arch, steps=1).run()
    with pytest.raises(InvalidValue, match="has no recurrent state; set train.tune to 'lora', or start from a"):
        new_run(tuned_config(tmp_path, "state", arch), tmp_path / "run")


def test_wrong_starts(style, folder, tmp_path, capsys):
    config = small_config(folder / "text.txt", "rwkv7", tune="state")
    with pytest.raises(InvalidValue, match=r"train.tune is 'state', which needs trained weights; start from a run"):
        new_run(config, tmp_path / "run")
    with pytest.raises(InvalidValue, match="has a learned state, which train.tune 'lora' would lose"):
        new_run(replace(tuned_config(folder, "lora"), start=str(style)), tmp_path / "run")
    with pytest.raises(InvalidValue, match="train.tune=lora cannot change when .* is resumed: the run has state"):
        resume_run(style, train={"tune": "lora", "steps": 20})
    status, _, err = run_command(capsys, "export", folder / "rwkv7", "--to", "state", "--out", tmp_path / "exported")
    assert status == 2
    assert "has no learned state; train one with: timemix train --from" in err


def test_several_processes_are_refused(style):
    train = load(style).config.train
    with pytest.raises(InvalidValue, match="train.tune is 'state', which supports one process, not 2; start one"):
        check_shares(train, World(size=2))


def test_changed_or_missing_frozen_weights(folder, tmp_path):
    base, run = tmp_path / "rwkv7", tmp_path / "run"
    shutil.copytree(folder / "rwkv7", base)
    new_run(replace(tuned_config(folder, "lora"), start=str(base)), run, progress=False).run()
    checkpoint = load(base).folder
    other = small_trainer(tmp_path, "rwkv7", name="other", steps=6, seed=2)
    other.run()
    shutil.copy(load(tmp_path / "other").folder / "model.safetensors", checkpoint)
    for use in (load, lambda run: resume_run(run, train={"steps": 20})):
        with pytest.raises(DamagedFile, match="have changed since they were tuned; restore them from a copy"):
            use(run)
    shutil.rmtree(base)
    with pytest.raises(MissingFile, match="the frozen weights of this run do not exist"):
        load(run)


def test_a_session_without_tokens_needs_no_tokens_alone(style, tmp_path):
    """An unread token that does not exist is still an error."""
    export_run(style, "state", tmp_path / "exported")
    model, path = load(style.parent / "rwkv7").model, tmp_path / "exported/learned.state"
    content = path.read_bytes()
    about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["timemix_session"]
    assert '"unread": 0' in about
    path.write_bytes(content.replace(b'unread\\": 0', b'unread\\": 1'))
    with pytest.raises(DamagedFile, match="its tokens do not fit the model"):
        load_session(path, model)
