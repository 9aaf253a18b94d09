"""Work done in threads, its results in the order of what was given."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def in_order(
    make: Callable[[Given], Made], given: Iterable[Given], threads: int, ahead: int = 2
) -> Iterator[tuple[Given, Made]]:
    """Each of ``given`` with what ``make`` makes of it, in their order.

    ``given`` is drawn from in the caller's thread, up to ``ahead`` for each thread before the one that is handed out.
    """
    waiting: deque[tuple[Given, Future[Made]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="ldm") as pool:
        try:
            for one in given:
                waiting.append((one, pool.submit(make, one)))
                if len(waiting) > ahead * threads:
                    one, future = waiting.popleft()
                    yield one, future.result()
            while waiting:
                one, future = waiting.popleft()
                yield one, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
