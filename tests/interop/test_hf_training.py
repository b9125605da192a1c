"""Training of exported models in transformers: Trainer, activation checkpointing, and adapters of peft."""

import pytest
import torch

import timemix
from tests.helpers.exported import opened, trained
from tests.helpers.runs import TEXT
from timemix.interop.importing import import_run
from timemix.models.registry import ARCHITECTURES

pytestmark = pytest.mark.slow
pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments  # noqa: E402

TOKENS = 8


def train_steps(model, tokenizer, folder, steps, **options):
    rows = [tokenizer(TEXT[i * 20 : i * 20 + 10 + i]) for i in range(16)]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, learning_rate=1e-2, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        logging_steps=1, save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator, processing_class=tokenizer
    )
    trainer.train()
    return trainer, [each["loss"] for each in trainer.state.log_history if "loss" in each]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_trainer_saves_and_reloads(arch, tmp_path):
    loaded, folder = trained(tmp_path, arch)
    model, tokenizer = opened(folder)
    trainer, losses = train_steps(model, tokenizer, tmp_path / "trainer", 6)
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved/modeling_timemix.py").exists()
    assert not (tmp_path / "saved/hf.py").exists()
    again, _ = opened(tmp_path / "saved")
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    assert not torch.equal(again(ids).logits, loaded.model(ids)[0])
    text = again.generate(ids, do_sample=False, max_new_tokens=TOKENS)
    assert text.shape == (1, 7 + TOKENS)
    import_run(tmp_path / "saved", tmp_path / "next", folder / "tokenizer.json")
    own = timemix.load(tmp_path / "next").model
    assert own.config == loaded.model.config
    assert torch.equal(own(ids)[0], again(ids).logits)


def test_gradient_checkpointing_gives_equal_gradients(tmp_path):
    model, tokenizer = opened(trained(tmp_path)[1])
    ids = tokenizer(TEXT[:30], return_tensors="pt").input_ids
    found = []
    for enable in (False, True):
        if enable:
            model.activation_checkpointing_enable()
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        assert model.model.recompute == ("all" if enable else "none")
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_loss_is_that_of_timemix(tmp_path):
    loaded, folder = trained(tmp_path)
    model, _ = opened(folder)
    own = timemix.evaluate(loaded, TEXT[:30]).nats_per_token
    ids = torch.tensor(loaded.tokenizer.encode(TEXT[:30]).astype("int64"))[None]
    assert model(ids, labels=ids).loss.item() == pytest.approx(own, rel=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_adapters_of_peft(arch, tmp_path):
    """The C code of training reads the weights of linear maps, and must not leave out their adapters."""
    peft = pytest.importorskip("peft")
    _, folder = trained(tmp_path, arch)
    model, tokenizer = opened(folder)
    ids = tokenizer("the cat sat", return_tensors="pt").input_ids
    before = model(ids).logits
    linear = {name for name, x in model.named_modules() if isinstance(x, torch.nn.Linear)}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=sorted(linear - {"model.head"})))
    train_steps(adapted, tokenizer, tmp_path / "trainer", 3)
    trained_parts = {name: p for name, p in adapted.named_parameters() if "lora_B" in name}
    assert trained_parts
    assert all(p.abs().max() > 0 for p in trained_parts.values())
    adapted.eval()
    with torch.enable_grad():
        after = adapted(ids).logits
    assert not torch.equal(after, before)
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, after, atol=1e-5, rtol=0)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(opened(folder)[0], tmp_path / "adapter")
    torch.testing.assert_close(again(ids).logits, after, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.merge_and_unload()(ids).logits, after, atol=1e-5, rtol=0)
