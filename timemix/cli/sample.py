"""The command-line verb sample: generate text with a trained model."""

import itertools
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from timemix.cli.options import RunFolder, parse
from timemix.cli.terminal import escaped
from timemix.errors import InvalidValue

if TYPE_CHECKING:
    from timemix.generation.engine import Engine
    from timemix.generation.request import Event
    from timemix.generation.sampler import Sampler
    from timemix.generation.session import Session
    from timemix.runs.load import Loaded


@dataclass(frozen=True)
class Sampling:
    """Length and randomness of the texts."""

    tokens: int = 300
    """Number of generated tokens, at least 1."""
    seed: int = 0
    """Random seed, from 0 to 2^64 - 1; the same seed gives the same text."""
    temperature: float = 1.0
    """Divisor of the logits, at least 0 (0: always the most probable token)."""
    top_k: int = 0
    """Number of most probable tokens that can be sampled, at least 0 (0: off)."""
    top_p: float = 1.0
    """Total probability of the most probable tokens that can be sampled, above 0, at most 1 (1: off)."""
    min_p: float = 0.0
    """Smallest probability of a sampled token, as a share of the largest probability, from 0 to 1 (0: off)."""
    top_a: float = 0.0
    """Factor A, from 0 to 1; tokens below A * p_max ^ P are removed, with P from --top-a-power (0: off)."""
    top_a_power: float = 2.0
    """Exponent P of the threshold of --top-a, at least 0."""
    repetition_penalty: float = 1.0
    """Penalty on tokens that occur in the prompt or in the text, above 0 (1: off)."""
    presence_penalty: float = 0.0
    """Number subtracted from the logits of tokens that the generated text contains (0: off)."""
    frequency_penalty: float = 0.0
    """Number subtracted from the logit of a token for each time that the generated text contains it (0: off)."""
    context: Literal["reanchor", "exact"] = "reanchor"
    """Rule past ctx_len: `reanchor` restarts from the newest half of the context, at a constant cost per token, and
    `exact` recomputes the whole context for each token."""
    stop: tuple[str, ...] = ()
    """Stop strings; a text ends before the first stop string."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InvalidValue(f"--tokens is {self.tokens}; it must be at least 1")

    def sampler(self) -> "Sampler":
        """Return the sampler of these settings."""
        from timemix.generation.sampler import Sampler

        return Sampler(**{each.name: getattr(self, each.name) for each in fields(Sampler)})


@dataclass(frozen=True)
class SampleArguments:
    """Generate text with a trained model.

    Examples:
        timemix sample runs/mine --prompt "It was" --tokens 200 --temperature 0.9 --top-a 0.02
        timemix sample runs/mine --prompt "It was" --count 3 --weights int8
    """

    run: RunFolder
    prompt: str | None = None
    """Prompt. An empty prompt begins a document if the vocabulary has an end of text. Default: empty with --load-state
    and a state after a text, or if the vocabulary has an end of text; otherwise a newline, or token 0 if the
    vocabulary has no newline."""
    count: int = 1
    """Number of texts, at least 1, generated in one batch."""
    checkpoint: str = "best"
    """Checkpoint: best, newest, or the number of its step."""
    weights: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    """Number format of the weights; fewer bytes are faster and less exact."""
    load_state: Path | None = None
    """State file from --save-state, with which generation resumes. Default: no state."""
    save_state: Path | None = None
    """File for the state on exit (also on Ctrl-C); resume with --load-state. Default: the state is not saved."""
    log_probabilities: bool = False
    """With --json: report of each token's log-probability in nats, at temperature 1 without filters."""
    device: str = "auto"
    """PyTorch device: cpu, cuda ...; `auto` is cuda if available, otherwise cpu."""
    json: bool = False
    """Output as one JSON object on stdout."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=Sampling)


def sample(arguments: list[str]) -> int:
    refuse_dashes(arguments, "--prompt", "--stop")
    parsed = parse(SampleArguments, arguments, "sample")
    settings = parsed.sampling
    _check(parsed)
    from timemix.generation.engine import Engine
    from timemix.generation.prompts import default_prompt, prompt_ids
    from timemix.generation.request import Request
    from timemix.generation.session import load_session, save_session
    from timemix.runs.load import load
    from timemix.runtime.device import choose_device
    from timemix.storage.files import refuse_irregular

    saving = parsed.save_state
    if saving is not None:
        refuse_irregular(saving)
    sampler = settings.sampler()
    loaded = load(parsed.run, checkpoint=parsed.checkpoint, device=str(choose_device(parsed.device)[0]), mapped=True)
    start = None if parsed.load_state is None else load_session(parsed.load_state, loaded.model)
    tokenizer, prompt = loaded.tokenizer, parsed.prompt
    continues = start is not None and start.tokens
    if prompt is None:
        prompt = "" if continues else default_prompt(tokenizer)
    ids = [] if continues and not prompt else prompt_ids(tokenizer, prompt)
    _note_long_prompt(len(ids), loaded)
    engine = Engine(loaded.model, tokenizer, slots=parsed.count, weights=parsed.weights)
    note_uncompiled(engine)
    engine.add(
        Request(
            ids,
            tokens=settings.tokens,
            sampler=sampler,
            seed=settings.seed,
            samples=parsed.count,
            stop=settings.stop,
            stop_tokens=() if tokenizer.end_of_text is None else (tokenizer.end_of_text,),
            log_probabilities=parsed.log_probabilities,
            start=start,
            keep_session=saving is not None,
            context=settings.context,
        )
    )
    # A long prompt gives no event for a long time, so a second Ctrl-C ends the command without a state.
    noted: AbstractContextManager[list[int]] = interrupts_noted(1) if saving else nullcontext([])
    with noted as interrupts:
        sessions: list[Session] = []
        gone: BrokenPipeError | None = None
        try:
            for _ in _printed(engine, prompt, parsed, sessions):
                if interrupts:
                    break
        except BrokenPipeError as error:
            gone = error
        # If stdout is closed before the first step, there is no state yet.
        if saving and (sessions or engine.active):
            save_session(sessions[0] if sessions else engine.session(0), saving, loaded.model)
    if gone is not None:
        raise gone
    if interrupts:
        raise KeyboardInterrupt
    return 0


def refuse_dashes(arguments: list[str], *flags: str) -> None:
    """Refuse a text that begins with a dash after one of these flags: it would be read as another flag."""
    for flag, value in itertools.pairwise(arguments):
        if flag in flags and value.startswith("-"):
            raise InvalidValue(f"{flag} needs a text; a text that begins with '-' is given as {flag}={value}")


def _check(parsed: SampleArguments) -> None:
    count = parsed.count
    if count < 1:
        raise InvalidValue(f"--count is {count}; it must be at least 1")
    if parsed.save_state is not None and count > 1:
        raise InvalidValue(f"--count is {count}, but --save-state saves the state of one text; leave one of them out")
    if parsed.log_probabilities and not parsed.json:
        raise InvalidValue("--log-probabilities needs --json; add --json")


def note_uncompiled(engine: "Engine", name: str = "generation") -> None:
    """Print the reason if an engine, which the message calls `name`, does not use the compiled step."""
    if not engine.advance.compiled:
        reason = engine.advance.reason
        print(f"timemix: {name} uses PyTorch, not the compiled step: {reason}", file=sys.stderr, flush=True)


@contextmanager
def interrupts_noted(most: int | None = None) -> Iterator[list[int]]:
    """Append each Ctrl-C to the yielded list instead of raising KeyboardInterrupt.

    Args:
        most: Largest number of noted interrupts; the next Ctrl-C raises KeyboardInterrupt. None: no limit.
    """
    interrupts: list[int] = []

    def note(number: int, _: object) -> None:
        if len(interrupts) == most:
            raise KeyboardInterrupt
        interrupts.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def _printed(engine: "Engine", prompt: str, parsed: SampleArguments, sessions: "list[Session]") -> Iterator["Event"]:
    """Print the texts of an engine and yield their events.

    One text is printed token by token. Several texts are printed when all texts have ended.

    Args:
        engine: The engine, with one request.
        prompt: The prompt of the request.
        parsed: The options of `timemix sample`.
        sessions: List that receives the session of an ended text, before the end of the text is printed.
    """
    from timemix.generation.generate import events_of

    count = parsed.count
    streaming = count == 1 and not parsed.json
    form = escaped if sys.stdout.isatty() else str
    texts = [""] * count
    scores: list[list[float | None]] = [[] for _ in range(count)]
    if streaming:
        sys.stdout.write(form(prompt))
    for event in events_of(engine):
        if event.session is not None:
            sessions.append(event.session)
        texts[event.sample] += event.text
        scores[event.sample].append(event.log_probability)
        if streaming:
            sys.stdout.write(form(event.text))
            sys.stdout.flush()
        # Yield after the text is printed: if the caller stops here, the saved state matches the printed text.
        yield event
    if parsed.json:
        asked = {"log_probabilities": scores} if parsed.log_probabilities else {}
        print(json.dumps({"prompt": prompt, "texts": texts} | asked))
    elif streaming:
        sys.stdout.write("\n")
    else:
        for number, text in enumerate(texts, 1):
            print(f"--- sample {number}\n{form(prompt + text)}")


def _note_long_prompt(tokens: int, loaded: "Loaded") -> None:
    limit = loaded.model.max_position
    if limit is not None and tokens > limit:
        print(
            f"timemix: the prompt has {tokens} tokens, but ctx_len is {limit}; the model sees the last {limit} tokens",
            file=sys.stderr,
        )
