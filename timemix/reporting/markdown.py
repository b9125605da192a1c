"""Markdown tables, and numbers as text."""

import re
import statistics
from collections.abc import Sequence
from typing import Any


def markdown_table(rows: list[list[str]], words: tuple[int, ...] = (0,)) -> str:
    """Return rows as a Markdown table.

    Args:
        rows: Cells of each row; the first row is the heading.
        words: Indices of the columns with text, which are aligned to the left. All other columns are aligned to the
            right.
    """
    rule = ["---" if i in words else "---:" for i in range(len(rows[0]))]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], rule, *cells[1:]])


def with_blocks(text: str, blocks: dict[str, str]) -> str:
    """Return a page with its generated parts replaced. A part is between `<!-- NAME -->` and `<!-- /NAME -->`.

    Args:
        text: The page.
        blocks: New content of parts, by name.
    """

    def content(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- {name} -->\n{blocks[name]}\n<!-- /{name} -->" if name in blocks else found[0]

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", content, text, flags=re.DOTALL)


def mean_and_deviation(values: Sequence[float] | Any) -> str:
    """Return mean and standard deviation as text, such as "1.2345 ± 0.0067"; "-" without values."""
    values = list(values)
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"
