"""A folder in which the commands of the pages run."""

import pytest

from tests.helpers.pages import train_tiny_run, write_texts


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    write_texts(folder)
    train_tiny_run(folder)
    return folder
