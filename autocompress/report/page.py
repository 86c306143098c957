"""The report of a run as a page: one HTML file that needs nothing beside it."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, PackageLoader

from autocompress.agent.run_folder import CONFIG
from autocompress.artifact import read_artifact
from autocompress.durations import duration
from autocompress.errors import RunError
from autocompress.files import write_file
from autocompress.front import ParetoFront, format_accuracy
from autocompress.report.inside import Part, parts
from autocompress.report.plot import plot_front, plot_trials
from autocompress.report.table import overfitting_sentence
from autocompress.report.trials import failure_sentences, read_trials
from autocompress.sizes import format_size

_CLOSE = 0.01
"""Share of the original's skill that a file may lose and still be called close to it."""
_COLUMNS = 12
"""Files of the front, spread over it, whose bytes are shown layer by layer: each has to be decoded."""


def write_page(front: ParetoFront, path: Path) -> Path:
    """The front and its files' links, where their bytes go layer by layer, every trial, and how to repeat the run.

    Returns `path`. Raises RunError when the run holds no file, or lacks what its front names.
    """
    if not front.points:
        raise RunError(f"run {str(front.folder)!r} has no finished trial yet: there is nothing to report")
    members = list(reversed(front.points))
    columns = [members[i] for i in sorted({i * (len(members) - 1) // (_COLUMNS - 1) for i in range(_COLUMNS)})]
    inside = [{part.name: part for part in parts(read_artifact(member.path))} for member in columns]
    layers = list(dict.fromkeys(name for file in inside for name in file))
    layers.sort(key=lambda name: all(not file[name].shape for file in inside if name in file))
    trials = read_trials(front.folder)
    config = front.folder / CONFIG
    close = [member for member in members if member.val_accuracy >= front.base.val_accuracy - _CLOSE * front.base.skill]
    environment = Environment(loader=PackageLoader("autocompress", "report"), autoescape=True, trim_blocks=True)
    accuracy = "{:.2%}".format if front.base.in_shares else format_accuracy
    environment.filters |= {"bytes": "{:,}".format, "accuracy": accuracy, "short": format_size}
    page = environment.get_template("page.html").render(
        front=front,
        members=members,
        columns=columns,
        notable=[member for member in members if member in (*close[-1:], front.knee())],
        link=lambda member: Path(os.path.relpath(member.path, path.parent)).as_posix(),
        layers=[(name, [file.get(name) for file in inside]) for name in layers],
        shade=_shade([part for file in inside for part in file.values()]),
        tell=_tell,
        overfitting=overfitting_sentence(front),
        trials=trials,
        failures=failure_sentences(front.folder),
        worked=duration(sum(trial.seconds for trial in trials)),
        pictures=[_svg(lambda at: plot_front(front, at)), _svg(lambda at: plot_trials(front, trials, at))],
        config=config.read_text() if config.is_file() else "",
    )
    write_file(path, page.encode())
    return path


def _svg(draw: Callable[[Path], Path]) -> str:
    """The picture as an element of a page."""
    with tempfile.TemporaryDirectory() as folder:
        text = draw(Path(folder) / "picture.svg").read_text()
    return text[text.index("<svg") :]


def _shade(found: list[Part]) -> Callable[[Part], str]:
    """A colour for each part: the darker, the more bytes, on a logarithmic scale."""
    largest = math.log(max(part.size_bytes for part in found) + 1)
    return lambda part: f"rgba(31, 95, 168, {0.75 * (math.log(part.size_bytes + 1) / largest) ** 2:.2f})"


def _tell(part: Part) -> str:
    """What is shown when a pointer rests on it."""
    if not part.shape:
        return part.stored_as
    how = ", ".join(filter(None, (part.stored_as, part.also)))
    return f"{part.dimensions}: {how}; {part.bits_per_weight:.2f} bits a weight, {100 * part.zeros:.0f}% zeros"
