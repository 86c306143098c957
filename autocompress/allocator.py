"""Memory that is freed stays with the process, for the tensors that come next.

By default glibc gives what is larger than 32 MiB back to the kernel at once, which hands it out again page by page,
each cleared: two thirds of the time of a forward pass of an EfficientNet with images of 224 x 224 pixels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Of `mallopt`, in <malloc.h>."""
_KEPT_BYTES = 1 << 30
"""At the end of the heap; what is free beyond them goes back to the kernel."""


def keep_freed_memory() -> None:
    """From now on, in all of this process. Where the allocator is another, nothing changes."""
    with _c_library() as library:
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


def return_freed_memory() -> None:
    """To the kernel, all that is free now: the process has no use for it soon."""
    with _c_library() as library:
        library.malloc_trim(0)


@contextmanager
def _c_library() -> Iterator[Any]:
    """As far as it can do what it is asked for in the block."""
    with suppress(OSError, AttributeError, TypeError):  # it has no such function, or on Windows no name
        yield ctypes.CDLL(None)
