"""Write the report of a comparison: table.json, table.md, loss.png, position.png and report.html."""

import base64
import contextlib
import json
import re
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from timemix.config.run import read_toml, to_toml
from timemix.errors import DamagedFile, MissingFile
from timemix.experiments.compare import Comparison
from timemix.experiments.jobs import Job
from timemix.experiments.spec import Experiment
from timemix.experiments.table import (
    Row,
    Table,
    build_table,
    result_rows,
    summary,
    to_markdown,
    tuning_rows,
    verdict_rows,
    warnings,
)
from timemix.experiments.variants import Variant
from timemix.reporting.plots import mean_over_runs, plot_bands, plot_positions, spare_colors
from timemix.runs.load import load
from timemix.runtime.device import choose_device
from timemix.storage.files import write_text
from timemix.storage.json_files import read_json

MOST_POINTS = 400
"""Approximate number of points of a curve in report.html."""


def write_report(comparison: Comparison) -> Table:
    """Write all files of the report to the folder of the comparison. Return the table, which also lists failed runs.

    Raises:
        CannotWrite: A file cannot be written.
    """
    out, table = comparison.out, build_table(comparison)
    write_text(out / "table.json", json.dumps(table.to_json(), indent=1) + "\n")
    write_text(out / "table.md", to_markdown(table))
    runs = finished_runs(comparison)
    if runs:
        colors = variant_colors(comparison.experiment)
        plot_bands(runs, out / "loss.png", colors=colors, title=table.title)
    by_position = _rows_by_position(table)
    if len(by_position) > 1:
        plot_positions(
            {row.label: _by_position(row) for row in by_position},
            out / "position.png",
            colors=variant_colors(comparison.experiment),
        )
    write_text(out / "report.html", to_html(comparison, table))
    return table


def _rows_by_position(table: Table) -> list[Row]:
    """Return the rows whose losses by position can be compared to those of the first row; none without its losses."""
    first = table.variants[0]
    return [row for row in table.variants if row.by_position and row.text == first.text] if first.by_position else []


def _by_position(row: Row) -> list[float]:
    """Return the mean loss over the seeds at each position."""
    assert row.by_position is not None
    mean: list[float] = np.mean(list(row.by_position.values()), axis=0).tolist()
    return mean


def finished_runs(comparison: Comparison) -> dict[str, list[Path]]:
    """Return the folders of successful runs by label of the variant, without variants that have no such folder."""
    runs = {
        v.heading: [comparison.folder(j) for j in comparison.seed_jobs(v) if _has_folder(comparison, j)]
        for v in comparison.experiment.variants
    }
    return {label: folders for label, folders in runs.items() if folders}


def _has_folder(comparison: Comparison, job: Job) -> bool:
    """Return whether a run was successful and has its run folder, which a result from another folder lacks."""
    return comparison.good_result(job) is not None and (comparison.folder(job) / "config.toml").exists()


def variant_colors(experiment: Experiment) -> dict[str, str]:
    """Return the color of each variant by its label: from the experiment file, or from a colour-blind-safe palette.

    The colors are hexadecimal numbers, because report.html knows fewer notations than matplotlib.
    """
    from matplotlib.colors import to_hex

    spare = spare_colors(v.color for v in experiment.variants)
    return {v.heading: to_hex(v.color or next(spare)) for v in experiment.variants}


def to_html(comparison: Comparison, table: Table) -> str:
    """Return the report as one HTML page without external resources.

    A script draws the curves. A browser without JavaScript shows the pictures of the folder in place of the curves.
    """
    curves, positions = _curves(comparison), _position_curves(comparison, table)
    parts = _page_parts(comparison, table)
    shown = {"training": curves, "position": positions} | {n: parts[n] for n in ("verdicts", "tuning", "samples")}
    parts |= {f"{name} hidden": "" if content else "hidden" for name, content in shown.items()}
    # The text "</script>" in a label must not end the script element of the page.
    parts["curves"] = json.dumps({"curves": curves, "by_position": positions}).replace("<", "\\u003c")
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([a-z ]+)\}\}", lambda found: parts[found[1]], template)


