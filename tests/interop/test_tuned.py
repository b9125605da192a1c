"""States and low-rank terms of RWKV-PEFT: layouts, merged weights and damaged or foreign files."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import timemix
from tests.helpers.commands import run_command
from tests.helpers.original_code import Golden
from tests.helpers.published import imported, published_weights
from tests.helpers.runs import small_trainer
from timemix.errors import AlreadyExists, DamagedFile, InvalidValue
from timemix.generation.session import load_session
from timemix.interop.importing import import_run
from timemix.interop.tuned import import_tuned
from timemix.runs.load import load
from timemix.tokenizers.make import train_tokenizer
from timemix.training.start import new_run

RANK = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of published weights of RWKV-7 in bfloat16."""
    return imported(tmp_path_factory.mktemp("base"))


def save(folder, tensors):
    torch.save(tensors, folder / "a.pth")
    return folder / "a.pth"


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def states(run):
    model = load(run).model
    shape = model.init_state(1).layers[0]["wkv"].shape[1:]
    return {f"blocks.{i}.att.time_state": random(*shape) + i for i in range(len(model.blocks))}


def terms(stem="blocks.1.att.key", inputs=None):
    outputs, own = published_weights()[f"{stem}.weight"].shape
    return {f"{stem}.lora_A": random(RANK, inputs or own), f"{stem}.lora_B": random(outputs, RANK)}


def test_a_state_of_rwkv7_holds_values_by_keys(run, tmp_path, capsys):
    tensors = states(run)
    status, out, _ = run_command(
        capsys, "import", save(tmp_path, tensors), "--for", run, "--out", tmp_path / "s", "--json"
    )
    assert (status, out.startswith('{"states": 2, "session": ')) == (0, True)
    session = load_session(tmp_path / "s", load(run).model)
    assert (session.tokens, int(session.state.position)) == ((), 0)
    for i, layer in enumerate(session.state.layers):
        assert torch.equal(layer["wkv"][0], tensors[f"blocks.{i}.att.time_state"])
        assert not layer["mixer_shift"].any()
    _, text, _ = run_command(capsys, "sample", run, "--load-state", tmp_path / "s", "--tokens", 20)
    assert text != run_command(capsys, "sample", run, "--tokens", 20)[1]


@pytest.mark.parametrize("arch", ["rwkv5", "rwkv6"])
def test_a_state_of_earlier_versions_is_transposed(arch, tmp_path):
    weights = Golden(arch, torch.float64).published("weights")
    letters = "".join(chr(0x4E00 + i) for i in range(len(weights["emb.weight"])))
    train_tokenizer("character", letters).save(tmp_path / "tokenizer.json")
    import_run(save(tmp_path, weights), tmp_path / "run", ctx_len=32)
    tensors = states(tmp_path / "run")
    import_tuned(save(tmp_path, tensors), tmp_path / "run", tmp_path / "s")
    layer = load_session(tmp_path / "s", load(tmp_path / "run").model).state.layers[1]
    assert torch.equal(layer["wkv"][0], tensors["blocks.1.att.time_state"].transpose(1, 2))


