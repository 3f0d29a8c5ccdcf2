"""Which scheduling policy gloo's thread gets, and which the thread that starts it keeps."""

import os
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from antiphon.workers.handoff.batch_thread import batch_threads
from antiphon.workers.handoff.gloo import GlooTransport

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux has this policy")


def _gloo_threads() -> set[int]:
    tasks = Path("/proc/self/task").iterdir()
    return {int(t.name) for t in tasks if (t / "comm").read_text().startswith("gloo_tcp")}


def _policy_of_new_thread() -> int:
    policies: list[int] = []
    thread = threading.Thread(target=lambda: policies.append(os.sched_getscheduler(0)))
    thread.start()
    thread.join(5)
    return policies[0]


def test_threads_started_inside_are_batch_threads_and_later_ones_are_not():
    with batch_threads():
        assert _policy_of_new_thread() == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    assert _policy_of_new_thread() == os.SCHED_OTHER


def test_a_failure_inside_does_not_leave_the_policy_behind():
    with pytest.raises(ValueError, match="inside"), batch_threads():
        raise ValueError("inside")
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_the_threads_of_a_link_are_batch_threads():
    before = _gloo_threads()
    connecting, accepting = GlooTransport("127.0.0.1"), GlooTransport("127.0.0.1")
    address = accepting.address
    ends = []
    thread = threading.Thread(target=lambda: ends.append(accepting.accept("link", 5)))
    thread.start()
    ends.append(connecting.connect(address, "link", 5))
    thread.join(5)
    threads = _gloo_threads() - before
    policies = [os.sched_getscheduler(each) for each in threads]
    for end in ends:
        end.close()
    assert policies == 2 * [os.SCHED_BATCH]


def test_a_policy_that_somebody_chose_is_left_alone(monkeypatch):
    monkeypatch.setattr(os, "sched_getscheduler", lambda pid: os.SCHED_IDLE)
    monkeypatch.setattr(os, "sched_setscheduler", lambda *args: pytest.fail("must not be called"))
    with batch_threads():
        pass


def test_where_it_is_forbidden_that_is_logged_and_links_work(monkeypatch, caplog):
    def refuse(*args: object) -> None:
        raise PermissionError("not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with batch_threads():
        dist.ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)
    assert "not permitted" in caplog.text
