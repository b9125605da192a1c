"""Write the report of a comparison: table.json, table.md, loss.png, position.png and report.html."""

import json
from pathlib import Path

import numpy as np

from timemix.config.run import read_toml, to_toml
from timemix.experiments.compare import Comparison
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
from timemix.reporting.plots import mean_over_runs, plot_bands, plot_positions, spare_colors
from timemix.storage.files import write_text

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
    if any(row.by_position for row in table.variants[1:]):
        plot_positions(
            {row.label: _by_position(row) for row in table.variants if row.by_position},
            out / "position.png",
            colors=variant_colors(comparison.experiment),
        )
    write_text(out / "report.html", to_html(comparison, table))
    return table


def _by_position(row: Row) -> list[float]:
    """Return the mean loss over the seeds at each position."""
    assert row.by_position is not None
    mean: list[float] = np.mean(list(row.by_position.values()), axis=0).tolist()
    return mean


def finished_runs(comparison: Comparison) -> dict[str, list[Path]]:
    """Return the folders of successful runs by label of the variant, without variants that have no successful run."""
    runs = {
        v.heading: [comparison.folder(j) for j in comparison.seed_jobs(v) if comparison.good_result(j) is not None]
        for v in comparison.experiment.variants
    }
    return {label: folders for label, folders in runs.items() if folders}


def variant_colors(experiment: Experiment) -> dict[str, str]:
    """Return the color of each variant by its label: from the experiment file, or from a colour-blind-safe palette."""
    spare = spare_colors(v.color for v in experiment.variants)
    return {v.heading: v.color or next(spare) for v in experiment.variants}


def to_html(comparison: Comparison, table: Table) -> str:
    """Return the report as one HTML page without external resources."""
    experiment, colors = comparison.experiment, variant_colors(comparison.experiment)
    curves, configs = [], {}
    for label, runs in finished_runs(comparison).items():
        x, mean, deviation = mean_over_runs(runs)
        # Select points backwards from the end, so that the selection contains the last point.
        kept = np.arange(len(mean) - 1, -1, -len(mean) // MOST_POINTS)[::-1]
        curve = {name: np.round(values[kept], 5).tolist() for name, values in x.items()}
        curve |= {"mean": np.round(mean[kept], 5).tolist(), "deviation": np.round(deviation[kept], 5).tolist()}
        curves.append({"label": label, "color": colors[label], **curve})
        configs[label] = to_toml(read_toml(runs[0] / "config.toml"))
    samples: dict[str, dict[str, str]] = {prompt: {} for prompt in comparison.prompts}
    for variant in experiment.variants:
        for prompt, text in comparison.samples(variant).items():
            samples[prompt][variant.heading] = text
    page = {
        "title": table.title,
        "summary": summary(table),
        "curves": curves,
        "by_position": [
            {"label": row.label, "color": colors[row.label], "y": np.round(_by_position(row), 4).tolist()}
            for row in table.variants
            if row.by_position
        ],
        "table": result_rows(table),
        "verdicts": verdict_rows(table),
        "tuning": tuning_rows(table),
        "notes": warnings(table),
        "samples": {prompt: texts for prompt, texts in samples.items() if texts},
        "configs": configs,
    }
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    # The text "</script>" in a sample must not end the script element of the page.
    return template.replace("DATA", json.dumps(page).replace("<", "\\u003c"), 1)
