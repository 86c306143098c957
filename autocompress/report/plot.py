"""The front as a picture."""

from __future__ import annotations

from pathlib import Path

from autocompress.errors import TargetError
from autocompress.front import ParetoFront
from autocompress.sizes import format_size

_SHOWN = 30.0
"""Points of accuracy that the picture shows; what lies lower is counted, not drawn."""


def plot_front(front: ParetoFront, path: Path) -> Path:
    """Accuracy of the decoded model against bytes of the file; PNG, SVG or PDF by the suffix."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise TargetError(f"cannot draw {path.name!r}: give a name that ends in .png, .svg or .pdf")
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    blue, grey, orange = "#1f5fa8", "#8a8f98", "#d9661f"
    with mpl.rc_context({"svg.hashsalt": "autocompress", "font.size": 10}):
        figure = Figure(figsize=(7.2, 4.3), layout="constrained")
        axes = figure.add_subplot()
        sizes = [p.size_bytes for p in front.points]
        axes.step(
            sizes,
            [100 * p.val_accuracy for p in front.points],
            where="post",
            color=blue,
            lw=1.2,
            alpha=0.6,
        )
        axes.plot(
            sizes,
            [100 * p.val_accuracy for p in front.points],
            "o",
            color=blue,
            ms=6,
            label="validation (selects)",
        )
        tested = [p for p in front.points if p.test_accuracy is not None]
        axes.plot(
            [p.size_bytes for p in tested],
            [100 * float(p.test_accuracy or 0) for p in tested],
            "x",
            color=orange,
            ms=6,
            label="test (reported)",
        )
        base = front.base
        axes.plot(
            base.size_bytes,
            100 * base.val_accuracy,
            "s",
            color=grey,
            ms=8,
            label="original, float32",
        )
        axes.axhline(100 * base.val_accuracy, color=grey, lw=0.8, ls=":")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: format_size(v)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("size of the file on disk")
        axes.set_ylabel("accuracy of the decoded model (%)")
        if front.points:
            knee = front.knee()
            ratio = base.size_bytes / knee.size_bytes
            axes.annotate(
                f"knee: {format_size(knee.size_bytes)}, 1/{ratio:.0f}",
                (knee.size_bytes, 100 * knee.val_accuracy),
                (14, -24),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": blue},
                color=blue,
            )
        accuracies = [100 * p.val_accuracy for p in front.points] + [100 * base.val_accuracy]
        floor = max(accuracies) - _SHOWN
        if min(accuracies) < floor:
            axes.set_ylim(bottom=floor)
            below = sum(1 for accuracy in accuracies if accuracy < floor)
            axes.text(0.01, 0.02, f"{below} smaller files below {floor:.0f}%", transform=axes.transAxes, color=grey)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", frameon=False)
        axes.set_title(f"{front.task}: size versus accuracy", loc="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path
