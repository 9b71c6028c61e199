"""Independent proofs on several threads, each with one thread of BLAS.

The proof of one block is many calls that are too small for several threads of BLAS, and much that is not BLAS. Blocks
are independent, so cores are used best by one block each.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from contextvars import copy_context
from typing import Any, TypeVar

from lipbounds._text import device as places
from lipbounds._text.progress import alive, stoppable
from lipbounds._text.threads import one_blas_thread

Group = TypeVar("Group")
Item = TypeVar("Item")
Result = TypeVar("Result")

_THREADS = 8
_WORTH = 1.0  # seconds of estimated work below which one block follows the other
_LIMIT = 2**31  # bytes of the blocks that are worked on at a time, unless one alone takes more
_MADE = 3 * 2**30  # bytes of the groups that are made at a time, unless one alone takes more


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

    with one_blas_thread(), ThreadPoolExecutor(count) as pool, stoppable():
        for item in items:
            bytes_ = need(item)
            while len(running) > count or (running and bytes_ + sum(n for _, n, _ in running) > _LIMIT):
                yield first()
            running.append((item, bytes_, pool.submit(copy_context().run, run, item)))
            del item
        while running:
            yield first()


@contextmanager
def in_groups(
    make: Callable[[Group], Iterable[Item]],
    work: Callable[[Item], Result],
    groups: Sequence[Group],
    *,
    seconds: Callable[[Group], float],
    cost: Callable[[Item], float],
    need: Callable[[Group], float],
) -> Iterator[Iterator[tuple[Item, Result]]]:
    """An iterator over (item, work(item)) for the items of all groups, which threads make as well; in no fixed order.

    A thread that is free works on the dearest item that has been made, else it makes the group whose work takes
    longest, so that what is left at the end is short.

    Args:
        make: the items of a group; it runs in a thread, like `work` (see `side_by_side`).
        work: on one item.
        groups: to make items of.
        seconds: about what a group takes, its items included.
        cost: of the work on an item, in any unit.
        need: bytes of the items of a group.
    """
    count = min(os.cpu_count() or 1, _THREADS)
    if count < 2 or sum(map(seconds, groups)) < _WORTH or places.chosen() is not None:
        yield ((item, work(item)) for group in groups for item in make(group))
        return
    ordered = deque(sorted(groups, key=seconds, reverse=True))
    with closing(_finished(make, work, ordered, count, cost, need)) as results:
        yield results


def _finished(
    make: Callable[[Group], Iterable[Item]],
    work: Callable[[Item], Result],
    groups: deque[Group],
    count: int,
    cost: Callable[[Item], float],
    need: Callable[[Group], float],
) -> Generator[tuple[Item, Result]]:
    made: list[tuple[float, int, Item]] = []  # (cost, index of the group, item), the dearest last
    sizes: list[float] = []  # bytes of each group that was begun
    left: list[int] = []  # its items that are not done
    making: dict[Future[list[Item]], int] = {}
    working: dict[Future[Result], tuple[int, Item]] = {}

    def build(group: Group) -> list[Item]:
        alive()
        return list(make(group))

    def run(item: Item) -> Result:
        alive()
        return work(item)

    def submit(pool: ThreadPoolExecutor) -> bool:
        """Give a free thread something to do; False where there is nothing, or no memory for it."""
        if len(making) + len(working) >= count:
            return False
        if made:
            _, index, item = made.pop()
            working[pool.submit(copy_context().run, run, item)] = index, item
            return True
        held = sum(size for size, items in zip(sizes, left, strict=True) if items)
        if not groups or (held and held + need(groups[0]) > _MADE):
            return False
        group = groups.popleft()
        sizes.append(need(group))
        left.append(1)  # until it is made
        making[pool.submit(copy_context().run, build, group)] = len(sizes) - 1
        return True

    with one_blas_thread(), ThreadPoolExecutor(count) as pool, stoppable():
        while submit(pool) or making or working:
            while submit(pool):
                pass
            running: list[Future[Any]] = [*making, *working]
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                if future in making:
                    index = making.pop(future)
                    items = future.result()
                    left[index] = len(items)
                    made.extend((cost(item), index, item) for item in items)
                    made.sort(key=lambda entry: entry[0])
                    del items
                else:
                    index, item = working.pop(future)
                    result = future.result()
                    left[index] -= 1
                    while submit(pool):
                        pass
                    yield item, result
                    del item, result
