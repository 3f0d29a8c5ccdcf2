"""A storm is one line a minute, and the next line says how many were left out."""

import logging

import pytest

from antiphon.workers import seldom_log
from antiphon.workers.seldom_log import SeldomLog

LOGGER = logging.getLogger("antiphon.test")


def test_a_subject_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = [100.0]
    log = SeldomLog(LOGGER, lambda: now[0])
    for _ in range(50):
        log.log(logging.INFO, ("late", "d0"), "from %s", "d0")
        log.log(logging.WARNING, ("late", "d1"), "from %s", "d1")
    assert sorted(caplog.messages) == [
        f"from d{n}; 0 more like it since the last such line" for n in (0, 1)
    ]
    now[0] += 60.0
    log.log(logging.INFO, ("late", "d0"), "from %s", "d0")
    assert caplog.messages[-1] == "from d0; 49 more like it since the last such line"
    assert len(caplog.messages) == 3


def test_what_it_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seldom_log, "_MAX_SUBJECTS", 3)
    log = SeldomLog(LOGGER)
    for number in range(10):
        log.log(logging.DEBUG, number, "from %d", number)
    assert list(log._subjects) == [7, 8, 9]
