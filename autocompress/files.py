"""Files that are whole or not there, and the names of those of a trial."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from autocompress.errors import ArtifactError

ARTIFACT, CHECKPOINT = "model.acz", "checkpoint.safetensors"
RECIPE, METRICS, ERROR = "recipe.json", "metrics.json", "error.txt"


def write_file(path: Path, data: bytes) -> None:
    """Write atomically: a killed writer leaves the old file or none. Raises ArtifactError on a full disk."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ArtifactError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
