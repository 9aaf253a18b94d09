"""The queue: order, limits, cancellation, failures."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.errors import LdmError
from ldm.serve.queue import Queue, QueueFull


@pytest.fixture
def queue():
    made = Queue(max_waiting=3)
    yield made
    made.close()
    assert made.join(5)


class Gate:
    """Work that steps until it is opened."""

    def __init__(self):
        self.began, self.opened = threading.Event(), threading.Event()

    def __call__(self, job):
        self.began.set()
        step = 0
        while not self.opened.wait(0.005):
            step += 1
            job.report(step)
        return "result"


def ended(job, seconds=5):
    end = time.monotonic() + seconds
    while not job.ended:
        assert time.monotonic() < end, job.state
        time.sleep(0.002)
    return job.state


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def running(queue, gate):
    """The job of ``gate``, which keeps the queue busy."""
    job = queue.submit(gate)
    assert gate.began.wait(5)
    return job


def test_work_reports_progress_and_returns_a_result(gate, running):
    while running.progress is None:
        time.sleep(0.002)
    assert running.state == "working" and running.progress >= 1 and not running.ended
    gate.opened.set()
    assert ended(running) == "done" and running.result == "result"


def test_jobs_run_one_at_a_time_in_order(queue, gate, running):
    done, here, most = [], 0, 0

    def work(number):
        def run(job):
            nonlocal here, most
            here += 1
            most = max(most, here)
            time.sleep(0.005)
            done.append(number)
            here -= 1

        return run

    jobs = [queue.submit(work(number)) for number in range(3)]
    assert [queue.ahead(job) for job in (running, *jobs)] == [0, 1, 2, 3]
    gate.opened.set()
    assert [ended(job) for job in jobs] == ["done"] * 3
    assert done == [0, 1, 2] and most == 1


def test_a_full_queue_says_when_to_try_again(queue, gate, running):
    jobs = [queue.submit(lambda job: None) for _ in range(3)]
    for _ in range(3):
        with pytest.raises(QueueFull, match="3 images are waiting already; try again in 1 s") as full:
            queue.submit(lambda job: None)
        assert full.value.retry_after >= 1
    jobs[1].cancel()  # frees its place
    last = queue.submit(lambda job: None)
    assert jobs[1].state == "cancelled" and queue.ahead(last) == 3
    gate.opened.set()
    assert [ended(job) for job in (*jobs, last)] == ["done", "cancelled", "done", "done"]


def test_an_idle_queue_takes_one_more_than_may_wait(queue):
    """The job that is about to start does not count as waiting."""
    for _ in range(20):
        gates = [Gate() for _ in range(4)]
        jobs = [queue.submit(gate) for gate in gates]
        for gate in gates:
            gate.opened.set()
        assert [ended(job) for job in jobs] == ["done"] * 4
        while queue.ahead(jobs[0]):  # the thread becomes idle a moment after the job has ended
            time.sleep(0.001)


def test_cancelled_work_ends_at_its_next_report_and_the_next_job_runs(queue, running):
    following = queue.submit(lambda job: "next")
    running.cancel()
    assert ended(running) == "cancelled" and running.result is None
    assert ended(following) == "done"


def test_a_job_cancelled_in_the_queue_never_begins(queue, gate, running):
    begun = []
    job = queue.submit(begun.append)
    job.cancel()
    gate.opened.set()
    assert ended(job) == "cancelled" and ended(running) == "done" and not begun


def fail(error):
    def work(job):
        raise error

    return work


def test_a_failure_is_one_line_and_later_jobs_run(queue, capsys):
    expected = queue.submit(fail(LdmError("the scale\n is too large")))
    assert ended(expected) == "failed" and expected.error == "the scale is too large"
    defect = queue.submit(fail(ZeroDivisionError("oh\nno")))
    assert ended(defect) == "failed"
    assert defect.error == "a bug in ldm (ZeroDivisionError: oh); the terminal of ldm serve shows where"
    assert "Traceback" in capsys.readouterr().err
    assert ended(queue.submit(lambda job: 1)) == "done"


def test_a_closed_queue_cancels_all_jobs_and_refuses_new_ones(queue, running):
    waiting = queue.submit(lambda job: None)
    queue.close()
    assert queue.join(5)
    assert (ended(waiting), ended(running)) == ("cancelled", "cancelled")
    with pytest.raises(LdmError, match="ldm serve is stopping"):
        queue.submit(lambda job: None)


def test_a_step_that_never_ends_does_not_keep_a_closed_queue(queue):
    stuck = threading.Event()
    job = queue.submit(lambda job: stuck.wait())
    while job.state == "waiting":
        time.sleep(0.002)
    queue.close()
    assert not queue.join(0.05)
    stuck.set()
    assert queue.join(5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["submit", "cancel", "open"]), max_size=40), st.integers(1, 4))
def test_every_job_ends_once_and_the_number_waiting_stays_within_the_limit(actions, most):
    queue, gates, jobs, refused = Queue(most), [], [], 0
    for action in actions:
        if action == "submit":
            gate = Gate()
            try:
                jobs.append(queue.submit(gate))
                gates.append(gate)
            except QueueFull:
                refused += 1
        elif action == "cancel" and jobs:
            jobs[len(jobs) // 2].cancel()
        elif gates:
            gates[len(gates) // 2].opened.set()
        assert sum(job.state == "waiting" and not job._cancelled.is_set() for job in jobs) <= most + 1
    for gate in gates:
        gate.opened.set()
    assert {ended(job) for job in jobs} <= {"done", "cancelled"}
    assert len(jobs) + refused == actions.count("submit")
    queue.close()
    assert queue.join(5)
