"""The cache folder of the user, which holds downloads and compiled C code."""

from pathlib import Path

from timemix.errors import Unavailable


def cache_folder() -> Path:
    """Return the cache folder of timemix, which may not exist yet.

    Returns:
        A folder in XDG_CACHE_HOME if this variable is set, else in the cache folder of the operating system.

    Raises:
        Unavailable: The user has no home folder.
    """
    import pooch

    try:
        return Path(pooch.os_cache("timemix")).expanduser()
    except RuntimeError as error:
        raise Unavailable(
            "the cache folder cannot be found, since this user has no home folder; set XDG_CACHE_HOME to a folder"
        ) from error
