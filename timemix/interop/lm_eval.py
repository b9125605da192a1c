"""Tasks of lm-evaluation-harness on a trained model, without a server and without transformers."""

import difflib
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timemix.errors import InvalidValue, MissingFile, TimemixError, Unavailable
from timemix.generation.engine import Engine
from timemix.generation.generate import events_of
from timemix.generation.request import Request
from timemix.generation.sampler import Sampler
from timemix.interop.model_folder import first_token
from timemix.models.language_model import LanguageModel, evaluating
from timemix.models.state import State
from timemix.runs.load import Loaded
from timemix.tokenizers.base import Tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise Unavailable("the package lm_eval is not installed; run: pip install 'timemix[lm-eval]'") from error

PIECE = 512
"""Largest number of tokens of one call of the model."""
ROWS = 16
"""Largest number of continuations that the model reads together."""
BOOTSTRAP = 1000
"""Number of resamplings for the standard error of a metric that is no mean."""
SEED = 1234
"""Seed of the choice of examples in prompts, the default of the package."""
_USED = ("until", "max_gen_toks", "do_sample", "num_beams")


@dataclass(frozen=True)
class TaskScore:
    """A number that a model has reached in a task.

    Args:
        task: Name of the task or group.
        metric: Name of the metric, such as "acc".
        filter: Name of the filter of the answers; "none" without a filter.
        value: The number.
        error: Standard error of the number; None if unavailable.
        shots: Number of examples in each prompt; None for a group.
    """

    task: str
    metric: str
    filter: str
    value: float
    error: float | None
    shots: int | None


def evaluate_tasks(
    loaded: Loaded,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
) -> list[TaskScore]:
    """Run tasks of lm-evaluation-harness on a model.

    Args:
        loaded: The model.
        tasks: Names of tasks, groups or tags, YAML files of tasks, or folders of YAML files.
        include: Folder of further YAML files, whose names `tasks` may contain.
        shots: Number of examples in each prompt; None: as the task sets it.
        limit: Largest number of questions of each task; None: all questions.

    Returns:
        The numbers, in the order of the tasks.

    Raises:
        MissingFile: A file or folder does not exist.
        InvalidValue: A task is unknown or cannot be loaded, a text has characters outside the vocabulary, or a task
            needs something that the model does not support.
        NotFinite: The logits of the model are not finite.
    """
    manager, names = _manager(tasks, include)
    model = TimemixLM(loaded.model, loaded.tokenizer)
    # The package prints messages, and stdout is for the result alone.
    with _explained(tasks), redirect_stdout(sys.stderr):
        chosen = manager.load(names)
        for task in chosen["tasks"].values():
            _prepare(task, shots)
        found = evaluate(model, chosen, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
    return [
        TaskScore(task, metric, kind, float(value), _number(values.get(f"{metric}_stderr,{kind}")), _shots(found, task))
        for task, values in found["results"].items()
        for key, value in values.items()
        for metric, _, kind in [key.partition(",")]
        if kind and not metric.endswith("_stderr") and _number(value) is not None
    ]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not math.isnan(value) else None


def _shots(found: dict[str, Any], task: str) -> int | None:
    shots = found.get("n-shot", {}).get(task)
    return shots if isinstance(shots, int) else None


@contextmanager
def _explained(tasks: Sequence[str]) -> Iterator[None]:
    """Replace an error of the package or of a task, whose file can run any code, by InvalidValue."""
    try:
        yield
    except TimemixError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise InvalidValue(
            f"{' '.join(tasks)} cannot be evaluated ({reason}); check the file of the task, its data and the network"
        ) from error


def _manager(tasks: Sequence[str], include: Path | None) -> tuple[Any, list[str]]:
    """Return the index of all tasks that may be needed, and the names or files of the wanted tasks."""
    folders = [Path(name) for name in tasks if Path(name).is_dir()] + ([include] if include else [])
    for folder in folders:
        if not folder.is_dir():
            raise MissingFile(f"there is no folder {folder}; name a folder with YAML files of tasks")
    manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)
    names: list[str] = []
    for name in tasks:
        if Path(name).is_dir():
            own = TaskManager(include_path=name, include_defaults=False).all_subtasks
            if not own:
                raise InvalidValue(f"the folder {name} has no YAML file of a task; name another folder")
            names += own
        elif name.endswith((".yaml", ".yml")) and not Path(name).is_file():
            raise MissingFile(f"there is no file {name}; name a YAML file of a task, or the name of a task")
        else:
            names.append(name)
    if not all(name in manager.all_tasks or Path(name).is_file() for name in names):
        # The index of the tasks of the package takes seconds to build.
        manager = TaskManager(include_path=[str(folder) for folder in folders])
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            way_out = f"did you mean {close[0]!r}?" if close else "lm_eval ls tasks lists all tasks of the package"
            raise InvalidValue(f"unknown task {name!r}; {way_out}")
    return manager, names


def _prepare(task: Any, shots: int | None) -> None:
    """Set the number of examples in the prompts of a task. A task whose file sets 0 examples keeps this number."""
    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=SEED)


