"""The user's cache folder: downloads and compiled C code."""

from pathlib import Path

from timemix.errors import Unavailable


def cache_folder() -> Path:
    """Return the folder of the cache, which may not exist yet.

    Returns:
        The folder: that of the operating system, or below XDG_CACHE_HOME.

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
