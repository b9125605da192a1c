"""A trained run that the tests of this folder copy."""

import pytest

from tests.helpers.runs import small_trainer


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    trainer = small_trainer(tmp_path_factory.mktemp("good"), steps=4)
    trainer.run()
    return trainer.out