class TimemixLM(TemplateLM):
    """A model of timemix for lm-evaluation-harness.

    The model reads each context once, and continues a copy of the state with each answer.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model, self.own_tokenizer = model, tokenizer
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        """Token before the first token of a text."""
        return first_token(self.own_tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text."""
        ids: list[int] = self.own_tokenizer.encode(string).tolist()
        return ids

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation after its context, and whether it is the greedy one."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise InvalidValue(
                    "an answer of the task has no tokens of its own after its context; change the task, or use a model"
                    " with a tokenizer of characters or bytes"
                )
            visible = self._visible(context or [self.eot_token_id], continuation)
            groups[tuple(visible)].append((i, continuation))
        scores: dict[int, tuple[float, bool]] = {}
        with evaluating(self.model):
            for context, continuations in groups.items():
                logits, state = self._read(list(context))
                for begin in range(0, len(continuations), ROWS):
                    some = continuations[begin : begin + ROWS]
                    found = self._scores(logits, state, [continuation for _, continuation in some])
                    scores |= {i: score for (i, _), score in zip(some, found, strict=True)}
        return [scores[i] for i in range(len(requests))]

    def _visible(self, context: list[int], continuation: list[int]) -> list[int]:
        """Return the newest tokens of a context that fit in the model's context together with the continuation."""
        limit = self.model.max_position
        if limit is None:
            return context
        # The model does not read the last token.
        room = limit + 1 - len(continuation)
        if room < 1:
            raise InvalidValue(
                f"an answer of the task has {len(continuation)} tokens, but the context of the model has {limit}; use a"
                " model with a longer context"
            )
        return context[-room:]

    def _read(self, tokens: list[int]) -> tuple[Tensor, State]:
        """Read tokens from a new state; return the logits after them (1, V) and the state."""
        state, logits = self.model.init_state(1), torch.empty(0)
        for begin in range(0, len(tokens), PIECE):
            piece = torch.tensor([tokens[begin : begin + PIECE]], device=self.model.device)
            logits, state = self.model(piece, state, logits="last")
        return logits, state

    def _scores(self, first: Tensor, state: State, continuations: list[list[int]]) -> list[tuple[float, bool]]:
        """Score continuations of one context.

        Args:
            first: Logits after the context (1, V).
            state: State after the context, of one row.
            continuations: Token ids of each continuation.
        """
        device, V = self.model.device, first.shape[-1]
        inputs = [ids[:-1] for ids in continuations]
        longest = max(map(len, inputs))
        logits = first[:, None].expand(len(inputs), 1, V)
        if longest:
            # A row needs at least one token. The score does not count the logits after padding.
            padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in inputs], device=device)
            lengths = torch.tensor([max(len(ids), 1) for ids in inputs], device=device)
            rows = state.select(torch.zeros(len(inputs), dtype=torch.int64, device=device))
            after, _ = self.model(padded, rows, lengths=lengths)
            logits = torch.cat([logits, after], 1)
        return [_score(each[: len(ids)], ids) for each, ids in zip(logits, continuations, strict=True)]

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Return the log-probability of each text.

        With unbounded context, the model reads each text as a whole. With bounded context, the model reads windows of
        the largest length, as other models of lm-evaluation-harness do.
        """
        return [self._rolling(self.tok_encode(request.args[0])) for request in requests]

    def _rolling(self, tokens: list[int]) -> float:
        limit, first = self.model.max_position, self.eot_token_id
        if limit is not None:
            cut = get_rolling_token_windows(tokens, first, max_seq_len=limit, context_len=1)
            found = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in cut])
            return sum(score for score, _ in found)
        inputs, total, state = [first, *tokens[:-1]], 0.0, self.model.init_state(1)
        with evaluating(self.model):
            for begin in range(0, len(tokens), PIECE):
                piece = torch.tensor([inputs[begin : begin + PIECE]], device=self.model.device)
                logits, state = self.model(piece, state)
                total += _score(logits[0], tokens[begin : begin + PIECE])[0]
        return total

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Generate a text after each context, up to a stop string."""
        engine = Engine(self.model, self.own_tokenizer)
        ids = [engine.add(self._request(i, *request.args)) for i, request in enumerate(requests)]
        texts = dict.fromkeys(ids, "")
        for event in events_of(engine):
            texts[event.id] += event.text
        return [texts[id] for id in ids]

    def _request(self, number: int, context: str, arguments: dict[str, Any]) -> Request:
        given = normalize_gen_kwargs(arguments)
        known = {field.name for field in fields(Sampler)}
        if given.get("num_beams", 1) != 1:
            raise InvalidValue(
                f"the task has num_beams={given['num_beams']}, but timemix has no beam search; change the task"
            )
        if unknown := sorted(given.keys() - known - {*_USED}):
            raise InvalidValue(
                f"the task has the generation argument {unknown[0]!r}, which timemix does not support; change the task"
            )
        chosen = {name: given[name] for name in known & given.keys()}
        end = self.own_tokenizer.end_of_text
        return Request(
            self.tok_encode(context) or [self.eot_token_id],
            given["max_gen_toks"],
            Sampler(**(chosen if given["do_sample"] else chosen | {"temperature": 0})),
            sample=number,
            stop=[text for text in given["until"] if text],
            stop_tokens=() if end is None else (end,),
        )


def _score(logits: Tensor, ids: list[int]) -> tuple[float, bool]:
    """Return the sum of the log-probabilities of tokens, and whether each token is the most probable one.

    Args:
        logits: Logits before each token (T, V).
        ids: Token ids, T.
    """
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    tokens = torch.tensor(ids, device=logits.device, dtype=torch.int64)
    chosen = logits.log_softmax(-1).gather(-1, tokens[:, None])
    return chosen.double().sum().item(), bool((logits.argmax(-1) == tokens).all())
