"""Optuna's journal, written once for all that is logged together: every write waits for the disk."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

from autocompress.errors import RunError


class Journal(JournalFileBackend):
    """The file at `path`, for one process at a time. What a crash cut short at its end is dropped."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        with path.open("rb+") as file:
            lines = [line for line in file if line.endswith(b"\n")]
            file.truncate(sum(map(len, lines)))
        self._written = len(lines)
        self._held: list[dict[str, Any]] | None = None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What is logged inside is read as always, but written at the end (also of what raises: it was read)."""
        self._held = held = list[dict[str, Any]]()
        try:
            yield
        finally:
            self._held = None
            if held:
                self.append_logs(held)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self._held is None:
            try:
                super().append_logs(logs)
            except (OSError, RuntimeError) as error:
                interrupt = _interrupt_behind(error)
                if interrupt is not None:
                    raise interrupt from None
                raise RunError(
                    f"cannot write {self._file_path!r}: {getattr(error, 'strerror', None) or error}"
                ) from error
            self._written += len(logs)
        else:
            self._held += json.loads(json.dumps(logs))  # as they will be read from the file

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        if log_number_from < self._written:
            yield from super().read_logs(log_number_from)
        yield from (self._held or [])[max(log_number_from - self._written, 0) :]


def _interrupt_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """Optuna's lock, interrupted while it is taken or given back, complains of that it is not there."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error
