"""The command `timemix VERB [options]`. The program imports only the module of the command-line verb that runs."""

import contextlib
import importlib
import itertools
import re
import signal
import sys
from dataclasses import fields
from typing import Any

from timemix._version import __version__
from timemix.cli.terminal import discard_output, prepare_streams
from timemix.errors import FileError, InvalidValue, TimemixError, nearest

GROUPS = {
    "start": {
        "demo": "train a small model on the built-in text in two minutes, with samples and a loss curve",
    },
    "train": {
        "data": "describe a text, or prepare its tokens for training",
        "train": "train a model on a text, fine-tune a trained model, or resume a run",
        "runs": "list runs: state, size, steps, losses",
        "plot": "draw the loss curves of runs",
    },
    "use": {
        "sample": "generate text with a trained model",
        "chat": "talk with a trained model in the terminal",
        "serve": "offer trained models over HTTP, in the form of OpenAI's API",
        "eval": "measure the loss of a trained model on a text",
        "convert": "convert a trained model to a recurrent network with constant state",
        "import": "import published weights of RWKV as a run",
        "export": "export a trained model for other programs",
    },
    "compare": {
        "compare": "train architectures or settings on equal terms, and report the best variant",
        "inspect": "show the curves, projections and token-shift of a trained model",
    },
    "tools": {
        "bench": "time the op, a training step or generation against other implementations",
        "info": "show versions and devices, or the size of a model",
        "completion": "print a script for command completion in a shell",
    },
}
VERBS = {verb: words for verbs in GROUPS.values() for verb, words in verbs.items()}

EXAMPLES = (
    "timemix train cpu-small --data my.txt --out runs/mine",
    'timemix sample runs/mine --prompt "It was"',
)


def usage() -> str:
    groups = "\n\n".join(
        f"{title}:\n" + "\n".join(f"  {verb:<12}{words}" for verb, words in verbs.items())
        for title, verbs in GROUPS.items()
    )
    examples = "\n".join(f"  {example}" for example in EXAMPLES)
    return (
        "usage: timemix VERB [options]\n\n"
        "Train, compare and run RWKV language models.\n\n"
        f"{groups}\n\nexamples:\n{examples}\n\n"
        "timemix VERB --help lists the options of VERB, with examples.\ntimemix --version prints the version.\n"
        "Documentation: README.md and docs/index.md in the repository of timemix."
    )


def main(arguments: list[str] | None = None) -> None:
    """Run one command-line verb and exit with 0, 2 after an error of the user or the machine, or 130 after Ctrl-C."""
    prepare_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = _run(arguments)
        # Flush here to report a full disk: at exit, Python would print its own message.
        sys.stdout.flush()
        sys.exit(status)
    except TimemixError as error:
        _report(_with_flags(error, arguments))
        sys.exit(2)
    except KeyboardInterrupt:
        _report("interrupted")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader has closed the pipe of stdout: exit without a message, also when Python flushes stdout at exit.
        discard_output()
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _report(f"{where}{error.strerror or error}")
        discard_output()
        sys.exit(2)


def _run(arguments: list[str]) -> int:
    """Run one command-line verb and return its exit status."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"timemix {__version__}")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        raise InvalidValue(f"unknown verb {verb!r}{nearest(verb, VERBS)}")
    _refuse_empty(arguments)
    from timemix.cli.flags import verb_name

    module = importlib.import_module(f"timemix.cli.{verb_name(verb)}")
    try:
        status: int = getattr(module, verb_name(verb))(arguments[1:])
    except SystemExit as end:
        # tyro has printed the help.
        status = end.code if isinstance(end.code, int) else 0
    return status


def _refuse_empty(arguments: list[str]) -> None:
    """Refuse an empty value, which is often an unset variable of a shell, and would name the current folder as a path.

    Only a prompt may be empty.
    """
    for before, word in itertools.pairwise(arguments):
        flag = before if not word else word.removesuffix("=")
        if (not word or re.fullmatch(r"--[\w.-]+=", word)) and flag != "--prompt":
            raise InvalidValue(f"the value after {flag!r} is empty; give a value")


def _report(sentence: str) -> None:
    # If stderr cannot be written, the exit status alone reports the error.
    with contextlib.suppress(OSError):
        print(f"timemix: {sentence}", file=sys.stderr, flush=True)


def _with_flags(error: TimemixError, arguments: list[str]) -> str:
    """Return the message of an error, with flags in place of argument names.

    Settings have a dotted name: `train.batch_size` becomes `--train.batch-size`. If the verb has the option
    `--seconds` and not `--train.seconds`, `train.seconds` becomes `--seconds`. A verb without options of settings, such
    as `compare`, keeps the dotted name, which is a field of its experiment file or of its run.

    Library arguments that are command-line options begin the message, or stand before `=`: `top_p must be ...` becomes
    `--top-p must be ...`. Quoted values do not change. The message about a file does not change either: a dotted name
    in such a message is a field of the file.
    """
    if isinstance(error, FileError):
        return str(error)
    from timemix.config.run import TrainConfig
    from timemix.data.config import DataConfig
    from timemix.models.registry import ARCHITECTURES

    kinds: dict[str, list[type[Any]]] = {
        "model": [each.config for each in ARCHITECTURES.values()],
        "data": [DataConfig],
        "train": [TrainConfig],
    }
    dotted, plain = _option_names(arguments)
    known = {f"{part}.{field.name}" for part, each in kinds.items() for kind in each for field in fields(kind)}

    def flag(match: re.Match[str]) -> str:
        name = match[0]
        if name not in known and name not in plain:
            return name
        last = name.rpartition(".")[2]
        if name not in plain and not dotted and last not in plain:
            return name
        own = last if name not in dotted and last in plain else name
        return f"--{own.replace('_', '-')}"

    quoted = "'[^']*'" + '|"[^"]*"'
    setting = r"(?<![\w./-])(?:model|data|train)\.\w+(?![\w/-]|\.\w)"
    argument = r"^\w+(?= (?:is|must) |=)|(?<![\w./-])\w+(?==)"
    return re.sub(f"{quoted}|{setting}|{argument}", flag, str(error))


def _option_names(arguments: list[str]) -> tuple[set[str], set[str]]:
    """Return the library names of a verb's options: settings such as `train.lr`, and others, `top_p` for `--top-p`."""
    from timemix.cli.flags import options_class, options_of

    verb, inner = arguments[0], "".join(arguments[1:2])
    if verb not in VERBS:
        return set(), set()
    if verb == "bench":
        from timemix.cli.bench import VERBS as BENCH_VERBS

        if inner not in BENCH_VERBS:
            return set(), set()
    options = list(options_of(options_class(verb, inner if verb == "bench" else "")))
    names = (name.lstrip("-").replace("-", "_") for option in options for name in option.names)
    dotted = {name for name in names if "." in name}
    return dotted, {option.path[-1] for option in options if "." not in option.flag and not option.is_positional}
