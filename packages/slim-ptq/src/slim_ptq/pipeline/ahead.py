"""Working ahead of the one who takes the results, on several cores, in bounded memory."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_MOST_THREADS = 4  # each of which can use several cores


def work_ahead(
    work: Callable[[T], R], items: Sequence[T], cost: Callable[[T], int], limit: int
) -> Generator[R, None, None]:
    """Yield ``work(item)`` for each item, in order, while the next ones are being worked on.

    The cores that torch uses are shared out among a few threads, so that one item is read while
    another is computed and the one before is written.

    Parameters
    ----------
    work : callable
        Runs in a thread, for several items at a time.
    cost : callable
        Bytes that an item stands for.
    limit : int
        Items are begun as long as those begun and not yet done with cost less, one at least.

    Notes
    -----
    What ``work`` raises is raised in the place of its result.  Close the iterator to stop early:
    what has not been begun is left out.
    """
    waiting: deque[tuple[Future[R], int]] = deque()
    left = deque(items)
    spent = 0
    with _threads() as (pool, threads):
        try:
            while left or waiting:
                while left and len(waiting) <= threads:
                    price = cost(left[0])
                    if waiting and spent + price > limit:
                        break
                    waiting.append((pool.submit(work, left.popleft()), price))
                    spent += price
                future, price = waiting.popleft()
                yield future.result()
                spent -= price
        finally:
            for future, _ in waiting:
                future.cancel()


@contextlib.contextmanager
def _threads() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Yield threads, and how many, that share the cores of torch while the context is open."""
    cores = torch.get_num_threads()
    count = min(cores, _MOST_THREADS)
    # The setting is that of a thread, and of those that are started later.
    start = (torch.set_num_threads, (max(1, cores // count),))
    with ThreadPoolExecutor(count, "slim-ahead", *start) as pool:
        try:
            yield pool, count
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)
