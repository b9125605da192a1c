"""Keys that identify equal runs, and the names of the fields in which two experiments differ."""

import json
from dataclasses import replace
from hashlib import sha256
from typing import Any

from timemix.config.run import RunConfig
from timemix.config.version_1 import flattened, nested
from timemix.data.corpus import Corpus
from timemix.models.config import ModelConfig
from timemix.storage.settings import to_dict


def run_keys(config: RunConfig, corpus: Corpus) -> list[str]:
    """Return hashes that identify equal runs, computed from the config without paths and device, and from the tokens.

    Args:
        config: Config of the run.
        corpus: Tokens of the run.

    Returns:
        The hash in the current version, then the hash in version 1 if version 1 had the architecture.
    """
    info = corpus.info
    hashes = [info.train.sha256, info.valid.sha256, info.tokenizer.sha256]
    hashes += [split.counted.sha256 for split in (info.train, info.valid) if split.counted is not None]
    # The token hashes cover all other fields of `data` and the vocabulary, so later fields of `data` change no key.
    plain = replace(
        config,
        model=replace(config.model, vocab_size=ModelConfig.vocab_size),
        data=config.data.with_source(""),
        train=replace(config.train, device=""),
    )
    form = to_dict(plain)
    # Omit settings that later versions added, if the values do not change the run.
    for name in ("sample_every", "sample_prompts", "hook_errors") + (() if plain.train.patience else ("patience",)):
        del form["train"][name]
    for name in ("tune", "lora_rank", "lora_alpha", "lora_modules"):
        if plain.train.tune == "all":
            del form["train"][name]
    for name in ("hold_out", "keep_nul", "text_key", "template", "end_of_text", "shuffle", "drop_duplicates"):
        form["data"].pop(name, None)
    if plain.data.cross_documents:
        form["data"].pop("cross_documents", None)
    if not form["model"].get("without"):
        form["model"].pop("without", None)
    forms = [form]
    if (old := nested(plain.model)) is not None:
        forms.append(forms[0] | {"model": old})
    return [sha256(json.dumps([form, hashes], sort_keys=True).encode()).hexdigest() for form in forms]


def settings_key(config: RunConfig, *others: object) -> str:
    """Return a hash of the settings that determine the speed and the memory of a training step.

    Args:
        config: Config of a run, with the size of the vocabulary.
        *others: Further values for the hash, in JSON types.
    """
    names = ("batch_size", "contexts", "accumulation", "optimizer", "precision", "recompute")
    train = {name: getattr(config.train, name) for name in names}
    model = {k: v for k, v in to_dict(config.model).items() if k != "initial"}
    # A setting that a later version added, if its value does not change the model.
    if not model.get("without"):
        model.pop("without", None)
    return sha256(json.dumps([model, train, *others], sort_keys=True).encode()).hexdigest()


def difference(theirs: Any, ours: dict[str, Any]) -> str:
    """Return the names of fields that differ between two experiments and determine the runs, as text; "" if none.

    Args:
        theirs: Content of experiment.json, a file that may be damaged.
        ours: The experiment that is compared with the file.
    """

    def runs(experiment: Any) -> dict[str, Any]:
        fields = {n: experiment[n] for n in ("tokens", "seconds", "seeds", "preset", "tune")}
        fields["base"] = flattened(_without_source(experiment["base"]))
        fields["tune"] = flattened(fields["tune"])
        return fields | {"variants": [(v["name"], flattened(v["set"])) for v in experiment["variants"]]}

    try:
        old, new = runs(theirs), runs(ours)
    except (KeyError, TypeError, AttributeError):
        return "the kind of experiment, unless experiment.json is damaged"
    return ", ".join(name for name in new if old[name] != new[name])


def _without_source(base: Any) -> Any:
    """Return the fields without the paths of the text, because a hash identifies the text."""
    data = {k: v for k, v in base.get("data", {}).items() if k not in ("source", "valid")}
    return {k: v for k, v in base.items() if k != "data"} | ({"data": data} if data else {})
