"""Architectures registered from outside the package."""

from dataclasses import dataclass, replace

import pytest

import timemix
from timemix.errors import InvalidValue
from timemix.models.attention.config import RotaryConfig
from timemix.models.registry import (
    ARCHITECTURES,
    find_architecture,
    like_size_of,
    list_architectures,
    model_config,
    register_architecture,
)


@dataclass(frozen=True)
class OwnConfig(RotaryConfig):
    arch: str = "own"


OWN = timemix.Architecture("own", OwnConfig, "timemix.models.attention.model:RotaryBlock", 2026, "purple", "attention")


@pytest.fixture(autouse=True)
def _forget():
    """Undo each registration, which other tests of the process would see."""
    yield
    ARCHITECTURES.pop("own", None)


def test_a_registered_architecture_is_known_by_its_name():
    register_architecture(OWN)
    assert timemix.list_architectures()[-1] == "own"
    model = timemix.build_model("own", layers=1, channels=16, heads=2, ctx_len=8)
    assert model.architecture is OWN
    assert isinstance(model.config, OwnConfig)


def test_registering_the_same_entry_twice_has_no_effect():
    register_architecture(OWN)
    register_architecture(replace(OWN))
    assert find_architecture("own") is OWN


def test_a_name_is_registered_once():
    with pytest.raises(InvalidValue, match="architecture 'rwkv1' exists already; choose another name"):
        register_architecture(replace(OWN, name="rwkv1"))
    assert ARCHITECTURES["rwkv1"].config is not OwnConfig


@pytest.mark.parametrize("entry", ["own", None, replace(OWN, name=""), replace(OWN, name="../own")])
def test_an_entry_without_a_usable_name_is_refused(entry):
    with pytest.raises(InvalidValue, match="whose name is an identifier"):
        register_architecture(entry)


def test_settings_of_another_kind_are_refused():
    with pytest.raises(InvalidValue, match="derive it from ModelConfig"):
        register_architecture(replace(OWN, config=dict))


@pytest.mark.parametrize("arch", list_architectures())
def test_a_model_with_a_rule_for_its_hidden_size_gives_its_size(arch):
    """In rwkv5, an ffn_ratio of 0 stands for 3.5, rounded down: 448 hidden channels of 128."""
    found = like_size_of(model_config("rwkv5", channels=128, ffn_ratio=0.0), arch)
    assert found.channels == 128
    assert getattr(found, "ffn_ratio", 3.5) == 3.5


@pytest.mark.parametrize("name", ["version_1", "ideas"])
def test_a_class_variable_is_no_field(name):
    with pytest.raises(InvalidValue, match=f"rwkv7 has no field '{name}'") as error:
        model_config("rwkv7", **{name: ()})
    assert "version_1," not in str(error.value)
    assert "ideas" not in str(error.value).replace(f"'{name}'", "")
