"""Training of the 2021 architectures in their presets, and of rwkv7, is unchanged: a new loss is a new behaviour."""

import json

import pytest

from tests.helpers.golden_runs import NAMES, PATH, STEPS, losses, processor
from tests.helpers.tiers import slow

GOLDEN = json.loads(PATH.read_text())
# Every architecture, and every preset except the large one.
SMALL = [name for name in NAMES if name.startswith(("demo", "cpu-small")) or name == "record rwkv1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")


def test_every_architecture_and_preset_has_a_curve():
    assert list(GOLDEN["curves"]) == NAMES
    assert all(len(curve[p]) == STEPS for curve in GOLDEN["curves"].values() for p in curve)


@pytest.mark.parametrize("name", [name if name in SMALL else slow(name) for name in NAMES])
def test_float64_to_nine_digits_anywhere(folder, name):
    for ours, golden in zip(losses(name, folder, "float64"), GOLDEN["curves"][name]["float64"], strict=True):
        assert ours == pytest.approx(golden, rel=1e-9)


@pytest.mark.parametrize("name", [name if name in SMALL else slow(name) for name in NAMES])
def test_float32_bit_for_bit_on_the_same_processor_else_to_four_digits(folder, name):
    ours, golden = losses(name, folder, "float32"), GOLDEN["curves"][name]["float32"]
    if processor() == GOLDEN["float32"]:
        assert ours == golden
    else:
        for step, expected in zip(ours, golden, strict=True):
            assert step == pytest.approx(expected, rel=1e-4)
