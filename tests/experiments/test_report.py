"""report.html in a real browser: text, hover and switches."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.browser import open_browser
from tests.helpers.comparisons import finish, small
from tests.helpers.runs import write_text_file
from timemix.bench.measure import StepSpeed
from timemix.evaluation.texts import evaluate
from timemix.experiments.compare import Comparison
from timemix.experiments.report import _rows_by_position, to_html, variant_colors, write_report
from timemix.experiments.spec import Verdict
from timemix.experiments.table import Row, Table, build_table
from timemix.experiments.variants import Variant
from timemix.reporting.markdown import mean_and_deviation
from timemix.runs.load import load


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    variants = (
        Variant("rwkv1", color="red"),
        Variant("odd", {"model": {"arch": "mha_rotary"}}, label="</script><b>attention & more"),
        Variant("fails", {"train": {"lr_final": 1e30, "schedule": "linear"}}),
    )
    verdicts = (Verdict("rwkv1 is better", "rwkv1", "odd"),)
    source = write_text_file(folder)
    experiment = small(source, variants=variants, verdicts=verdicts, prompts=("the <i>", "cat"), by_position=True)
    base = experiment.base | {"data": {"source": str(source), "tokenizer": "byte"}}
    found = Comparison(replace(experiment, base=base), folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        # A measurement takes three seconds per variant and is not needed here.
        patch.setattr(
            "timemix.experiments.measurements.measure_training", lambda config, steps: StepSpeed(1.0, 64.0, None)
        )
        finish(found)
        write_report(found)
    return found


def test_colors_are_those_of_css_and_matplotlib(comparison):
    """A browser knows neither C1 nor tab:blue, and gray levels such as 0.4 are no colors of CSS."""
    names = ("C1", "tab:blue", "0.4", "k")
    variants = tuple(Variant(f"v{i}", {"model": {"channels": 16 * i}}, color=name) for i, name in enumerate(names, 1))
    colors = variant_colors(replace(comparison.experiment, variants=variants, verdicts=()))
    assert list(colors.values()) == ["#ff7f0e", "#1f77b4", "#666666", "#000000"]


def test_losses_by_position_are_compared_on_one_text_to_the_first_variant(comparison, tmp_path):
    rows = [Row(name=name, label=name, by_position={1: (1.0, 2.0)}, text=text) for name, text in ("ax", "by", "cx")]
    table = Table("t", 1, None, [1], rows, [])
    assert [row.name for row in _rows_by_position(table)] == ["a", "c"]
    assert _rows_by_position(replace(table, variants=[replace(rows[0], by_position=None), *rows[1:]])) == []


def test_damaged_samples_are_generated_again(comparison):
    path = comparison.out / "variants" / "rwkv1" / "samples.json"
    before = path.read_text()
    path.write_text("")
    write_report(comparison)
    assert path.read_text() == before


def test_long_curves_are_thinned_and_keep_their_end(comparison, monkeypatch):
    monkeypatch.setattr("timemix.experiments.report.MOST_POINTS", 3)
    page = to_html(comparison, build_table(comparison))
    curve = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])["curves"][0]
    # 8 logged steps of 64 tokens, every third from the last.
    assert curve["tokens"] == [128, 320, 512]
    assert len(curve["mean"]) == len(curve["deviation"]) == 3


def test_it_is_one_file_without_the_outside(comparison):
    page = (comparison.out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href|url\()\s*=?\s*["']?(?!data:)[\w/.:]""", page)
    assert re.findall(r"https?://[^\"' ]+", page) == ["http://www.w3.org/2000/svg"]
    assert page.count("</script>") == 2


def test_bits_per_byte_stand_beside_nats(comparison):
    (row, *_) = json.loads((comparison.out / "table.json").read_text())["variants"]
    for seed, bits in row["valid_bits_per_byte"].items():
        run = load(comparison.out / "variants/rwkv1" / f"seed-{seed}", checkpoint="newest")
        assert bits == pytest.approx(evaluate(run).bits_per_byte, abs=1e-6)
        # A token of this vocabulary is a byte.
        assert bits == pytest.approx(row["valid_losses"][seed] / math.log(2))
    page = (comparison.out / "report.html").read_text(encoding="utf-8")
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in re.findall(r"<tr>(.*?)</tr>", page)]
    found = dict(zip(cells[0], cells[1], strict=True))
    assert found["held-out loss"] == mean_and_deviation(row["valid_losses"].values())
    assert found["bits per byte"] == mean_and_deviation(row["valid_bits_per_byte"].values())
    assert dict(zip(cells[0], cells[3], strict=True))["bits per byte"] == "-"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture(scope="module")
