"""Keys of runs: settings that change losses change the key, settings of reporting do not."""

from dataclasses import replace

import pytest

from tests.helpers.runs import small_config, write_text_file
from timemix.data.prepare import prepare
from timemix.errors import InvalidValue
from timemix.experiments.identity import run_keys
from timemix.experiments.variants import Variant, variant_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    config = small_config(write_text_file(folder))
    return config, prepare(folder / "tokens", config.data)


def keys(run, **train):
    config, corpus = run
    return run_keys(replace(config, train=replace(config.train, **train)), corpus)


def test_finished_runs_of_before_are_recognised(run):
    """Keys of earlier versions, in which some settings did not exist."""
    assert [key[:16] for key in keys(run)] == ["e547f5809f6bbd6f", "f7dc482f5e16f7c3"]


def test_samples_and_hooks_make_no_other_run(run):
    assert keys(run, sample_every=5, sample_prompts=("a", "b"), hook_errors="stop") == keys(run)
    assert not set(keys(run, patience=5)) & set(keys(run))


def test_a_run_on_separate_documents_is_another_run(run):
    config, corpus = run
    changed = replace(config, data=replace(config.data, cross_documents=False))
    assert not set(run_keys(changed, corpus)) & set(keys(run))


@pytest.mark.parametrize("name", ["seconds", "tokens", "epochs"])
def test_the_length_of_a_run_is_that_of_the_experiment(name):
    with pytest.raises(
        InvalidValue,
        match=r"variant 'a': train.seconds, train.tokens and train.epochs cannot be set in an experiment; give",
    ):
        variant_config("cpu-small", {}, Variant("a", {"train": {name: 60}}), {})
