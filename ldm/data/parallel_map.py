"""A parallel ``map`` by threads that keeps the order of its input."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Result = TypeVar("Result")


def parallel_map(
    function: Callable[[Given], Result], items: Iterable[Given], threads: int, ahead: int = 2
) -> Generator[tuple[Given, Result]]:
    """Pairs (item, ``function(item)``) in the order of ``items``, computed in threads.

    ``items`` is iterated in the caller's thread, at most ``ahead`` items per thread beyond the pair that is yielded. An
    exception of ``function`` is raised at its item's turn.
    """
    waiting: deque[tuple[Given, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="ldm") as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > ahead * threads:
                    item, future = waiting.popleft()
                    yield item, future.result()
            while waiting:
                item, future = waiting.popleft()
                yield item, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