def without_scripts(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser"), scripts=False) as driver:
        yield driver


@pytest.fixture
def page(browser, comparison):
    """Open the report; afterwards, check that the console is empty."""
    browser.get((comparison.out / "report.html").as_uri())
    yield browser
    assert browser.get_log("browser") == []


def find(page, css):
    return page.find_elements("css selector", css)


def hover(page, share):
    """Move the pointer over the loss chart, to `share` of its width from the left."""
    from selenium.webdriver import ActionChains

    (chart,) = find(page, "#loss svg")
    ActionChains(page).move_to_element_with_offset(chart, int((share - 0.5) * chart.size["width"]), 0).perform()
    return find(page, "#loss .readout")[0]


def test_hovering_reads_the_curves_off(page, comparison):
    readout = find(page, "#loss .readout")[0]
    assert not readout.is_displayed()
    readout = hover(page, 0.97)
    assert readout.is_displayed()
    lines = readout.text.splitlines()
    assert lines[0] == "training tokens 512"
    assert {re.sub(r": .*", "", line) for line in lines[1:]} == {"rwkv1", "</script><b>attention & more"}
    data = json.loads(page.execute_script("return document.getElementById('data').textContent"))
    curve = next(c for c in data["curves"] if c["label"] == "rwkv1")
    assert f"rwkv1: {curve['mean'][-1]:.4f} ± {curve['deviation'][-1]:.4f}" in lines
    # The losses at one position are sorted, the highest first.
    losses = [float(re.search(r": ([\d.]+)", line)[1]) for line in lines[1:]]
    assert losses == sorted(losses, reverse=True)
    hover(page, 0.3)
    assert readout.text.splitlines()[0] != lines[0]


def test_the_axis_switches(page):
    labels = []
    for button in find(page, ".switch button"):
        button.click()
        assert [b.text for b in find(page, ".switch button[aria-pressed=true]")] == [button.text]
        labels.append(hover(page, 0.97).text.splitlines()[0])
    assert labels[:2] == ["training tokens 512", "training steps 8"]
    assert labels[2].startswith("training time (seconds) ")


def test_the_keyboard_moves_the_cursor_too(page):
    page.execute_script("document.querySelector('#loss svg').focus()")
    from selenium.webdriver.common.keys import Keys

    (chart,) = find(page, "#loss svg")
    seen = []
    for _ in range(3):
        chart.send_keys(Keys.ARROW_RIGHT)
        seen.append(find(page, "#loss .readout")[0].text.splitlines()[0])
    assert seen == ["training tokens 64", "training tokens 128", "training tokens 192"]


def test_tables_samples_and_configs_are_there(page, comparison):
    headings = [h.text for h in find(page, "h2")]
    assert headings == [
        "Training loss",
        "Held-out loss by position in the window",
        "Results",
        "Verdicts",
        "Tuning",
        "Samples",
        "Configs",
    ]
    table = json.loads((comparison.out / "table.json").read_text())
    cells = [c.text for c in find(page, "#table td")]
    assert f"{table['variants'][0]['parameters']:,}" in cells
    assert "</script><b>attention & more" in cells
    assert any(note.text.startswith("Variant 'fails', seed 1, failed") for note in find(page, "#notes li"))
    assert [p.text for p in find(page, ".samples b")] == ["the <i>"] * 2 + ["cat"] * 2
    (config, *_) = find(page, "#configs details")
    assert not config.find_element("css selector", "pre").is_displayed()
    config.find_element("css selector", "summary").click()
    assert 'arch = "rwkv1"' in config.find_element("css selector", "pre").text


def test_nothing_is_cut_off_on_a_small_screen(page):
    page.set_window_size(500, 900)
    page.refresh()
    try:
        assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        page.set_window_size(1000, 1400)


def test_the_page_has_no_external_resources(browser, comparison, tmp_path):
    copy = shutil.copy(comparison.out / "report.html", tmp_path / "elsewhere.html")
    assert Path(copy).stat().st_size < 300_000
    browser.get(Path(copy).as_uri())
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert len(find(browser, "#loss polyline")) == 2


def test_without_javascript_it_shows_the_result(without_scripts, comparison):
    without_scripts.get((comparison.out / "report.html").as_uri())
    assert without_scripts.title == without_scripts.find_element("tag name", "h1").text == "small"
    headings = [h.text for h in find(without_scripts, "h2") if h.is_displayed()]
    assert headings[:4] == ["Training loss", "Held-out loss by position in the window", "Results", "Verdicts"]
    cells = [c.text for c in find(without_scripts, "td")]
    assert "</script><b>attention & more" in cells
    assert "rwkv1 is better" in cells
    pictures = find(without_scripts, "noscript img")
    assert [p.is_displayed() and p.size["width"] > 500 for p in pictures] == [True, True]
    # What only a script can use is not shown.
    assert not any(each.is_displayed() for each in find(without_scripts, ".switch button, .chart, .legend"))


def test_a_report_without_any_finished_run(browser, tmp_path):
    fails = Variant("fails", {"train": {"lr_final": 1e30, "schedule": "linear"}})
    experiment = small(write_text_file(tmp_path), variants=(fails,), verdicts=(), seeds=(1,))
    found = Comparison(experiment, tmp_path / "out")
    finish(found)
    write_report(found)
    browser.get((tmp_path / "out/report.html").as_uri())
    assert [h.text for h in find(browser, "h2") if h.is_displayed()] == ["Results", "Tuning", "Configs"]
    assert browser.get_log("browser") == []
