"""Pictures of loss curves, and the metrics that they read."""

import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from timemix.errors import CannotWrite, DamagedFile, TimemixError
from timemix.reporting.plots import mean_over_runs, plot_bands, plot_loss
from timemix.runs.metrics import read_metrics


def rows_of(end=1.5, steps=2000, log=10, valid=100, seed=0):
    noise = np.random.default_rng(seed)
    rows = [{"step": 0, "tokens": 0, "seconds": 0.0, "valid_loss": 5.0}]
    for step in range(log, steps + 1, log):
        loss = end + (5 - end) * float(np.exp(-30 * step / steps))
        row = {"step": step, "tokens": 768 * step, "seconds": 0.05 * step, "lr": 1e-3}
        row["loss"] = loss + 0.05 * noise.normal()
        row["valid_loss"] = loss if step % valid == 0 else None
        rows.append(row)
    return rows


@pytest.fixture
def make_run(tmp_path):
    def make(name="rwkv1", rows=None, tail=""):
        run = tmp_path / name
        run.mkdir(parents=True)
        lines = [json.dumps(row) + "\n" for row in (rows_of() if rows is None else rows)]
        (run / "metrics.jsonl").write_text("".join(lines) + tail)
        return run

    return make


@pytest.fixture
def drawn(monkeypatch):
    """Return the axes of the last saved figure."""
    found: list[Axes] = []
    save = Figure.savefig

    def spy(figure, *args, **kwargs):
        found[:] = figure.axes
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return found


def texts(axes):
    return [text.get_text() for text in axes.texts]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_one_run(make_run, tmp_path, drawn):
    plot_loss([make_run()], tmp_path / "loss.png", title="a $title")
    (axes,) = drawn
    raw, smoothed, valid = axes.lines
    assert len(raw.get_xdata()) == len(smoothed.get_xdata()) == 200
    assert len(valid.get_xdata()) == 21
    assert (min(valid.get_xdata()), max(valid.get_xdata())) == (0, 2000 * 768)
    late = np.asarray(smoothed.get_xdata()) > 1e6
    assert np.std(np.asarray(smoothed.get_ydata())[late]) < np.std(np.asarray(raw.get_ydata())[late]) / 2
    assert legend(axes) == ["training", "validation"]
    assert texts(axes) == ["1.500"]
    assert axes.get_ylabel() == "loss (nats per token)"
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (1080, 645)


def test_the_last_validation_of_one_run_is_also_in_bits_per_byte(make_run, tmp_path, drawn):
    rows = [{"step": i, "tokens": i, "valid_loss": 2.0 - i, "valid_bits_per_byte": 3.0 - i} for i in range(2)]
    runs = [make_run("a", rows), make_run("b", rows)]
    plot_loss(runs[:1], tmp_path / "loss.png")
    assert legend(drawn[0]) == ["training", "validation (at the end 2.000 bits per byte)"]
    plot_loss(runs, tmp_path / "loss.png")
    assert legend(drawn[0]) == ["a", "b", "training", "validation"]


def test_first_losses_do_not_squash_the_curve(make_run, tmp_path, drawn):
    plot_loss([make_run()], tmp_path / "loss.png")
    low, high = drawn[0].get_ylim()
    assert 1.2 < low < 1.45
    assert 1.6 < high < 2


def test_the_printed_validation_loss_is_inside_the_picture(make_run, tmp_path, drawn, recwarn):
    """In a run that has just begun, the newest validation is far above the newest losses."""
    rows = [{"step": 0, "tokens": 0, "valid_loss": 9.0}, {"step": 10, "tokens": 1920, "loss": 1.7}]
    plot_loss([make_run("a", rows)], tmp_path / "loss.png")
    low, high = drawn[0].get_ylim()
    assert low < 1.7 < 9.0 < high
    assert [str(each.message) for each in recwarn] == []


def test_several_runs_have_different_lines(make_run, tmp_path, drawn):
    ends = {"rwkv1": 1.5, "_mha_$pro$": 1.51, "mha_rotary": 1.7}
    runs = [make_run(name, rows_of(end, seed=i)) for i, (name, end) in enumerate(ends.items())]
    plot_loss(runs, tmp_path / "loss.svg")
    (axes,) = drawn
    assert legend(axes) == [*ends, "training", "validation"]
    assert not any(text.get_parse_math() for text in axes.get_legend().get_texts())
    valid_lines = axes.lines[2::3]
    assert len({line.get_color() for line in valid_lines}) == 3
    assert len({line.get_marker() for line in valid_lines}) == 3
    assert texts(axes) == ["1.500", "1.510", "1.700"]
    colors = {text.get_text(): text.get_color() for text in axes.texts}
    assert colors["1.700"] == valid_lines[2].get_color()
    heights = sorted(text.get_window_extent().y0 for text in axes.texts)
    assert min(np.diff(heights)) >= 0.9 * axes.texts[0].get_window_extent().height


