"""The package datasets of Hugging Face, imported without its messages, with errors of one sentence."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from timemix.errors import DamagedFile, MissingFile, TimemixError, Unavailable

TRIES = 1
"""Number of tries of the package datasets to read a part of a file. Each try of huggingface_hub takes up to 25 s."""


class Unreachable(Unavailable):
    """The Hub does not answer."""


@contextlib.contextmanager
def opened_datasets(reference: str, place: str, revision: str | None) -> Iterator[Any]:
    """Import the package datasets without its messages, and replace its errors by errors with one sentence.

    Args:
        reference: The source, for messages.
        place: Name of the dataset, for messages.
        revision: Revision that the source names, for messages.

    Yields:
        The module datasets.
    """
    try:
        import datasets
        from huggingface_hub import errors
        from huggingface_hub import logging as hub_logging
    except ImportError as error:
        raise Unavailable(f"{reference} needs the package datasets: pip install 'timemix[data]'") from error
    config = datasets.config
    log, hub_log = datasets.logging.get_verbosity(), hub_logging.get_verbosity()
    shown = datasets.utils.are_progress_bars_disabled()
    waits = {name: getattr(config, name) for name in vars(config) if name.startswith("STREAMING_")}
    datasets.logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    for name in waits:
        setattr(config, name, TRIES if "MAX_RETRIES" in name else 1)
    try:
        yield datasets
    except TimemixError:
        raise
    except errors.GatedRepoError as error:
        raise Unavailable(_gated(place)) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise MissingFile(_no_dataset(place)) from error
    except errors.RevisionNotFoundError as error:
        raise MissingFile(f"the dataset {place} has no revision {revision!r}; name a branch or a commit") from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise (Unavailable(_gated(place)) if "gated" in str(error) else MissingFile(_no_dataset(place))) from error
    except datasets.data_files.EmptyDatasetError as error:
        raise MissingFile(f"{reference} has no data files; name a dataset with texts") from error
    except Exception as error:
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise Unreachable(f"{reference} is not in the cache, and HF_HUB_OFFLINE is set; unset it") from error
        if _is_of_network(error):
            raise Unreachable(
                f"cannot read {reference} from {config.HF_ENDPOINT} ({_first_line(error)}); check the network and try"
                " again"
            ) from error
        if "scripts are no longer supported" in str(error):
            raise Unavailable(
                f"{reference} consists of a Python script, which timemix does not run; name a dataset with files in"
                " Parquet, JSON lines or CSV"
            ) from error
        raise DamagedFile(
            f"the package datasets cannot read {reference}: {_first_line(error)}; check its files"
        ) from error
    finally:
        datasets.logging.set_verbosity(log)
        hub_logging.set_verbosity(hub_log)
        if not shown:
            datasets.enable_progress_bars()
        for name, value in waits.items():
            setattr(config, name, value)


def _is_of_network(error: Exception) -> bool:
    # The package huggingface_hub uses httpx or httpx2, depending on its version.
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or "HTTPError" in names


def _first_line(error: Exception) -> str:
    words = str(error).strip() or type(error).__name__
    return words.splitlines()[0].rstrip(".")


def _gated(place: str) -> str:
    return f"the dataset {place} is gated; accept its terms on its page on the Hub, and log in with: hf auth login"


def _no_dataset(place: str) -> str:
    return (
        f"{place!r} is neither a folder nor a dataset that you can read on the Hub; check its name, and if it is"
        " private, log in with: hf auth login"
    )
