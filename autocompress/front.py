"""The answer: the non-dominated trials of a run, as files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.errors import RunError, TargetError
from autocompress.recipe import Recipe
from autocompress.sizes import format_size, parse_size

if TYPE_CHECKING:
    from rich.table import Table

FRONT_FILE = "front.json"


def non_dominated(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (bytes, accuracy) that no other point beats in both; of equals, the first."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    keep: list[int] = []
    best = -math.inf
    for i in order:
        if points[i][1] > best:
            keep.append(i)
            best = points[i][1]
    return keep


def skill(accuracy: float, chance: float) -> float:
    """What a model knows: its accuracy above that of chance, which differences of accuracy are measured by. The size of
    the accuracy itself where chance is no worse."""
    above = accuracy - chance
    return above if above > 0 else abs(accuracy) or 1.0


def format_accuracy(accuracy: float) -> str:
    """Four decimals, or four digits of what is less than 0.1: 0.9850, -0.01162, 3.585e-06."""
    return f"{accuracy:.4f}" if abs(accuracy) >= 0.1 or not accuracy else f"{accuracy:#.4g}"


def hypervolume(points: Sequence[tuple[float, float]], base_bytes: float, worst_accuracy: float) -> float:
    """Area in (log2 bytes, accuracy) that `points` dominate, from (`base_bytes`, `worst_accuracy`).

    Zitzler and Thiele, 1998; with log2 bytes, halving a file counts the same everywhere.
    """
    area, floor = 0.0, worst_accuracy
    for i in non_dominated(points):
        size, accuracy = points[i]
        area += max(math.log2(base_bytes / size), 0.0) * max(accuracy - floor, 0.0)
        floor = max(floor, accuracy)
    return area


@dataclass(frozen=True)
class Base:
    """The original model: its float32 `state_dict` file (safetensors) in bytes, and its accuracies.

    chance_accuracy: validation accuracy of its mean output, whatever the input; 0 where that cannot be measured.
    """

    size_bytes: int
    val_accuracy: float
    test_accuracy: float
    chance_accuracy: float = 0.0

    @property
    def skill(self) -> float:
        """Accuracy above chance."""
        return skill(self.val_accuracy, self.chance_accuracy)

    @property
    def in_shares(self) -> bool:
        """Whether accuracies are shares of right answers, or look like it."""
        return 0 <= self.chance_accuracy <= self.val_accuracy <= 1


@dataclass(frozen=True)
class FrontPoint:
    """One member of the front; `artifact` and `recipe` are relative to the run folder."""

    trial: int
    size_bytes: int
    val_accuracy: float
    test_accuracy: float | None
    artifact: str
    recipe: dict[str, dict[str, Any]]
    parent: int | None
    seconds: float
    folder: Path = Path()

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self.folder / self.artifact

    def parsed_recipe(self) -> Recipe:
        return Recipe.from_json(self.recipe)


@dataclass(frozen=True, repr=False)
class ParetoFront:
    """Non-dominated trials of a run, sorted by size. Accuracy here is the validation accuracy;
    the test accuracy is only reported.
    """

    task: str
    space: str
    seed: int
    base: Base
    points: tuple[FrontPoint, ...]
    folder: Path = Path()

    def __iter__(self) -> Iterator[FrontPoint]:
        return iter(self.points)

    def __getitem__(self, index: int) -> FrontPoint:
        return self.points[index]

    def __len__(self) -> int:
        return len(self.points)

    def __repr__(self) -> str:
        """The table, as text."""
        from rich.console import Console

        console = Console(width=100)
        with console.capture() as shown:
            console.print(self.table())
        return shown.get()

    def best(self, max_size: str | int | None = None, min_accuracy: float | None = None) -> FrontPoint:
        """The most accurate point of at most `max_size`, or the smallest of at least `min_accuracy`.

        Both may be given. Raises TargetError, saying what is reachable, when no point qualifies.
        """
        limit = math.inf if max_size is None else parse_size(max_size)
        small = [p for p in self.points if p.size_bytes <= limit]
        if not small:
            smallest = min((p.size_bytes for p in self.points), default=0)
            raise TargetError(f"no file of at most {format_size(limit)}: the smallest of this run is {smallest} bytes")
        if min_accuracy is None:
            return max(small, key=lambda p: p.val_accuracy)
        good = [p for p in small if p.val_accuracy >= min_accuracy]
        if not good:
            best = max(small, key=lambda p: p.val_accuracy)
            raise TargetError(
                f"no file with validation accuracy of at least {min_accuracy:g}"
                + (f" and at most {format_size(limit)}" if max_size is not None else "")
                + f": the best has {format_accuracy(best.val_accuracy)} ({format_size(best.size_bytes)})"
            )
        return min(good, key=lambda p: p.size_bytes)

    def knee(self) -> FrontPoint:
        """The point farthest above the line between the ends, in (log bytes, accuracy) scaled to [0, 1]
        (Branke et al., 2004); the smallest file beyond which accuracy falls fast.
        """
        if not self.points:
            raise TargetError("the front is empty: no trial of this run finished")
        sizes = [math.log(p.size_bytes) for p in self.points]
        accuracies = [p.val_accuracy for p in self.points]
        width = max(sizes[-1] - sizes[0], 1e-9)
        height = max(accuracies[-1] - accuracies[0], 1e-9)
        rise = [(a - accuracies[0]) / height - (s - sizes[0]) / width for s, a in zip(sizes, accuracies, strict=True)]
        return self.points[rise.index(max(rise))]

    def overfitting(self) -> float:
        """How much the search has fitted the validation split: the mean loss of accuracy of the front's files
        against the original on the test split, less that on the validation split; NaN before the test.

        About zero when selection was honest to unseen data; 0.01 means that files are a point worse on test
        than selection on validation made them look.
        """
        gaps = [
            (self.base.test_accuracy - p.test_accuracy) - (self.base.val_accuracy - p.val_accuracy)
            for p in self.points
            if p.test_accuracy is not None
        ]
        return sum(gaps) / len(gaps) if gaps else math.nan

    def table(self) -> Table:
        """A rich table, largest file first."""
        from autocompress.report.table import front_table

        return front_table(self)

    def plot(self, path: str | Path) -> Path:
        """Draw the front; the suffix of `path` (.png or .svg) chooses the format. Returns the path."""
        from autocompress.report.plot import plot_front

        return plot_front(self, Path(path))

    def report(self, path: str | Path) -> Path:
        """Write a page (.html) with the front, where the bytes of its files go, and every trial. Returns the path."""
        from autocompress.report.page import write_page

        return write_page(self, Path(path))

    def to_json(self) -> dict[str, Any]:
        points = []
        for point in self.points:
            data = asdict(point)
            del data["folder"]
            points.append(data)
        return {
            "task": self.task,
            "space": self.space,
            "seed": self.seed,
            "base": asdict(self.base),
            "front": points,
        }

    @classmethod
    def read(cls, folder: str | Path) -> ParetoFront:
        """The front of a run folder. Raises RunError when there is none or it is broken."""
        folder = Path(folder)
        path = folder / FRONT_FILE
        if not path.is_file():
            raise RunError(f"{str(folder)!r} holds no {FRONT_FILE}: it is not a finished run of autocompress search")
        try:
            data = json.loads(path.read_text())
            points = tuple(FrontPoint(**point, folder=folder) for point in data["front"])
            return cls(data["task"], data["space"], data["seed"], Base(**data["base"]), points, folder)
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(f"{str(path)!r} cannot be read: {error}") from error
