"""What there is, read off the techniques themselves: `autocompress techniques` and docs/techniques.md.

python -m autocompress.report.techniques > docs/techniques.md
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass

import autocompress.techniques as package
from autocompress.techniques.base import techniques

_SOURCE = re.compile(r"[A-Z][\w-]+(?:,? and [A-Z]\w+| et al\.)?, [^()`;:]*?\b(?:19|20)\d\d\b")


@dataclass(frozen=True)
class Row:
    """One file of techniques. sources: papers. not_for: where it cannot apply."""

    dimension: str
    choices: str
    what: str
    sources: str
    not_for: str


def rows() -> list[Row]:
    """In the order in which they are applied. Every technique is documented by the docstring of its file."""
    out = []
    for name in package.names():
        module = sys.modules[f"{package.__name__}.{name}"]
        text = inspect.cleandoc(module.__doc__ or "")
        about, _, not_for = text.partition("\nNot for ")
        sources = dict.fromkeys(" ".join(found.split()) for found in _SOURCE.findall(" ".join(about.split())))
        for technique in techniques():
            choices = [str(c) for c in technique.examples() if technique.file_of(c) == module.__name__]
            if choices:
                what = " ".join(about.split("\n\n")[0].split()).rstrip(".")
                unfit = " ".join(not_for.split()).rstrip(".")
                out.append(Row(technique.name, ", ".join(choices), what, "; ".join(sources), unfit))
    return out


def markdown() -> str:
    lines = [
        "# Techniques",
        "",
        "Written by `python -m autocompress.report.techniques` from the docstrings of `autocompress/techniques/`, to",
        "which a test holds it. All can be named in a search space; `docs/benchmarks/techniques.md` has their worth.",
        "",
        "| dimension | choices (first: changes nothing) | what it is | source | cannot apply to |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += ["| " + " | ".join((f"`{r.dimension}`", r.choices, r.what, r.sources, r.not_for)) + " |" for r in rows()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
