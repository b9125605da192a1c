"""The one exception that a person can cause."""


class UserError(Exception):
    """Something outside the program is wrong: a path, a value, a file, a prompt.

    The message is one sentence that names the thing and the way out. The command line prints it
    without a traceback and exits with status 2.
    """
