"""What makes two runs of comparisons the same, and two experiments different."""

import json
from dataclasses import replace
from hashlib import sha256
from typing import Any

from timemix.config.run import RunConfig
from timemix.config.version_1 import flattened, nested
from timemix.data.config import DataConfig
from timemix.data.corpus import Corpus
from timemix.models.config import ModelConfig
from timemix.storage.settings import to_dict


def run_keys(config: RunConfig, corpus: Corpus) -> list[str]:
    """Identifies what a run computes: its config as written and its tokens, not where they lie or what runs it.

    The first is of this version; the second, where version 1 had the architecture, of that.
    """
    info = corpus.info
    hashes = [info.train.sha256, info.valid.sha256, info.tokenizer.sha256]
    # The tokens' hashes say what the other fields of `data` and the vocabulary do; later fields change no key.
    plain = replace(
        config,
        model=replace(config.model, vocab_size=ModelConfig.vocab_size),
        data=DataConfig(source="", order=config.data.order),
        train=replace(config.train, device=""),
    )
    form = to_dict(plain)
    # Younger settings, where they leave a run as it was before there were such.
    for name in ("sample_every", "hook_errors") + (() if plain.train.patience else ("patience",)):
        del form["train"][name]
    for name in ("hold_out", "keep_nul"):
        del form["data"][name]
    forms = [form]
    if (old := nested(plain.model)) is not None:
        forms.append(forms[0] | {"model": old})
    return [sha256(json.dumps([form, hashes], sort_keys=True).encode()).hexdigest() for form in forms]


def difference(theirs: Any, ours: dict[str, Any]) -> str:
    """Names of the fields that decide a run and differ; empty where none does."""

    def runs(experiment: Any) -> dict[str, Any]:
        fields = {n: experiment[n] for n in ("tokens", "seconds", "seeds", "preset", "tune")}
        fields["base"] = flattened(_without_source(experiment["base"]))
        fields["tune"] = flattened(fields["tune"])
        return fields | {"variants": [(v["name"], flattened(v["set"])) for v in experiment["variants"]]}

    try:
        old, new = runs(theirs), runs(ours)
    except (KeyError, TypeError, AttributeError):
        return "it is of another kind, or damaged"
    return ", ".join(name for name in new if old[name] != new[name])


def _without_source(base: Any) -> Any:
    """What decides a run but the place of its text, which is known by its hash."""
    data = {k: v for k, v in base.get("data", {}).items() if k not in ("source", "valid")}
    return {k: v for k, v in base.items() if k != "data"} | ({"data": data} if data else {})
