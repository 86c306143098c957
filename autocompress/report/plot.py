"""Pictures: the front of a run, the inside of a file. PNG, SVG or PDF by the suffix of the path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from autocompress.agent.profile import Profile
from autocompress.artifact import Artifact
from autocompress.errors import TargetError
from autocompress.front import Base, FrontPoint, ParetoFront, format_accuracy
from autocompress.report.inside import HEADER, VECTORS, parts
from autocompress.report.trials import Trial
from autocompress.sizes import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = 1 / 3
"""Of the original's skill, what the picture of a front shows; what lies lower is counted, not drawn."""
_CROWDED = 5000
"""Largest over smallest size from which two more labels a power of ten run into each other."""
_BLUE, _GREY, _ORANGE = "#1f5fa8", "#8a8f98", "#d9661f"


def check_picture(path: Path) -> None:
    """Raises TargetError for a suffix that cannot be drawn: known before the work for it begins."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise TargetError(f"cannot draw {path.name!r}: give a name that ends in .png, .svg or .pdf")


@contextmanager
def _picture(path: Path, width: float, height: float) -> Iterator[Axes]:
    """Axes to draw on; saved when the block ends. width, height: inches. Raises TargetError for a suffix
    that cannot be drawn."""
    check_picture(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "autocompress", "font.size": 10}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        yield axes
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def plot_inside(artifact: Artifact, path: Path) -> Path:
    """Where the bytes of a file go: a bar for each layer, coloured by its format. Returns `path`."""
    shown = [part for part in parts(artifact) if part.size_bytes]
    with _picture(path, 8.2, 1.2 + 0.27 * len(shown)) as axes:
        colours: dict[str, str] = {}
        for part in shown:
            kind = part.stored_as if part.shape else part.name
            colour = _GREY if kind in (VECTORS, HEADER) else colours.setdefault(kind, f"C{len(colours) % 10}")
            label = kind if kind in colours and kind not in axes.get_legend_handles_labels()[1] else None
            axes.barh(part.name, part.size_bytes, color=colour, label=label)
            text = f" {part.size_bytes:,}"
            if part.shape:
                text += f"   {part.bits_per_weight:.2f} bits/w, {100 * part.zeros:.0f}% zeros"
            axes.annotate(text, (part.size_bytes, part.name), va="center", fontsize=8, color="#444")
        axes.invert_yaxis()
        axes.set_xlim(right=1.6 * max(part.size_bytes for part in shown))
        axes.set_xlabel("bytes in the file")
        if colours:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        axes.set_title(f"{artifact.size_bytes:,} bytes", loc="left")
    return path


def plot_profile(profile: Profile, path: Path) -> Path:
    """A heat map of the sensitivities: sites down, choices across, colour by the change of the outputs (log
    scale; white: no change, grey: no such choice). Returns `path`."""
    import numpy as np
    from matplotlib.colors import LogNorm

    shown = [d for d in profile.space if profile.effects.get(d.key)]
    sites = list(dict.fromkeys(d.site for d in shown))
    columns = list(dict.fromkeys((d.name, c) for d in shown for c in d.choices if c != d.default))
    columns.sort(key=lambda column: [d.name for d in shown].index(column[0]))
    values = np.full((len(sites), len(columns)), np.nan)
    for d in shown:
        for choice in d.choices:
            if (d.name, choice) in columns:
                effect = profile.effects[d.key].get(str(choice), np.nan)
                values[sites.index(d.site), columns.index((d.name, choice))] = max(effect, 1e-6)
    with _picture(path, 2.5 + 0.24 * len(columns), 1.9 + 0.26 * len(sites)) as axes:
        axes.set_facecolor("#e4e4e8")
        top = np.nanmax(values, initial=1e-5)
        image = axes.imshow(values, aspect="auto", cmap="YlOrRd", norm=LogNorm(1e-5, max(top, 1e-4)))
        axes.set_yticks(range(len(sites)), sites, fontsize=8)
        axes.set_xticks(range(len(columns)), [str(choice) for _, choice in columns], rotation=90, fontsize=8)
        names = [name for name, _ in columns]
        for name in dict.fromkeys(names):
            first, count = names.index(name), names.count(name)
            narrow = count < 0.7 * len(name)
            place = {"ha": "left", "rotation": 30} if narrow else {"ha": "center"}
            axes.text(first + (count - 1) / 2, -0.7, name, va="bottom", fontsize=8, **place)
            if first:
                axes.axvline(first - 0.5, color="white", lw=2.5)
        axes.figure.colorbar(image, ax=axes, label="change of the outputs (nats)")
    return path


def plot_front(front: ParetoFront, path: Path) -> Path:
    """Accuracy of the decoded model against bytes of the file. Returns `path`."""
    with _picture(path, 7.2, 4.3) as axes:
        sizes, unit = [p.size_bytes for p in front.points], _unit(front.base)
        axes.step(
            sizes,
            [unit * p.val_accuracy for p in front.points],
            where="post",
            color=_BLUE,
            lw=1.2,
            alpha=0.6,
        )
        axes.plot(
            sizes,
            [unit * p.val_accuracy for p in front.points],
            "o",
            color=_BLUE,
            ms=6,
            label="validation (selects)",
        )
        floor = _floor(front.base, front.points)
        tested = [p for p in front.points if p.test_accuracy is not None and p.val_accuracy >= floor]
        if tested:
            axes.plot(
                [p.size_bytes for p in tested],
                [unit * float(p.test_accuracy or 0) for p in tested],
                "x",
                color=_ORANGE,
                ms=6,
                label="test (reported)",
            )
        base = front.base
        axes.plot(
            base.size_bytes,
            unit * base.val_accuracy,
            "s",
            color=_GREY,
            ms=8,
            label="original",
        )
        _scales(axes, front)
        if front.points:
            knee = front.knee()
            ratio = base.size_bytes / knee.size_bytes
            axes.annotate(
                f"knee: {format_size(knee.size_bytes)}, 1/{ratio:.0f}",
                (knee.size_bytes, unit * knee.val_accuracy),
                (14, -24),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": _BLUE},
                color=_BLUE,
            )
        _leave_out(axes, base, front.points, "smaller file")
        axes.legend(loc="lower right", frameon=False)
        axes.set_title(f"{front.task}: size versus accuracy", loc="left")
    return path


def plot_trials(front: ParetoFront, trials: Sequence[Trial], path: Path) -> Path:
    """Every trial of a run, coloured by its number and joined to its parent. Returns `path`."""
    known, unit = {trial.number: trial for trial in trials}, _unit(front.base)
    with _picture(path, 8.2, 4.3) as axes:
        for trial in trials:
            parent = front.base if trial.parent is None else known.get(trial.parent)
            if parent:
                ends = (parent, trial)
                accuracies = [unit * end.val_accuracy for end in ends]
                axes.plot([end.size_bytes for end in ends], accuracies, color=_GREY, lw=0.7, alpha=0.5, zorder=1)
        drawn = axes.scatter(
            [trial.size_bytes for trial in trials],
            [unit * trial.val_accuracy for trial in trials],
            c=[trial.number for trial in trials],
            cmap="viridis_r",
            s=26,
            zorder=2,
        )
        axes.plot(front.base.size_bytes, unit * front.base.val_accuracy, "s", color=_GREY, ms=8)
        _scales(axes, front)
        _leave_out(axes, front.base, trials, "trial")
        axes.figure.colorbar(drawn, ax=axes, label="trial")
        axes.set_title("every trial, and its parent", loc="left")
    return path


def _scales(axes: Axes, front: ParetoFront) -> None:
    """Bytes, on a logarithmic scale, and accuracy, with a line at the original's."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.axhline(_unit(front.base) * front.base.val_accuracy, color=_GREY, lw=0.8, ls=":")
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if right < _CROWDED * left else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: format_size(v)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("size of the file on disk")
    axes.set_ylabel("accuracy of the decoded model" + (" (%)" if front.base.in_shares else ""))
    axes.grid(alpha=0.25)


def _leave_out(axes: Axes, base: Base, shown: Sequence[FrontPoint | Trial], name: str) -> None:
    """Count what lies far below the best instead of drawing it."""
    floor = _floor(base, shown)
    below = sum(one.val_accuracy < floor for one in shown)
    if below:
        axes.set_ylim(bottom=_unit(base) * floor)
        level = f"{100 * floor:.0f}%" if base.in_shares else format_accuracy(floor)
        text = axes.text(0.35, 0.02, f"{below} {name}{'s' if below > 1 else ''} below {level}", color=_GREY)
        text.set(transform=axes.transAxes, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})


def _floor(base: Base, shown: Sequence[FrontPoint | Trial]) -> float:
    """The lowest validation accuracy that is drawn."""
    return max([base.val_accuracy, *(one.val_accuracy for one in shown)]) - _SHOWN * base.skill


def _unit(base: Base) -> int:
    """What accuracies are drawn in: shares as percent, others as they are."""
    return 100 if base.in_shares else 1
