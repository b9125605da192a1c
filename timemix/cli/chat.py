"""The command-line verb chat: talk with a trained model in the terminal."""

import contextlib
import importlib
import io
import os
import sys
import textwrap
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import tyro

from timemix.cli.options import RunFolder, parse
from timemix.cli.sample import Sampling, interrupts_noted, note_uncompiled, refuse_dashes
from timemix.cli.terminal import escaped
from timemix.errors import InvalidValue, TimemixError, nearest

if TYPE_CHECKING:
    from timemix.generation.conversation import Conversation
    from timemix.models.language_model import LanguageModel

MAIN = "main"
"""Name of the first conversation."""


@dataclass(frozen=True)
class ChatArguments:
    """Talk with a trained model in the terminal.

    Each line is a message, and the model answers. A model that was trained on conversations gets the messages in the
    template of these conversations. Another model with the World tokenizer gets them in the template of the RWKV World
    models, and all other models continue the text of the messages. The line /help lists the commands of a conversation,
    such as /save FILE.

    Examples:
        timemix chat runs/mine --temperature 0.9 --top-p 0.6
        timemix chat runs/mine --weights int8 --tokens 500 --system "Answer in one sentence."
    """

    run: RunFolder
    system: str = ""
    """System message at the start of the conversation. Default: none."""
    template: Literal["auto", "world", "plain"] = "auto"
    """Chat template; `auto` is the template of the training conversations. Without conversations, it is `world` for a
    model with the World tokenizer, and `plain` (the model continues the lines as one text) for other models."""
    checkpoint: str = "best"
    """Checkpoint: best, newest, or the number of its step."""
    weights: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    """Number format of the weights; fewer bytes are faster and less exact."""
    device: str = "auto"
    """PyTorch device: cpu, cuda ...; `auto` is cuda if available, otherwise cpu."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=Sampling)


def chat(arguments: list[str]) -> int:
    refuse_dashes(arguments, "--system", "--stop")
    parsed = parse(ChatArguments, arguments, "chat")
    settings = parsed.sampling
    from timemix.data.templates import TEMPLATES, template_of
    from timemix.generation.conversation import Conversation
    from timemix.generation.engine import Engine
    from timemix.runs.load import load
    from timemix.runtime.device import choose_device

    sampler = settings.sampler()
    loaded = load(parsed.run, checkpoint=parsed.checkpoint, device=str(choose_device(parsed.device)[0]), mapped=True)
    template = (
        template_of(loaded.tokenizer, loaded.config.data.template)
        if parsed.template == "auto"
        else TEMPLATES[parsed.template]
    )
    engine = Engine(loaded.model, loaded.tokenizer, slots=1, weights=parsed.weights)
    note_uncompiled(engine)
    conversation = Conversation(
        engine,
        template,
        system=parsed.system,
        tokens=settings.tokens,
        sampler=sampler,
        seed=settings.seed,
        stop=settings.stop,
        context=settings.context,
    )
    if sys.stdin.isatty():
        size = sum(x.numel() for x in loaded.model.parameters())
        _note(f"{loaded.config.model.arch}, {size:,} parameters, template {template.name}; /help lists the commands")
    return _Console(conversation, loaded.model).run()


def _note(text: str) -> None:
    print(f"timemix: {text}", file=sys.stderr, flush=True)


class _Console:
    """Read lines from stdin, and print the answers to stdout and all other text to stderr."""

    def __init__(self, conversation: "Conversation", model: "LanguageModel") -> None:
        self._conversations, self._name, self._model = {MAIN: conversation}, MAIN, model
        self._is_terminal = sys.stdin.isatty()
        self._form: Callable[[str], str] = escaped if sys.stdout.isatty() else str

    @property
    def _conversation(self) -> "Conversation":
        return self._conversations[self._name]

    def run(self) -> int:
        """Answer all lines; return 2 if a line without a terminal had an error, otherwise 0."""
        has_failed = False
        for line in self._lines():
            try:
                if line.rstrip() == "/quit":
                    break
                self._handle(line)
            except TimemixError as error:
                _note(str(error))
                has_failed = True
        return 2 if has_failed and not self._is_terminal else 0

    def _lines(self) -> Iterator[str]:
        if isinstance(sys.stdin, io.TextIOWrapper):
            # The tokenizer reports a byte that is not UTF-8.
            sys.stdin.reconfigure(errors="surrogateescape")
        if self._is_terminal:
            with contextlib.suppress(ImportError):
                # After the import, `input` edits lines and has a history.
                importlib.import_module("readline")
        prompts = self._is_terminal and sys.stdout.isatty()
        try:
            while True:
                yield input(f"{self._name}> " if prompts else "").removesuffix("\r")
        except (EOFError, KeyboardInterrupt) as end:
            if prompts:
                print()
            if isinstance(end, KeyboardInterrupt):
                raise

    def _handle(self, line: str) -> None:
        """Run a command, or answer a message."""
        if line.startswith("/") and not line.startswith("//"):
            self._run(line)
        elif line.strip():
            self._print(self._conversation.say(line.removeprefix("/") if line.startswith("//") else line))
        elif self._conversation.is_unfinished:
            self._print(self._conversation.proceed())

    def _print(self, pieces: "Generator[str, None, None]") -> None:
        """Print an answer. On a terminal, Ctrl-C stops the answer."""
        noted: AbstractContextManager[list[int]] = interrupts_noted() if self._is_terminal else nullcontext([])
        with noted as interrupts, contextlib.closing(pieces):
            for piece in pieces:
                sys.stdout.write(self._form(piece))
                sys.stdout.flush()
                if interrupts:
                    break
        sys.stdout.write("\n")
        if cut := self._conversation.tokens_cut:
            _note(f"the message is longer than the context, so the model did not read its first {cut:,} tokens")

    def _run(self, line: str) -> None:
        """Run a command."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name not in _COMMANDS:
            raise InvalidValue(f"unknown command {name!r}{nearest(name, _COMMANDS)}")
        command = _COMMANDS[name]
        if bool(argument) != bool(command.argument):
            way = f"{name} {command.argument}".rstrip()
            raise InvalidValue(f"{name} {'takes no argument' if argument else 'needs an argument'}; type {way!r}")
        command.run(self, argument)

    def save(self, path: str) -> None:
        from timemix.generation.session import save_session

        session = self._conversation.session
        if session is None:
            raise InvalidValue("the conversation is empty; type a message before you save it")
        save_session(session, os.path.expanduser(path), self._model)
        _note(f"saved the state ({session.nbytes:,} bytes) to {escaped(path)}")

    def load(self, path: str) -> None:
        from timemix.generation.session import load_session

        self._conversation.restart(load_session(os.path.expanduser(path), self._model))

    def fork(self, name: str) -> None:
        if name in self._conversations:
            raise InvalidValue(f"a conversation {name!r} exists; choose another name, or type '/switch {name}'")
        self._conversations[name] = self._conversation.fork()
        self._name = name

    def switch(self, name: str) -> None:
        if name not in self._conversations:
            raise InvalidValue(f"unknown conversation {name!r}{nearest(name, self._conversations)}")
        self._name = name

    def undo(self, _: str) -> None:
        message = self._conversation.undo().message
        _note(f"removed {textwrap.shorten(message, 60, placeholder=' ...')!r} and its answer")

    def retry(self, _: str) -> None:
        self._print(self._conversation.retry())

    def help(self, _: str) -> None:
        for name, command in _COMMANDS.items():
            print(f"  {f'{name} {command.argument}':<14}{command.words}", file=sys.stderr)
        print(_OTHER_LINES, file=sys.stderr)


@dataclass(frozen=True)
class _Command:
    """A command of a conversation: what it does, the name of its argument, and the method of the console."""

    words: str
    argument: str
    run: Callable[[_Console, str], None]


_COMMANDS = {
    "/save": _Command("save the state of the conversation to FILE", "FILE", _Console.save),
    "/load": _Command("replace the conversation by the state in FILE", "FILE", _Console.load),
    "/fork": _Command("copy the conversation under NAME, and continue the copy", "NAME", _Console.fork),
    "/switch": _Command("continue the conversation NAME", "NAME", _Console.switch),
    "/undo": _Command("remove the last message and its answer", "", _Console.undo),
    "/retry": _Command("replace the last answer by another answer", "", _Console.retry),
    "/help": _Command("list the commands", "", _Console.help),
    "/quit": _Command("end the program, as Ctrl-D does", "", lambda console, _: None),
}

_OTHER_LINES = """\
  //TEXT        send a message that begins with /
  (empty line)  continue an answer that Ctrl-C or --tokens ended
  Ctrl-C        stop the answer; before a message: end the program"""
