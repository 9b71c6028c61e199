"""Independent proofs on several threads, each with one thread of BLAS.

The proof of one block is many calls that are too small for several threads of BLAS, and much that is not BLAS. Blocks
are independent, so cores are used best by one block each.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import copy_context
from typing import TypeVar

from threadpoolctl import threadpool_limits

from lipbounds._text import device as places
from lipbounds._text.progress import alive, stoppable

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREADS = 8
_WORTH = 1.0  # seconds of estimated work below which one block follows the other
_LIMIT = 2**31  # bytes of the blocks that are worked on at a time, unless one alone takes more


@contextmanager
def side_by_side(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    seconds: float,
    need: Callable[[Item], float] = lambda item: 0.0,
) -> Iterator[Iterator[tuple[Item, Result]]]:
    """An iterator over (item, work(item)) in order; the work of a few items goes on at a time.

    Work that takes long calls `alive`, so that an interruption ends it.

    Args:
        work: runs in a thread, in a copy of this context.
        items: may be made one by one; they are drawn in this thread.
        seconds: about what all the work takes.
        need: bytes of the work on an item.
    """
    count = min(os.cpu_count() or 1, _THREADS)
    if count < 2 or seconds < _WORTH or places.chosen() is not None:
        yield ((item, work(item)) for item in items)
        return
    with closing(_drawn(work, items, count, need)) as results:
        yield results


def _drawn(
    work: Callable[[Item], Result], items: Iterable[Item], count: int, need: Callable[[Item], float]
) -> Generator[tuple[Item, Result]]:
    running: deque[tuple[Item, float, Future[Result]]] = deque()

    def run(item: Item) -> Result:
        alive()
        return work(item)

    def first() -> tuple[Item, Result]:
        item, _, future = running[0]
        result = future.result()
        running.popleft()
        return item, result

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(count) as pool, stoppable():
        for item in items:
            bytes_ = need(item)
            while len(running) > count or (running and bytes_ + sum(n for _, n, _ in running) > _LIMIT):
                yield first()
            running.append((item, bytes_, pool.submit(copy_context().run, run, item)))
            del item
        while running:
            yield first()
