"""A bounded queue of jobs for one thread; when it is full, callers learn when to try again."""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from ldm.errors import LdmError, first_line
from ldm.terminal import say

State = Literal["waiting", "working", "done", "failed", "cancelled"]
Work = Callable[["Job"], Any]


class QueueFull(LdmError):
    """The queue is full.

    Attributes:
        retry_after: estimated seconds until a place is free, 1 or more.
    """

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} images are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


class Cancelled(Exception):
    """Raised by :meth:`Job.report` in a job that was cancelled."""


class Job:
    """A callable in the queue, and its state. The queue's thread writes, any thread reads.

    Attributes:
        progress: the last value passed to :meth:`report`.
        result: the return value, once the job is done.
        error: one line, once the job has failed.
    """

    def __init__(self, work: Work):
        self.state: State = "waiting"
        self.progress: Any = None
        self.result: Any = None
        self.error = ""
        self._work = work
        self._cancelled = threading.Event()

    @property
    def ended(self) -> bool:
        return self.state not in ("waiting", "working")

    def cancel(self) -> None:
        """End the job: at once if it is waiting, else at its next :meth:`report`."""
        self._cancelled.set()

    def report(self, progress: Any) -> None:
        """Called by the work between its steps; raises :class:`Cancelled` when the job was cancelled."""
        if self._cancelled.is_set():
            raise Cancelled
        self.progress = progress

    def _run(self) -> None:
        if self._cancelled.is_set():
            self.state = "cancelled"
            return
        self.state = "working"
        try:
            self.result = self._work(self)
            self.state = "done"
        except Cancelled:
            self.state = "cancelled"
        except LdmError as error:
            self.error, self.state = " ".join(str(error).split()), "failed"
        except Exception as error:  # a bug must not end the thread that all other jobs wait for
            say(traceback.format_exc(), sys.stderr)
            self.error = f"a bug in ldm ({type(error).__name__}: {first_line(error)}); the terminal of ldm serve shows where"
            self.state = "failed"


class Queue:
    """Runs jobs in order on one thread.

    Attributes:
        closed: whether it has cancelled all jobs and refuses new ones.
    """

    def __init__(self, max_waiting: int):
        self.max_waiting = max_waiting
        self._waiting: deque[Job] = deque()
        self._working: Job | None = None
        self._seconds = 1.0  # duration of the last job
        self.closed = False
        self._changed = threading.Condition()
        # daemon: the process can end in the middle of a step
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> Job:
        """Append a job.

        Raises:
            QueueFull: when ``max_waiting`` jobs are waiting.
            LdmError: when the queue is closed.
        """
        with self._changed:
            self._drop_cancelled()
            if self.closed:
                raise LdmError("ldm serve is stopping; start it again")
            # where no job is running, the thread is about to take the first one
            if len(self._waiting) >= self.max_waiting + (self._working is None):
                raise QueueFull(len(self._waiting), max(1, math.ceil(self._seconds)))
            job = Job(work)
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def ahead(self, job: Job) -> int:
        """Number of jobs before this one, including the running one."""
        with self._changed:
            self._drop_cancelled()
            before = self._waiting.index(job) if job in self._waiting else 0
            return before + (self._working is not None and self._working is not job)

    def close(self) -> None:
        """Cancel every job, and refuse new ones."""
        with self._changed:
            self.closed = True
            for job in (*self._waiting, *filter(None, [self._working])):
                job.cancel()
            self._drop_cancelled()
            self._changed.notify_all()

    def join(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for the thread of a closed queue; returns whether it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._waiting if job._cancelled.is_set()]:
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
