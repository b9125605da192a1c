"""Tiny trained models in exported folders, and the models of transformers that open the folders."""

from dataclasses import replace

import timemix
from tests.helpers.runs import TEXT, small_config, with_model
from timemix.interop.export import export_run


def trained(folder, arch="rwkv7", text=TEXT, **data):
    """Train a tiny model and export it; return the loaded run and the folder."""
    (folder / "text.txt").write_text(text, encoding="utf-8")
    config = with_model(small_config(folder / "text.txt", arch), ctx_len=32)
    timemix.train(replace(config, data=replace(config.data, **data)), folder / "run")
    export_run(folder / "run", "hf", folder / "hf")
    return timemix.load(folder / "run"), folder / "hf"


def opened(folder, **options):
    """Return the model and the tokenizer in a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import timemix.hf  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval(), AutoTokenizer.from_pretrained(folder)
