"""One BLAS thread where several threads of this library work, or where products are too small for more.

The number of BLAS threads is a setting of the whole process. It is counted who wants one thread, so that the number
found at first is there again after the last of them, in whatever order calls in several threads end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

_lock = threading.Lock()
_limits: list[threadpool_limits] = []  # while someone wants one thread
_wanted = 0


@contextmanager
def one_blas_thread(wanted: bool = True) -> Iterator[None]:
    """Compute with one BLAS thread inside, unless `wanted` is False."""
    global _wanted
    if not wanted:
        yield
        return
    with _lock:
        if not _wanted:
            _limits.append(threadpool_limits(1, "blas"))
        _wanted += 1
    try:
        yield
    finally:
        with _lock:
            _wanted -= 1
            if not _wanted:
                _limits.pop().restore_original_limits()
