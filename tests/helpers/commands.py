"""Commands that run in the process of a test."""

import pytest

from timemix.cli.main import main


def run_command(capsys, *arguments):
    """Run a command; return its status, its output and its messages."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return end.value.code or 0, *capsys.readouterr()
