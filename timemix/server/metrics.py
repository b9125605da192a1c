"""Counters and histograms in the text format of Prometheus."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the buckets of a histogram of times."""


class Histogram:
    """Count times by size.

    Args:
        bounds: Upper bounds of the buckets in seconds, in ascending order.
    """

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, seconds: float) -> None:
        """Count a time."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Yield the lines of the text format."""
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
        yield f"{name}_sum{{{labels}}} {self._sum}"
        yield f"{name}_count{{{labels}}} {total}"


@dataclass
class Metrics:
    """Counts of one served model since the start.

    Args:
        prompt_tokens: Tokens of prompts.
        cached_tokens: Tokens of prompts whose state came from the cache.
        generated_tokens: Generated tokens.
        finished: Samples that have ended, by reason.
        first_token: Time from the request to its first token.
        between_tokens: Time between two tokens of a sample.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("length", "stop", "error", "cancelled"), 0))
    first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)


@dataclass(frozen=True)
class Series:
    """One metric.

    Args:
        name: Name, without the prefix `timemix_`.
        kind: "counter", "gauge" or "histogram".
        help: What the metric counts.
        values: (labels, value) of each series.
    """

    name: str
    kind: str
    help: str
    values: Sequence[tuple[dict[str, str], float | Histogram]]


def to_text(series: Iterable[Series]) -> str:
    """Return metrics in the text format of Prometheus.

    Args:
        series: The metrics.
    """
    lines: list[str] = []
    for each in series:
        name = f"timemix_{each.name}"
        lines += [f"# HELP {name} {each.help}", f"# TYPE {name} {each.kind}"]
        for labels, value in each.values:
            shown = ",".join(f'{key}="{_escaped(word)}"' for key, word in labels.items())
            braces = f"{{{shown}}}" if shown else ""
            if isinstance(value, Histogram):
                lines += value.lines(name, shown)
            else:
                lines.append(f"{name}{braces} {value:g}" if value % 1 else f"{name}{braces} {int(value)}")
    return "\n".join(lines) + "\n"


def _escaped(word: str) -> str:
    return word.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
