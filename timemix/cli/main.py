"""The `timemix` command: a verb, then that verb's own options. Only the verb that runs is imported."""

import contextlib
import importlib
import os
import signal
import sys

from timemix._version import __version__
from timemix.errors import UserError

VERBS = {
    "demo": "train on the built-in text for some minutes, sample, plot",
    "train": "train a model on your text, or go on with a run",
    "sample": "write text with a trained model",
    "eval": "loss of a trained model on a text",
    "compare": "train variants side by side, and say which learns better",
    "convert": "turn a trained model into a recurrent network: a state of one size, no end",
    "inspect": "tables, projections and token-shift inside a trained model",
    "plot": "draw the loss curves of runs",
    "data": "describe a text, or prepare it for training",
    "bench": "time the op, a training step, or writing, beside other ways",
    "info": "versions, devices, backends; size of a model",
}


def usage() -> str:
    verbs = "\n".join(f"  {verb:<9}{text}" for verb, text in VERBS.items())
    return (
        "timemix trains, compares and runs RWKV language models.\n\n"
        f"usage: timemix VERB [options]\n\n{verbs}\n\n"
        "timemix VERB --help lists the options of a verb; timemix --version prints the version."
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs one verb and exits: 0, 2 after an error that a person can mend, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if arguments[0] == "--version":
        print(f"timemix {__version__}")
        return
    try:
        verb = arguments[0]
        if verb not in VERBS:
            from timemix.errors import nearest

            raise UserError(f"unknown verb {verb!r}{nearest(verb, VERBS)}")
        module = importlib.import_module(f"timemix.cli.{verb}")
        sys.exit(getattr(module, verb)(arguments[1:]))
    except UserError as error:
        print(f"timemix: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("timemix: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # Whoever read our output has gone; leave quietly, also when Python flushes at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"timemix: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
