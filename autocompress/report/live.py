"""Live progress of a search: how far, how fast, how long still, and the front as it grows."""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autocompress.agent.preparation import Progress
from autocompress.durations import duration
from autocompress.front import format_accuracy, non_dominated
from autocompress.sizes import format_size

WIDTH, HEIGHT = 56, 11
NO_SKILL = "on the validation split the original is no better than its mean output, whatever the input: was it trained?"


def terminal_plot(progress: Progress) -> Text:
    """Validation accuracy over log bytes, WIDTH x HEIGHT characters: front filled, the rest as dots."""
    points = [(float(size), accuracy) for size, accuracy in progress.points]
    base = progress.base
    if not points or base is None:
        return Text("")
    front = set(non_dominated(points))
    top = max(base.val_accuracy, *(a for _, a in points))
    bottom = max(min(points[i][1] for i in front), top - 0.25 * base.skill)
    bottom = min(bottom, top - 0.01 * base.skill)
    levels = [format_accuracy(top), *[""] * (HEIGHT - 2), format_accuracy(bottom)]
    margin = 2 + max(map(len, levels))
    sizes = [float(base.size_bytes), *(s for s, _ in points)]
    left, right = math.log(min(sizes)), math.log(max(sizes))
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]

    def put(size: float, accuracy: float, mark: str) -> None:
        if accuracy < bottom:
            return
        x = round((math.log(size) - left) / max(right - left, 1e-9) * (WIDTH - 1))
        y = round((top - accuracy) / (top - bottom) * (HEIGHT - 1))
        grid[y][x] = mark

    for i, (size, accuracy) in enumerate(points):
        if i not in front:
            put(size, accuracy, "·")
    for i in front:
        put(*points[i], "●")
    put(base.size_bytes, base.val_accuracy, "■")
    text = Text()
    for level, row in zip(levels, grid, strict=True):
        text.append(f"{level.rjust(margin - 1)} │", style="dim")
        for mark in row:
            text.append(mark, style={"●": "bold blue", "■": "bold", "·": "dim"}.get(mark, ""))
        text.append("\n")
    low, high = format_size(min(sizes)), format_size(max(sizes))
    text.append(" " * margin + "└" + "─" * WIDTH + "\n", style="dim")
    text.append(" " * (margin + 1) + low + high.rjust(WIDTH - len(low)) + "\n", style="dim")
    text.append(" " * (margin + 1) + "● front   · other trials   ■ original", style="dim")
    return text


class LiveView:
    """A listener for `search` that draws in place; plain lines where the output is not a terminal.

    shown: False draws nothing. folder: that of the run, once it is known.
    """

    def __init__(self, console: Console, shown: bool = True) -> None:
        self.console, self.shown = console, shown
        self.folder: Path | None = None
        terminal = shown and console.is_terminal
        self._live = Live(console=console, refresh_per_second=4, transient=True) if terminal else None
        self._phase = ""
        self._told, self._judged = -1.0, False
        self._first: tuple[float, float] | None = None

    def __enter__(self) -> LiveView:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        self.folder = progress.folder
        if not self.shown:
            return
        if progress.base and not self._judged:
            self._judged = True
            if progress.base.chance_accuracy and progress.base.val_accuracy <= progress.base.chance_accuracy:
                self.console.print(NO_SKILL, style="yellow", highlight=False)
        if progress.phase == "searching" and self._first is None:
            self._first = (progress.seconds, progress.done)
        if self._live:
            self._live.update(self._draw(progress))
        elif progress.phase != self._phase:
            self.console.print(f"{progress.phase} ...")
        elif progress.done >= self._told + max(1, progress.budget // 10):
            self._told = progress.done
            self.console.print(self._status(progress))
        self._phase = progress.phase

    def _status(self, progress: Progress) -> str:
        text = f"{progress.done:g}/{progress.budget} trials"
        began, first = self._first or (0.0, 0.0)
        count, passed = progress.done - first, progress.seconds - began
        if count > 0:
            left = duration((progress.budget - progress.done) * passed / count)
            text += f", {60 * count / passed:.1f} a minute, {left} left"
        else:
            text += ", time left: known after the first trial"
        return text + (f", {progress.failed} failed" if progress.failed else "")

    def _draw(self, progress: Progress) -> RenderableType:
        if progress.phase != "searching":
            return Text(f"{progress.phase} ... {duration(progress.seconds)}")
        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(progress.budget, progress.done, width=28), self._status(progress))
        return Group(Text(f"run {progress.folder}", style="dim"), row, terminal_plot(progress))
