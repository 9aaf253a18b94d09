"""Work that waits its turn: one thread does it, so many may wait, the rest are told when to come again."""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from ldm.errors import LdmError, first_line

State = Literal["waiting", "working", "done", "failed", "cancelled"]
Work = Callable[["Job"], Any]


class QueueFull(LdmError):
    """No place is left.

    Attributes:
        retry_after: whole seconds after which a place is likely to be free, 1 or more.
    """

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} images are waiting already; come again in {retry_after} s")
        self.retry_after = retry_after


class Cancelled(Exception):
    """Raised inside work that nobody waits for any more."""


class Job:
    """One piece of work, from its place in the queue to its end. Its thread writes, any thread reads.

    Attributes:
        state: waiting, working, then done, failed or cancelled.
        progress: what the work reported last.
        result: what the work gave, once it is done.
        error: one line, once it has failed.
    """

    def __init__(self, work: Work):
        self.state: State = "waiting"
        self.progress: Any = None
        self.result: Any = None
        self.error = ""
        self._work = work
        self._unwanted = threading.Event()

    @property
    def ended(self) -> bool:
        return self.state not in ("waiting", "working")

    def cancel(self) -> None:
        """Nobody waits for it any more: it is left out when its turn comes, or ends at its next :meth:`report`."""
        self._unwanted.set()

    def report(self, progress: Any) -> None:
        """Called by the work itself, between its steps.

        Raises:
            Cancelled: when the job was cancelled.
        """
        if self._unwanted.is_set():
            raise Cancelled
        self.progress = progress

    def _run(self) -> None:
        if self._unwanted.is_set():
            self.state = "cancelled"
            return
        self.state = "working"
        try:
            self.result = self._work(self)
            self.state = "done"
        except Cancelled:
            self.state = "cancelled"
        except LdmError as error:
            self._fail(" ".join(str(error).split()))
        except Exception as error:  # a defect of ours ends this job, not the thread that all others wait for
            traceback.print_exc()
            self._fail(f"a defect of ldm ({type(error).__name__}: {first_line(error)}); the terminal of ldm serve says where")

    def _fail(self, error: str) -> None:
        self.error, self.state = error, "failed"


class Queue:
    """Jobs in the order they came, done by one thread.

    Attributes:
        closed: whether it takes no more and has cancelled all.
    """

    def __init__(self, max_waiting: int):
        self.max_waiting = max_waiting
        self._waiting: deque[Job] = deque()
        self._working: Job | None = None
        self._seconds = 1.0  # what the last job took
        self.closed = False
        self._changed = threading.Condition()
        # the process may end while it is in the middle of a step
        self._thread = threading.Thread(target=self._work, name="drawing", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> Job:
        """The job of a piece of work, at the end of the queue.

        Raises:
            QueueFull: when ``max_waiting`` jobs are waiting for their turn.
            LdmError: when the queue is closed.
        """
        with self._changed:
            self._drop_unwanted()
            if self.closed:
                raise LdmError("ldm serve is stopping; start it again")
            # the first of them is about to be taken where nothing is being worked on
            if len(self._waiting) >= self.max_waiting + (self._working is None):
                raise QueueFull(len(self._waiting), max(1, math.ceil(self._seconds)))
            job = Job(work)
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def ahead(self, job: Job) -> int:
        """Jobs that come before this one, that being worked on among them."""
        with self._changed:
            self._drop_unwanted()
            before = self._waiting.index(job) if job in self._waiting else 0
            return before + (self._working is not None and self._working is not job)

    def close(self) -> None:
        """Cancel every job, and take no more."""
        with self._changed:
            self.closed = True
            for job in (*self._waiting, *filter(None, [self._working])):
                job.cancel()
            self._drop_unwanted()
            self._changed.notify_all()

    def join(self, timeout: float) -> bool:
        """Wait until the thread of a closed queue has ended, ``timeout`` seconds at most; says whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _drop_unwanted(self) -> None:
        for job in [job for job in self._waiting if job._unwanted.is_set()]:
            self._waiting.remove(job)
            job.state = "cancelled"

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self.closed)
                if self.closed:
                    return
                self._working = job = self._waiting.popleft()
            start = time.monotonic()
            job._run()
            with self._changed:
                if job.state == "done":
                    self._seconds = time.monotonic() - start
                self._working = None
