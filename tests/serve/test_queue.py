"""The queue as logic: order, places, cancelling, and what a failure leaves behind."""

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
    """Work that steps until it is let through."""

    def __init__(self):
        self.began, self.opened = threading.Event(), threading.Event()

    def __call__(self, job):
        self.began.set()
        step = 0
        while not self.opened.wait(0.005):
            step += 1
            job.report(step)
        return "through"


def ended(job, seconds=5):
    end = time.monotonic() + seconds
    while not job.ended:
        assert time.monotonic() < end, job.state
        time.sleep(0.002)
    return job.state


@pytest.fixture
def gate(queue):
    """Work that the queue is busy with."""
    made = Gate()
    made.job = queue.submit(made)
    assert made.began.wait(5)
    return made


def test_work_gives_its_result_and_reports_on_the_way(queue, gate):
    while gate.job.progress is None:
        time.sleep(0.002)
    assert gate.job.state == "working" and gate.job.progress >= 1 and not gate.job.ended
    gate.opened.set()
    assert ended(gate.job) == "done" and gate.job.result == "through"


def test_jobs_are_done_one_at_a_time_in_the_order_they_came(queue, gate):
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
    assert [queue.ahead(job) for job in (gate.job, *jobs)] == [0, 1, 2, 3]
    gate.opened.set()
    assert [ended(job) for job in jobs] == ["done"] * 3
    assert done == [0, 1, 2] and most == 1


def test_so_many_wait_and_the_rest_are_told_when_to_come_again(queue, gate):
    jobs = [queue.submit(lambda job: None) for _ in range(3)]
    for _ in range(3):
        with pytest.raises(QueueFull, match="3 images are waiting already; come again in 1 s") as full:
            queue.submit(lambda job: None)
        assert full.value.retry_after >= 1
    jobs[1].cancel()  # leaves its place to another
    last = queue.submit(lambda job: None)
    assert jobs[1].state == "cancelled" and queue.ahead(last) == 3
    gate.opened.set()
    assert [ended(job) for job in (*jobs, last)] == ["done", "cancelled", "done", "done"]


def test_an_idle_queue_takes_one_more_than_may_wait(queue):
    """However fast they come, the one that is about to be taken keeps no other from waiting."""
    for _ in range(20):
        gates = [Gate() for _ in range(4)]
        jobs = [queue.submit(gate) for gate in gates]
        for gate in gates:
            gate.opened.set()
        assert [ended(job) for job in jobs] == ["done"] * 4
        while queue.ahead(jobs[0]):  # the thread says that it is idle a moment after the job has ended
            time.sleep(0.001)


def test_cancelled_work_ends_at_its_next_report_and_the_next_one_is_done(queue, gate):
    following = queue.submit(lambda job: "next")
    gate.job.cancel()
    assert ended(gate.job) == "cancelled" and gate.job.result is None
    assert ended(following) == "done"


def test_a_job_cancelled_in_the_queue_is_never_begun(queue, gate):
    begun = []
    job = queue.submit(begun.append)
    job.cancel()
    gate.opened.set()
    assert ended(job) == "cancelled" and ended(gate.job) == "done" and not begun


def fail(error):
    def work(job):
        raise error

    return work


def test_a_failure_is_one_line_and_stops_nobody_else(queue, capsys):
    expected = queue.submit(fail(LdmError("the scale\n is too large")))
    assert ended(expected) == "failed" and expected.error == "the scale is too large"
    defect = queue.submit(fail(ZeroDivisionError("oh\nno")))
    assert ended(defect) == "failed"
    assert defect.error == "a defect of ldm (ZeroDivisionError: oh); the terminal of ldm serve says where"
    assert "Traceback" in capsys.readouterr().err
    assert ended(queue.submit(lambda job: 1)) == "done"


def test_a_closed_queue_ends_everything_and_takes_nothing(queue, gate):
    waiting = queue.submit(lambda job: None)
    queue.close()
    assert queue.join(5)
    assert (ended(waiting), ended(gate.job)) == ("cancelled", "cancelled")
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
def test_whatever_comes_every_job_ends_once_and_no_more_wait_than_may(actions, most):
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
        assert sum(job.state == "waiting" and not job._unwanted.is_set() for job in jobs) <= most + 1
    for gate in gates:
        gate.opened.set()
    assert {ended(job) for job in jobs} <= {"done", "cancelled"}
    assert len(jobs) + refused == actions.count("submit")
    queue.close()
    assert queue.join(5)
