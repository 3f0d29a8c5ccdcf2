"""How the command ends what it serves; the whole way is in ``tests/e2e/test_survival.py``."""

import threading
import time
import warnings

import pytest

from antiphon.deployment.launcher import _finish_open_requests

with warnings.catch_warnings():
    # Importing ray.serve uses pydantic in a way that pydantic deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray import serve


class Ingress:
    """A handle to ingresses that have open requests until they are cut off."""

    def __init__(self, finishes: bool, fails: bool = False) -> None:
        self.asked: list[float] = []
        self._finishes = finishes
        self._fails = fails

    def broadcast(self, method: str, seconds: float) -> "Ingress":
        assert method == "stop_taking"
        self.asked.append(seconds)
        return self

    def results(self, timeout_s: float) -> list[None]:
        if self._fails:
            raise RuntimeError("no replica is left")
        if self._finishes or self.asked[-1] == 0:
            return [None]
        time.sleep(timeout_s)
        raise TimeoutError


def stop(monkeypatch: pytest.MonkeyPatch, ingress: Ingress, hurry: threading.Event) -> float:
    def handle(deployment: str, app: str) -> Ingress:
        return ingress

    monkeypatch.setattr(serve, "get_deployment_handle", handle)
    began = time.monotonic()
    _finish_open_requests(30.0, hurry)
    return time.monotonic() - began


def test_a_stop_waits_until_every_ingress_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    ingress = Ingress(finishes=True)
    stop(monkeypatch, ingress, threading.Event())
    assert ingress.asked == [30.0]


def test_a_second_signal_ends_open_requests_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ingress, hurry = Ingress(finishes=False), threading.Event()
    threading.Timer(0.3, hurry.set).start()
    assert stop(monkeypatch, ingress, hurry) < 5
    assert ingress.asked == [30.0, 0.0]


def test_an_application_that_does_not_answer_is_stopped_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop(monkeypatch, Ingress(finishes=False, fails=True), threading.Event())
    assert "open requests are cut off: no replica is left" in capsys.readouterr().err
