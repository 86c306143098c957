"""Tables for the terminal."""

from __future__ import annotations

import math

from rich.table import Table

from autocompress.front import ParetoFront, format_accuracy


def front_table(front: ParetoFront) -> Table:
    """One row a file, largest first; the first row is the original."""
    table = Table(title=f"{front.task}: {len(front)} files on the front, in {front.folder}", title_justify="left")
    for name in ("bytes", "ratio", "val", "test", "trial", "file"):
        left = name == "file"
        table.add_column(name, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    base = front.base
    table.add_row(
        f"{base.size_bytes:,}",
        "1",
        format_accuracy(base.val_accuracy),
        format_accuracy(base.test_accuracy),
        "",
        "state_dict",
        style="dim",
    )
    for point in reversed(front.points):
        test = "" if point.test_accuracy is None else format_accuracy(point.test_accuracy)
        ratio = base.size_bytes / point.size_bytes
        table.add_row(
            f"{point.size_bytes:,}",
            f"1/{ratio:.1f}" if ratio < 10 else f"1/{ratio:.0f}",
            format_accuracy(point.val_accuracy),
            test,
            str(point.trial),
            point.artifact,
        )
    return table


def overfitting_sentence(front: ParetoFront) -> str:
    """How much the search has fitted the validation split, in a sentence; empty before the test."""
    gap = front.overfitting()
    if math.isnan(gap):
        return ""
    if front.base.in_shares:
        gap = round(100 * gap, 2)
    size = f"{abs(gap):.2f} points" if front.base.in_shares else format_accuracy(abs(gap))
    judged = f"{size} {'worse' if gap > 0 else 'better'} on test than" if gap else "as good on test as"
    return f"against the original, files are {judged} on validation (mean of the front)"
