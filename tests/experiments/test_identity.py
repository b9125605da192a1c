"""What makes two runs of comparisons the same: not where they report, but all that decides their losses."""

from dataclasses import replace

import pytest

from tests.helpers.runs import small_config, write_text_file
from timemix.data.prepare import prepare
from timemix.errors import InvalidValue
from timemix.experiments.identity import run_keys
from timemix.experiments.spec import Variant, variant_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    config = small_config(write_text_file(folder))
    return config, prepare(folder / "tokens", config.data)


def keys(run, **train):
    config, corpus = run
    return run_keys(replace(config, train=replace(config.train, **train)), corpus)


def test_finished_runs_of_before_are_recognised(run):
    """The keys that the settings had before some of them existed."""
    assert [key[:16] for key in keys(run)] == ["e547f5809f6bbd6f", "f7dc482f5e16f7c3"]


def test_samples_and_hooks_make_no_other_run(run):
    assert keys(run, sample_every=5, hook_errors="stop") == keys(run)
    assert not set(keys(run, patience=5)) & set(keys(run))


@pytest.mark.parametrize("name", ["seconds", "tokens"])
def test_the_length_of_a_run_is_that_of_the_experiment(name):
    with pytest.raises(InvalidValue, match=r"variant 'a': train.seconds and train.tokens are for one run; give the"):
        variant_config("cpu-small", {}, Variant("a", {"train": {name: 60}}), {})
