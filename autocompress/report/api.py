"""The public names, read off their docstrings: docs/api.md.

python -m autocompress.report.api > docs/api.md
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import autocompress

_FIRST = ("search", "resume", "profile", "evaluate", "export", "load", "read_artifact", "Task", "WholeSplit")
"""What most people need, in this order; the others follow by name."""
_WIDE = 100
"""Columns of a signature on one line."""


def markdown() -> str:
    lines = [
        "# The Python API",
        "",
        "Written by `python -m autocompress.report.api` from the docstrings, to which a test holds it. All is in",
        "`autocompress` itself; what is asked for and cannot be done is raised as an `AutocompressError`.",
    ]
    others = [name for name in sorted(autocompress.__all__) if name not in (*_FIRST, "__version__", "techniques")]
    for name in (*_FIRST, *others):
        thing = getattr(autocompress, name)
        lines += ["", f"## {name}", "", "```python", _signature(name, thing), "```", "", _text(thing)]
        members = [*_members(thing)] if inspect.isclass(thing) else []
        lines += ["", *members] if members else []
    return "\n".join(lines) + "\n"


def _text(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "")


def _signature(name: str, thing: Any) -> str:
    """As it is called, on one line or with a line for each argument."""
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return f"class {name}(Exception)"
    back = "" if inspect.isclass(thing) else f" -> {inspect.signature(thing).return_annotation}"
    head, arguments = "class " * inspect.isclass(thing) + name, _arguments(thing)
    line = f"{head}({', '.join(arguments)}){back}"
    return line if len(line) <= _WIDE else "\n".join([f"{head}(", *(f"    {a}," for a in arguments), f"){back}"])


def _arguments(function: Callable[..., Any]) -> list[str]:
    out: list[str] = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in out:
            out.append("*")
        if p.name not in ("self", "cls"):
            out.append(f"{p.name}: {p.annotation}" + ("" if p.default is p.empty else f" = {_default(p.default)}"))
    return out


def _default(value: Any) -> str:
    """Dots where it has no text that is the same in every process."""
    plain = value is None or isinstance(value, (str, int, float, tuple))
    return repr(value) if plain else getattr(value, "__name__", "...").replace("<lambda>", "...")


def _members(kind: type) -> Iterator[str]:
    """One line for each public method and property that has a docstring."""
    for name, member in vars(kind).items():
        method = getattr(member, "__func__", member)
        called = inspect.isfunction(method)
        getter = method if called else getattr(member, "fget", getattr(member, "func", None))
        is_field = name in getattr(kind, "__dataclass_fields__", ())
        if not name.startswith("_") and not is_field and getter is not None and getter.__doc__:
            arguments = f"({', '.join(_arguments(method))})" if called else ""
            yield f"- `{name}{arguments}`: {' '.join(_text(getter).split())}"


if __name__ == "__main__":
    sys.stdout.write(markdown())