def test_runs_of_one_name_are_named_by_path(make_run, tmp_path, drawn):
    runs = [make_run("a/seed-1"), make_run("b/seed-1")]
    plot_loss(runs, tmp_path / "loss.png")
    assert legend(drawn[0])[:2] == [str(run) for run in runs]


@pytest.mark.parametrize(
    ("x", "end", "label"),
    [("tokens", 1_536_000, "tokens"), ("steps", 2000, "steps"), ("seconds", 100, "(seconds)")],
)
def test_x(make_run, tmp_path, drawn, x, end, label):
    plot_loss([make_run()], tmp_path / "loss.png", x=x)
    (axes,) = drawn
    assert max(axes.lines[2].get_xdata()) == pytest.approx(end)
    assert axes.get_xlabel().endswith(label)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_long_runs_stay_small_and_keep_their_newest_point(make_run, tmp_path, drawn, suffix):
    runs = [make_run(f"run-{i}", rows_of(1 + i / 10, 60_000, 10, 20, i)) for i in range(3)]
    out = tmp_path / f"loss.{suffix}"
    plot_loss(runs, out)
    assert out.stat().st_size < 150_000
    assert {max(line.get_xdata()) for line in drawn[0].lines} == {60_000 * 768}


def test_smoothing_is_a_weighted_mean(make_run, tmp_path, drawn):
    steady = [{"step": s, "tokens": s, "loss": 2.0} for s in range(1, 41)]
    plot_loss([make_run("steady", steady)], tmp_path / "loss.png", smoothing=1)
    np.testing.assert_allclose(drawn[0].lines[1].get_ydata(), 2.0)
    impulse = [row | {"loss": 2.0 + (row["step"] == 20)} for row in steady]
    plot_loss([make_run("impulse", impulse)], tmp_path / "loss.png", smoothing=0.05)
    smoothed = np.asarray(drawn[0].lines[1].get_ydata()) - 2
    assert smoothed.sum() == pytest.approx(1)
    # Peak of a Gaussian with standard deviation 0.05 * 40 = 2 lines.
    assert smoothed.max() == pytest.approx(1 / (2 * np.sqrt(2 * np.pi)), rel=0.01)
    plot_loss([make_run("raw", impulse)], tmp_path / "loss.png", smoothing=0)
    assert list(drawn[0].lines[0].get_ydata()) == list(drawn[0].lines[1].get_ydata())


@pytest.mark.parametrize("smoothing", [0.03, 0.3])
def test_smoothing_starts_where_the_loss_starts(make_run, tmp_path, drawn, smoothing):
    # Falls from 4.1 to 2 with a time constant of 5 of 200 lines.
    losses = 2 + 2.1 * np.exp(-np.arange(200) / 5)
    run = make_run(rows=[{"step": i, "tokens": i, "seconds": i, "loss": x} for i, x in enumerate(losses, 1)])
    plot_loss([run], tmp_path / "loss.png", smoothing=smoothing)
    # Points are selected backwards from the newest one.
    smoothed = np.asarray(drawn[0].lines[1].get_ydata())[::-1]
    assert smoothed[0] == pytest.approx(losses[0])
    assert smoothed[-1] == pytest.approx(2, abs=0.05 if smoothing < 0.1 else 0.5)
    _, mean, _ = mean_over_runs([run, run])
    assert mean[0] == pytest.approx(losses[0])


def test_smoothing_keeps_a_straight_line_at_its_beginning(make_run, tmp_path, drawn):
    line = [{"step": i, "tokens": i, "loss": 4 - i / 100} for i in range(1, 101)]
    plot_loss([make_run(rows=line)], tmp_path / "loss.png")
    raw, smoothed, _ = drawn[0].lines
    np.testing.assert_allclose(smoothed.get_ydata()[20:], raw.get_ydata()[20:])


@pytest.mark.parametrize("valid", [(3.1, 3.4, 3.8), (3.8, 3.4, 3.1), (3.1, 3.8, 3.1)])
def test_the_legend_covers_no_validation_loss(make_run, tmp_path, drawn, valid):
    rows = [{"step": i, "tokens": 10 * i, "loss": None if i == 0 else 3 - 0.2 * i} for i in range(9)]
    for step, loss in zip((0, 4, 8), valid, strict=True):
        rows[step]["valid_loss"] = loss
    plot_loss([make_run(rows=rows)], tmp_path / "loss.png")
    (axes,) = drawn
    covered = axes.get_legend().get_window_extent()
    points = axes.transData.transform(np.transpose(axes.lines[2].get_data()))
    assert len(points) == 3
    assert not any(covered.contains(*point) for point in points)


