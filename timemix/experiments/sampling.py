"""Compare filters of next-token probabilities at equal entropy, and sweep the factors of top-a.

Two models train on one text: a writer model and a larger judge model. With every setting, the writer model continues
the same pieces of held-out text. The measurements of each generated text are its loss under the judge model, its
repetition and its variety. Differences between settings are paired by text.

The folder OUT has the run folders `writer` and `judge`, the tokens in `data`, and table.json, table.md and top-a.png.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from timemix.config.run import RunConfig
from timemix.data.batches import validation_windows
from timemix.data.corpus import Corpus, is_corpus, open_corpus, open_prepared
from timemix.data.describe import text_hash
from timemix.data.prepare import prepare
from timemix.data.shards import Tokens
from timemix.errors import FileError, InUse, InvalidValue
from timemix.evaluation.loss import cross_entropy
from timemix.experiments.jobs import begin_or_resume, on_corpus, refuse_foreign
from timemix.experiments.measurements import saved_measurements
from timemix.experiments.sampling_report import (
    N_GRAM,
    POWER,
    TOP_A,
    Measured,
    SamplingTable,
    Setting,
    TextFigures,
    build_table,
    draw_table,
    to_markdown,
)
from timemix.experiments.spec import PROMPT_TOKENS, SamplingExperiment
from timemix.generation.generate import generate_tokens
from timemix.generation.sampler import Sampler
from timemix.models.language_model import LanguageModel
from timemix.runs.folder import newest, read_progress
from timemix.runs.load import load
from timemix.storage.files import write_text
from timemix.storage.json_files import read_json, to_json
from timemix.storage.locks import claimed

POSITIONS = 8192
"""Largest number of held-out positions for the measurement of the mean entropy."""


def run_sampling(
    experiment: SamplingExperiment, out: Path, say: Callable[[str], None], device: str = "auto"
) -> SamplingTable:
    """Train writer and judge model, generate and measure texts with every setting, and write the table to a folder.

    A stopped experiment resumes training at the last checkpoint, and skips the settings in measurements.json.

    Args:
        experiment: The experiment.
        out: Folder of the experiment.
        say: Function that prints a progress line.
        device: PyTorch device.

    Returns:
        The table.

    Raises:
        InUse: Another process is working in the folder `out`.
        FileError: The folder `out` has another experiment, or a file is damaged or cannot be written.
        InvalidValue: The held-out text is too short.
    """
    with claimed(out / ".lock") as mine:
        if not mine:
            raise InUse(f"another process is working in {out}; wait until it ends, or choose another folder")
        corpus = _corpus(experiment, out)
        writer = _trained(experiment.config("writer"), corpus, out, "writer", device, say)
        judge = _trained(experiment.config("judge"), corpus, out, "judge", device, say)
        prompts = _prompts(corpus, experiment.samples)
        logits = held_out_logits(writer, corpus.valid)
        settings = like_entropy(experiment, logits) + sweep(experiment)
        path = out / "measurements.json"
        found: dict[str, Measured] = saved_measurements(path, Measured)
        for setting in settings:
            if setting.label not in found:
                texts = generate_tokens(writer, prompts, experiment.tokens, setting.sampler)
                figures = to_json(measure_text(texts, prompts, judge))
                measured = Measured(**figures, entropy=mean_entropy(setting.sampler, logits))
                found[setting.label] = measured
                write_text(path, json.dumps({label: to_json(m) for label, m in found.items()}))
                say(f"{setting.label}: loss under the judge model {statistics.fmean(measured.judge_loss):.3f}")
        table = build_table(experiment, settings, found)
        write_text(out / "table.json", json.dumps(to_json(table), indent=1) + "\n")
        write_text(out / "table.md", to_markdown(table))
        draw_table(experiment, settings, table, logits, out / "top-a.png")
    return table


def _corpus(experiment: SamplingExperiment, out: Path) -> Corpus:
    config = experiment.config("writer").data
    path = out / "experiment.json"
    plain = json.loads(json.dumps(asdict(experiment)))
    plain["base"].get("data", {}).pop("source", None)
    plain["base"].get("data", {}).pop("valid", None)
    ours = {"experiment": {k: v for k, v in plain.items() if k != "title"}, "text": text_hash(config)}
    if not path.exists():
        refuse_foreign(out)
        write_text(path, json.dumps(ours, indent=1))
    elif (theirs := read_json(path)) != ours:
        same = theirs.get("experiment") == ours["experiment"]
        what = "this experiment on another text" if same else "another experiment"
        raise FileError(f"{out} has {what}; choose another folder")
    if is_corpus(Path(config.source)):
        return open_prepared(config)
    folder = out / "data"
    return open_corpus(folder) if is_corpus(folder) else prepare(folder, config, progress=True)


def _trained(
    config: RunConfig, corpus: Corpus, out: Path, name: str, device: str, say: Callable[[str], None]
) -> LanguageModel:
    """Train the run in OUT/NAME, or resume the unfinished run there, and return the trained model."""
    source = Path(config.data.source) if is_corpus(Path(config.data.source)) else out / "data"
    trainer = begin_or_resume(on_corpus(config, source, corpus, device), out / name)
    if trainer.step < trainer.config.train.steps:
        say(f"training {name}: {trainer.config.train.steps - trainer.step} steps")
        trainer.run()
    say(f"{name}: held-out loss {read_progress(newest(out / name)).valid_loss:.4f}")
    return load(out / name, device=str(trainer.device)).model


def _prompts(corpus: Corpus, count: int) -> list[list[int]]:
    """Return evenly spaced pieces of the held-out text as prompts, each of PROMPT_TOKENS tokens."""
    last = len(corpus.valid) - PROMPT_TOKENS
    if last < count:
        raise InvalidValue(
            f"the held-out text has {len(corpus.valid)} tokens, too few for {count} prompts; use more text or fewer"
            " samples"
        )
    return [corpus.valid[s : s + PROMPT_TOKENS].tolist() for s in (last * i // count for i in range(count))]


@torch.no_grad()
def held_out_logits(model: LanguageModel, tokens: np.ndarray | Tokens) -> Tensor:
    """Return the logits of a model at each position of the first held-out windows, (positions, V).

    Args:
        model: The model.
        tokens: Held-out token ids, (tokens,).
    """
    ctx_len = model.config.ctx_len
    rows = []
    for inputs, _ in validation_windows(tokens[: POSITIONS + 1], ctx_len, 64):
        rows.append(model(torch.from_numpy(inputs).to(model.device))[0].flatten(0, 1).cpu())
    return torch.cat(rows)


def mean_entropy(sampler: Sampler, logits: Tensor) -> float:
    """Return the mean entropy, in nats, of the filtered distributions of a sampler.

    Args:
        sampler: The sampler.
        logits: (positions, V).
    """
    p = sampler.probabilities(logits)
    return float(-torch.special.xlogy(p, p).sum(-1).mean())


def like_entropy(experiment: SamplingExperiment, logits: Tensor) -> list[Setting]:
    """Return settings of equal mean entropy at each temperature: top-a with the factors of 2021, and the other filters.

    Bisection finds the factor of each other filter that gives the entropy of top-a. Sampling without a filter ("plain")
    reaches the entropy of top-a with a lower temperature. The filter top-k uses the integer k with the nearest entropy.

    Args:
        experiment: The experiment.
        logits: Logits of the writer model, (positions, V).
    """
    settings = []
    for t in experiment.temperatures:
        ours = Sampler(temperature=t, top_a=TOP_A, top_a_power=POWER)
        target = mean_entropy(ours, logits)
        found = {
            "top-a": ours,
            "top-p": _solve(partial(_top_p, t), 1e-3, 1.0, target, logits),
            "min-p": _solve(partial(_min_p, t), 0.0, 1.0, target, logits),
            "top-k": _nearest_top_k(t, target, logits),
            "plain": _solve(lambda x: Sampler(temperature=x), 1e-3, t, target, logits),
        }
        settings += [Setting(f"{name} at {t:g}", t, sampler) for name, sampler in found.items()]
    return settings


def _top_p(temperature: float, x: float) -> Sampler:
    return Sampler(temperature=temperature, top_p=x)


def _min_p(temperature: float, x: float) -> Sampler:
    return Sampler(temperature=temperature, min_p=1 - x)


def _solve(make: Callable[[float], Sampler], low: float, high: float, target: float, logits: Tensor) -> Sampler:
    """Return the sampler that has a given mean entropy, found by bisection of one parameter x.

    Args:
        make: Function that returns the sampler for a value of x. The mean entropy must increase with x.
        low: Smallest x.
        high: Largest x.
        target: Wanted mean entropy in nats.
        logits: (positions, V).
    """
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_entropy(make(middle), logits) < target else (low, middle)
    return make(high)


def _nearest_top_k(temperature: float, target: float, logits: Tensor) -> Sampler:
    """Return the top-k sampler with the mean entropy nearest to `target`. The entropy increases with k."""
    low, high = 1, logits.shape[1]
    while high - low > 1:
        middle = (low + high) // 2
        above = mean_entropy(Sampler(temperature=temperature, top_k=middle), logits) > target
        low, high = (low, middle) if above else (middle, high)
    around = [Sampler(temperature=temperature, top_k=k) for k in (low, high)]
    return min(around, key=lambda s: abs(mean_entropy(s, logits) - target))


def sweep(experiment: SamplingExperiment) -> list[Setting]:
    """Return settings at temperature 1: sampling without a filter, and top-a with every pair of factor and power."""
    pairs = [(a, p) for a in experiment.top_a for p in experiment.powers]
    settings = [
        Setting(f"top-a {a:g}, power {p:g}", 1.0, Sampler(top_a=a, top_a_power=p)) for a, p in pairs
    ]  # fmt: skip
    return [Setting("no filter", 1.0, Sampler()), *settings]


def measure_text(texts: list[list[int]], prompts: list[list[int]], judge: LanguageModel) -> TextFigures:
    """Measure the loss of generated texts under the judge model, and the repetition and variety of these texts.

    Args:
        texts: Tokens of each generated text.
        prompts: Tokens of each prompt.
        judge: The larger model that measures the loss of the texts.
    """
    return TextFigures(
        judge_loss=tuple(_judge_loss(texts, prompts, judge)),
        repetition=tuple(1 - _distinct(p + t, N_GRAM) for p, t in zip(prompts, texts, strict=True)),
        variety=tuple(_distinct(t, 4) for t in texts),
    )


def _distinct(tokens: list[int], n: int) -> float:
    """Return the number of distinct n-grams divided by the number of all n-grams."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams)


@torch.no_grad()
def _judge_loss(texts: list[list[int]], prompts: list[list[int]], judge: LanguageModel) -> list[float]:
    rows = torch.tensor([p + t for p, t in zip(prompts, texts, strict=True)])
    losses = []
    for piece in rows.split(16):
        piece = piece.to(judge.device)
        logits, _ = judge(piece[:, :-1])
        loss = cross_entropy(logits, piece[:, 1:], reduction="none").view(len(piece), -1)
        losses += loss[:, len(prompts[0]) - 1 :].mean(-1).tolist()
    return losses
