"""Every error that is the user's to mend. Each carries one sentence: what, expected, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class AutocompressError(Exception):
    """Base of all errors raised on purpose; the CLI prints it as one line and exits with code 2."""


class TaskError(AutocompressError):
    """The task cannot be found, built or run: an empty loader, a NaN loss, a wrong shape."""


class SamplerError(AutocompressError):
    """The sampler is not known, or cannot work on a study."""


class SpaceError(AutocompressError):
    """The search space cannot be read or does not fit the model."""


class RecipeError(AutocompressError):
    """A recipe names a layer, dimension or choice that does not exist."""


class ArtifactError(AutocompressError):
    """A file is not a readable artifact, or does not fit the model it is loaded into."""


class ExportError(AutocompressError):
    """A model cannot be written in another format."""


class RunError(AutocompressError):
    """A run folder is missing, broken, taken or in use."""


class TargetError(AutocompressError):
    """A size or accuracy was asked for that cannot be parsed, reached or found."""


def near_misses(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'a' or 'b'?"` when something in `known` is close to `name`, else the list."""
    options = sorted(set(known))
    close = get_close_matches(name, options, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(option) for option in close) + "?"
    listed = ", ".join(options[:12]) + (", ..." if len(options) > 12 else "")
    return f"; choose one of: {listed}" if options else ""


def in_words(error: Exception) -> str:
    """What went wrong in someone else's code: its kind and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no more is told'])[0]}"