def test_labels_of_bands_name_the_drawn_and_the_printed_loss(make_run, tmp_path, drawn):
    groups = {
        name: [make_run(f"{name}/{seed}", rows_of(end, seed=seed)) for seed in (1, 2)]
        for name, end in (("rwkv1", 1.5), ("mha_rotary", 1.7))
    }
    plot_bands(groups, tmp_path / "loss.png")
    (axes,) = drawn
    assert axes.get_ylabel() == "training loss (nats per token)"
    assert texts(axes) == ["1.500", "1.700", "held-out\nloss"]
    assert legend(axes) == ["rwkv1", "mha_rotary"]


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 0, "valid_loss": 4.9}],
        [{"step": 1, "tokens": 10, "loss": 4.0}],
        [{"step": 0, "valid_loss": 4.9}, {"step": 5, "tokens": 50, "loss": 4.0, "valid_loss": 4.0}],
        [{"step": s, "tokens": s, "loss": 4.0, "valid_loss": None} for s in range(1, 9)],
    ],
    ids=["only step 0", "one step", "two lines", "constant, no validation"],
)
def test_short_runs(make_run, tmp_path, rows):
    plot_loss([make_run(rows=rows)], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_null_and_non_finite_values_are_left_out(make_run, tmp_path, drawn):
    odd = [
        {"step": None, "tokens": None, "loss": 9.0},
        {"step": 3, "tokens": 3, "loss": float("nan"), "valid_loss": float("inf")},
        {"step": 4, "tokens": 4, "loss": None, "unknown": [1]},
        {"step": 5, "tokens": 5, "loss": "high"},
        {"step": 6, "tokens": 6, "loss": 2.0},
    ]
    plot_loss([make_run(rows=odd)], tmp_path / "loss.png")
    raw, _, valid = drawn[0].lines
    assert list(raw.get_ydata()) == [2.0]
    assert len(valid.get_xdata()) == 0


def test_metrics_skip_a_last_line_cut_short(make_run):
    rows = rows_of(steps=50)
    assert read_metrics(make_run(rows=rows, tail='{"step": 60, "lo')) == rows
    assert read_metrics(make_run("number", rows, tail="6")) == rows


def test_metrics_name_another_broken_line(make_run):
    run = make_run(rows=[], tail='{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(DamagedFile, match=r"line 2 of .*metrics\.jsonl"):
        read_metrics(run)


def test_bad_input_is_named_and_nothing_written(make_run, tmp_path):
    good, empty = make_run(), make_run("empty", [])
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    png = tmp_path / "loss.png"
    cases = [
        ([tmp_path / "missing"], png, {}, "no run folder .*missing"),
        ([good, tmp_path / "folder"], png, {}, "folder is not a run folder: it has no config.toml"),
        ([empty], png, {}, r"empty.metrics\.jsonl has no losses"),
        ([], png, {}, "no run to plot"),
        ([good], tmp_path / "loss.gif", {}, r"loss\.gif has an unsupported suffix '\.gif'; use \.png or \.svg"),
        ([good], tmp_path / "loss", {}, r"\.png or \.svg"),
        ([good], png, {"x": "epochs"}, "x is 'epochs'; it must be one of tokens, steps, seconds"),
        ([good], png, {"smoothing": -1}, "smoothing is -1; it must be from 0 to 1"),
        ([good], png, {"smoothing": float("nan")}, "smoothing is"),
        ([good], good / "metrics.jsonl" / "loss.png", {}, "cannot write"),
    ]
    for runs, out, options, message in cases:
        with pytest.raises(TimemixError, match=message):
            plot_loss(runs, out, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_characters_outside_the_font_are_named_in_one_sentence(make_run, tmp_path, caplog, recwarn):
    plot_loss([make_run("鱼 a"), make_run("猫鱼")], tmp_path / "p.png")
    assert [record.getMessage() for record in caplog.records] == [
        f"the font of {tmp_path / 'p.png'} lacks characters, which appear as boxes: 猫 鱼"
    ]
    assert not recwarn.list
    plot_loss([make_run("fish")], tmp_path / "p.svg")
    assert len(caplog.records) == 1


def test_a_failed_write_keeps_the_old_picture(make_run, tmp_path, monkeypatch):
    out = tmp_path / "loss.png"
    out.write_text("old")

    def half(figure, path, **_):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    run = make_run()
    with pytest.raises(CannotWrite, match=r"no space left on the device for .*loss\.png"):
        plot_loss([run], out)
    assert out.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [out, run]


def test_importing_is_cheap_and_plotting_leaves_no_global_state(make_run, tmp_path):
    code = f"""
import sys
from pathlib import Path
from timemix.reporting.plots import mean_over_runs, plot_bands, plot_loss
assert "matplotlib" not in sys.modules and "torch" not in sys.modules
plot_loss([Path({str(make_run())!r})], Path({str(tmp_path / "loss.png")!r}))
assert "matplotlib.pyplot" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
