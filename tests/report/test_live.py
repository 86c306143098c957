"""What people see while they wait."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from autocompress.agent.preparation import Progress
from autocompress.durations import duration
from autocompress.front import Base
from autocompress.report.live import LiveView, terminal_plot

POINTS = ((1000, 0.8), (4000, 0.97), (5000, 0.9), (50_000, 0.98))


def progress(done: float, seconds: float, phase: str = "searching", failed: int = 0) -> Progress:
    base = Base(700_000, 0.99, 0.98)
    return Progress(phase, Path("runs/x"), done, failed, 50, seconds, base, POINTS)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3723, "1:02:03")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_terminal_plot_marks_front_others_and_original() -> None:
    text = terminal_plot(progress(4, 10)).plain
    picture, legend = text.rsplit("\n", 1)
    assert picture.count("●") == 3
    assert picture.count("·") == 1
    assert picture.count("■") == 1
    assert "front" in legend
    assert "1 KB" in picture
    assert "700 KB" in picture
    assert terminal_plot(Progress("searching", Path())).plain == ""


def test_the_terminal_plot_of_a_metric_that_is_no_share() -> None:
    points = ((1000, -8.1e-5), (4000, -3.6e-5))
    shown = terminal_plot(Progress("searching", Path(), base=Base(9000, -3.5e-5, -3.5e-5, -3e-4), points=points)).plain
    assert "-3.500e-05 │" in shown
    assert "-8.100e-05 │" in shown
    assert len({line.index("│") for line in shown.splitlines() if "│" in line}) == 1


def test_time_left_follows_the_rate() -> None:
    console = Console(file=io.StringIO(), width=100)
    with LiveView(console) as view:
        view(progress(0, 5))
        view(progress(10, 25, failed=1))
        view(progress(25.5, 31))
    assert isinstance(console.file, io.StringIO)
    assert "25.5/50 trials, 58.8 a minute, 0:25 left" in console.file.getvalue()
    assert "10/50 trials, 30.0 a minute, 1:20 left, 1 failed" in console.file.getvalue()


@pytest.mark.parametrize(("base", "told"), [((0.1, 0.1, 0.11), 1), ((0.9, 0.9, 0.11), 0), ((-3.0, -3.0, 0.0), 0)])
def test_an_original_that_knows_nothing_is_told_of_once(base: tuple[float, float, float], told: int) -> None:
    """No chance was measured of the last."""
    console = Console(file=io.StringIO(), width=200)
    with LiveView(console) as view:
        for done in (0, 1):
            view(replace(progress(done, 5), base=Base(700_000, *base)))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("no better than its mean output, whatever the input: was it trained?") == told


def test_a_terminal_sees_a_bar_and_a_plot() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with LiveView(console) as view:
        view(progress(10, 25))
    assert isinstance(console.file, io.StringIO)
    assert "●" in console.file.getvalue()


def test_quiet_is_quiet() -> None:
    console = Console(file=io.StringIO(), width=100)
    with LiveView(console, shown=False) as view:
        view(progress(10, 25))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""
    assert view.folder == Path("runs/x")