def _page_parts(comparison: Comparison, table: Table) -> dict[str, str]:
    """Return the HTML of the page's parts that need no script, by their names in report.html."""
    configs = [
        (label, to_toml(read_toml(runs[0] / "config.toml"))) for label, runs in finished_runs(comparison).items()
    ]
    return {
        "title": escape(table.title),
        "summary": escape(summary(table)),
        "loss picture": _html_picture(comparison.out / "loss.png", "training loss"),
        "position picture": _html_picture(comparison.out / "position.png", "held-out loss by position"),
        "results": _html_table(result_rows(table), words=(0, 2)),
        "notes": "".join(f"<li>{escape(each)}</li>" for each in warnings(table)),
        "verdicts": _html_table(verdict_rows(table), words=(0, 2)) if table.verdicts else "",
        "tuning": _html_table(tuning_rows(table), words=(0,)),
        "samples": _html_samples(comparison),
        "configs": "".join(
            f"<details><summary>{escape(label)}</summary><pre>{escape(config)}</pre></details>"
            for label, config in configs
        ),
    }


def _position_curves(comparison: Comparison, table: Table) -> list[dict[str, Any]]:
    """Return the mean held-out loss of each variant at each position."""
    colors = variant_colors(comparison.experiment)
    return [
        {"label": row.label, "color": colors[row.label], "y": np.round(_by_position(row), 4).tolist()}
        for row in _rows_by_position(table)
    ]


def _curves(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the mean training loss of each variant, thinned to about `MOST_POINTS` points."""
    curves, colors = [], variant_colors(comparison.experiment)
    for label, runs in finished_runs(comparison).items():
        x, mean, deviation = mean_over_runs(runs)
        # Select points backwards from the end, so that the selection contains the last point.
        kept = np.arange(len(mean) - 1, -1, -len(mean) // MOST_POINTS)[::-1]
        curve = {name: np.round(values[kept], 5).tolist() for name, values in x.items()}
        curve |= {"mean": np.round(mean[kept], 5).tolist(), "deviation": np.round(deviation[kept], 5).tolist()}
        curves.append({"label": label, "color": colors[label], **curve})
    return curves


def _html_table(rows: list[list[str]], *, words: tuple[int, ...]) -> str:
    """Return rows, headings first, as an HTML table; empty without rows. `words` are the columns with text."""
    lines = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        cells = [
            f'<{tag} class="words">{escape(cell)}</{tag}>' if j in words else f"<{tag}>{escape(cell)}</{tag}>"
            for j, cell in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>" if lines else ""


def _samples(comparison: Comparison, variant: Variant, tokens: int = 200) -> dict[str, str]:
    """Return a generated text for each prompt, from the model of a variant's first seed; empty without a result."""
    from timemix.generation.generate import generate

    job = comparison.seed_jobs(variant)[0]
    if not _has_folder(comparison, job):
        return {}
    path = comparison.out / "variants" / variant.name / "samples.json"
    old: dict[str, Any] = {}
    with contextlib.suppress(DamagedFile, MissingFile):
        old = read_json(path)
    if list(old) != list(comparison.prompts) or not all(isinstance(text, str) for text in old.values()):
        loaded = load(comparison.folder(job), device=str(choose_device(comparison.device)[0]))
        texts = {p: generate(loaded, p, tokens=tokens)[0] for p in comparison.prompts}
        write_text(path, json.dumps(texts))
        return texts
    return old


def _html_samples(comparison: Comparison) -> str:
    """Return the samples of all variants as HTML, one group for each prompt."""
    samples = {variant.heading: _samples(comparison, variant) for variant in comparison.experiment.variants}
    groups = []
    for prompt in comparison.prompts:
        texts = [
            f"<div><h3>{escape(label)}</h3><pre><b>{escape(prompt)}</b>{escape(texts[prompt])}</pre></div>"
            for label, texts in samples.items()
            if prompt in texts
        ]
        groups += [f'<div class="samples">{"".join(texts)}</div>'] if texts else []
    return "".join(groups)


def _html_picture(path: Path, title: str) -> str:
    """Return what a browser without JavaScript shows in place of interactive curves."""
    if not path.exists():
        return "<noscript><p>This browser shows no curves, because JavaScript is disabled.</p></noscript>"
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<noscript><img alt="{title}" src="data:image/png;base64,{content}"></noscript>'