def test_low_rank_terms_are_merged_in_the_number_format_of_the_run(run, tmp_path):
    tensors = terms() | terms("blocks.0.ffn.value")
    assert import_tuned(save(tmp_path, tensors), run, tmp_path / "out", alpha=6).tensors == 2
    before, after = load(run, mapped=True).model.state_dict(), load(tmp_path / "out", mapped=True).model.state_dict()
    changed = {"blocks.1.mixer.key.weight": "blocks.1.att.key", "blocks.0.ffn.value.weight": "blocks.0.ffn.value"}
    for name, old in before.items():
        expected = old
        if stem := changed.get(name):
            product = tensors[f"{stem}.lora_B"].double() @ tensors[f"{stem}.lora_A"].double()
            expected = (old.double() + 6 / RANK * product).to(torch.bfloat16)
        assert after[name].dtype == torch.bfloat16
        assert torch.allclose(after[name].float(), expected.float(), rtol=8e-3)
        assert torch.equal(after[name], old) == (name not in changed)
    timemix.generate(load(tmp_path / "out"), "the ", tokens=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: {}, "has neither a tuned state (att.time_state) nor low-rank terms (lora_A, lora_B); give"),
        (lambda own: own | {"emb.weight": random(2, 2)}, "holds the weight 'emb.weight' too; merge all weights"),
        (lambda own: dict(list(own.items())[:1]), "lacks 'blocks.1.att.time_state'; give the file and the run"),
        (lambda own: own | {"blocks.2.att.time_state": random(2)}, "has the unknown tensor 'blocks.2.att.time_state'"),
        (lambda own: own | {"blocks.1.att.time_state": random(2, 2)}, "'blocks.1.att.time_state' is [2, 2], not ["),
        (lambda own: {n: x / 0 for n, x in own.items()}, "has a number that is not finite; restore it from a copy"),
        (lambda own: {n: x.double() * 1e300 for n, x in own.items()}, "has numbers that exceed float32; give a state"),
        (lambda own: terms(inputs=5), "does not fit the run: 'blocks.1.att.key.lora_A' is [3, 5], not [3, "),
        (lambda own: dict(list(terms().items())[:1]), "lacks 'blocks.1.att.key.lora_B'"),
        (lambda own: {"blocks.9.att.key.lora_A": random(2, 2)}, "has low-rank terms of 'blocks.9.att.key', which the"),
        (lambda own: terms() | {"blocks.1.att.key.lora_A": torch.tensor(1.0)}, "'blocks.1.att.key.lora_A' is [], not"),
        (lambda own: own | terms(), "has the unknown tensor 'blocks.1.att.key.lora_A'"),
    ],
)
def test_a_file_that_does_not_fit(run, tmp_path, change, message):
    path = save(tmp_path, change(states(run)))
    with pytest.raises(DamagedFile) as error:
        import_tuned(path, run, tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_run_with_a_learned_state_is_refused(tmp_path):
    base = small_trainer(tmp_path, "rwkv7", name="base", steps=1)
    base.run()
    config = replace(base.config, start=str(base.out), train=replace(base.config.train, tune="state"))
    tuned = new_run(config, tmp_path / "tuned", progress=False)
    tuned.run()
    with pytest.raises(InvalidValue, match="tuned has a learned state; give the run whose weights were frozen: .*base"):
        import_tuned(save(tmp_path, terms()), tuned.out, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_file(run, tmp_path):
    path = save(tmp_path, states(run))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedFile):
        import_tuned(path, run, tmp_path / "out")


def test_wrong_uses(run, tmp_path, capsys):
    path = save(tmp_path, states(run))
    with pytest.raises(AlreadyExists):
        import_tuned(path, run, path)
    with pytest.raises(InvalidValue, match="lora_alpha is 0; it must be above 0 and finite"):
        import_tuned(path, run, tmp_path / "out", alpha=0)
    numbers = terms()
    for dtype in (torch.int32, torch.float8_e4m3fn):
        save_file({name: x.to(dtype) for name, x in numbers.items()}, tmp_path / "a.safetensors")
        with pytest.raises(DamagedFile, match=f"in {dtype}; give bfloat16, float16, float32 or float64"):
            import_tuned(tmp_path / "a.safetensors", run, tmp_path / "out")
    (tmp_path / "large").mkdir()
    large = save(tmp_path / "large", {name: 1e30 * x for name, x in numbers.items()})
    with pytest.raises(InvalidValue, match=r"the low-rank terms of .* exceed torch\..* with lora_alpha 16; give the"):
        import_tuned(large, run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InvalidValue, match="lora_alpha has no effect on .*a.pth, which holds a tuned state; leave"):
        import_tuned(path, run, tmp_path / "out", alpha=16)
    small_trainer(tmp_path, "rwkv4", name="rwkv4", steps=1).run()
    with pytest.raises(InvalidValue, match="is a model of rwkv4, which has no matrix states; give a run of"):
        import_tuned(path, tmp_path / "rwkv4", tmp_path / "out")
    small_trainer(tmp_path, "llama", name="llama", steps=1).run()
    with pytest.raises(InvalidValue, match="is a model of llama, which has no published form; give a run of RWKV-4"):
        import_tuned(path, tmp_path / "llama", tmp_path / "out")
    arguments = ("import", path, "--for", run, "--out", tmp_path / "out", "--tokenizer", "a.json")
    status, _, err = run_command(capsys, *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert "--tokenizer excludes --for: the model has the tokenizer of" in err
