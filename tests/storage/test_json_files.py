"""The typed reader of JSON files: accepted values, rejected values with their errors, and written values."""

import json
from dataclasses import dataclass, field

import pytest

from timemix.errors import DamagedFile
from timemix.storage.json_files import OPTIONAL, Count, NotNegative, read_record, to_json


@dataclass(frozen=True, kw_only=True)
class Part:
    tokens: Count


@dataclass(frozen=True, kw_only=True)
class Whole:
    step: Count
    loss: float | None
    spread: tuple[float, NotNegative] = (0.0, 0.0)
    parts: tuple[Part, ...] = ()
    by_name: dict[str, float] = field(default_factory=dict)
    note: str | None = field(default=None, metadata=OPTIONAL)


def test_a_file_of_an_older_or_newer_version_is_read(tmp_path):
    path = tmp_path / "whole.json"
    path.write_text('{"step": 3, "loss": null, "of_the_future": [1]}')
    assert read_record(path, Whole) == Whole(step=3, loss=None)


def test_what_is_written_is_read_back(tmp_path):
    whole = Whole(step=3, loss=1.5, spread=(0.5, 2.0), parts=(Part(tokens=4),), by_name={"a": 1.0})
    written = to_json(whole)
    assert list(written) == ["step", "loss", "spread", "parts", "by_name"]
    (tmp_path / "whole.json").write_text(json.dumps(written))
    assert read_record(tmp_path / "whole.json", Whole) == whole


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"loss": 1.0}', "step is missing"),
        ('{"step": -1, "loss": 1.0}', "step is -1"),
        ('{"step": true, "loss": 1.0}', "step is True"),
        ('{"step": 1.0, "loss": 1.0}', "step is 1.0"),
        ('{"step": 9223372036854775808, "loss": 1.0}', "step is 9223372036854775808"),
        ('{"step": 1, "loss": NaN}', "loss is nan"),
        ('{"step": 1, "loss": 1e999}', "loss is inf"),
        ('{"step": 1, "loss": "low"}', "loss is 'low'"),
        ('{"step": 1, "loss": 1, "spread": [1.0]}', "spread is [1.0]"),
        ('{"step": 1, "loss": 1, "spread": [1.0, -1]}', "spread[1] is -1"),
        ('{"step": 1, "loss": 1, "parts": [{"tokens": "x"}]}', "parts[0].tokens is 'x'"),
        ('{"step": 1, "loss": 1, "parts": [3]}', "parts[0] is not a JSON object"),
        ('{"step": 1, "loss": 1, "by_name": {"a": []}}', "by_name.a is []"),
    ],
)
def test_a_damaged_field_is_named(tmp_path, text, words):
    path = tmp_path / "whole.json"
    path.write_text(text)
    with pytest.raises(DamagedFile) as error:
        read_record(path, Whole)
    assert str(error.value) == f"{path} is damaged: {words}; restore it from a copy"
