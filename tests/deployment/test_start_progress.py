"""What is said while the application starts, and when waiting is over."""

import threading
import warnings
from collections.abc import Iterator

import pytest

from antiphon.deployment import start_progress
from antiphon.deployment.start_progress import wait_until_running
from antiphon.errors import ConfigError

with warnings.catch_warnings():
    # Importing ray.serve uses pydantic in a way that pydantic deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray import serve
    from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger
    from ray.serve.schema import (
        ApplicationStatus,
        ApplicationStatusOverview,
        DeploymentStatusOverview,
        ServeStatus,
    )

DEPLOYING, RUNNING = ApplicationStatus.DEPLOYING, ApplicationStatus.RUNNING
SHORT = "has 1 replicas that have taken more than 30s to be scheduled. Resources required: GPU 1"


def status(application: ApplicationStatus, message: str) -> ServeStatus:
    """Of an application whose decode workers have something to say."""
    decode = DeploymentStatusOverview(
        status=DeploymentStatus.UPDATING,
        status_trigger=DeploymentStatusTrigger.CONFIG_UPDATE_STARTED,
        replica_states={},
        message=message,
    )
    overview = ApplicationStatusOverview(
        status=application, message="", last_deployed_time_s=0.0, deployments={"decode": decode}
    )
    return ServeStatus(applications={"antiphon": overview})


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_progress, "_POLL_SECONDS", 0.001)


def follow(
    monkeypatch: pytest.MonkeyPatch, *answers: ServeStatus, is_patient: bool = False
) -> None:
    """Wait while Serve gives these answers, one after another."""
    coming: Iterator[ServeStatus] = iter(answers)
    monkeypatch.setattr(serve, "status", lambda: next(coming))
    wait_until_running("antiphon", threading.Event(), is_patient=is_patient)


def test_what_a_start_waits_for_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = status(DEPLOYING, SHORT)
    follow(monkeypatch, status(DEPLOYING, ""), waiting, waiting, status(RUNNING, ""))
    assert capsys.readouterr().out == f"  decode: updating\n  decode: {SHORT}\n"


def test_the_first_worker_that_fails_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "A replica failed to start with exception. Retrying 2 more time(s). Error:\nno such"
    with pytest.raises(ConfigError, match=r"did not start:\nA replica failed .*\nno such"):
        follow(monkeypatch, status(DEPLOYING, words))


def test_on_a_cluster_serve_decides_whether_a_worker_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "A replica failed to start with exception. Retrying 19 more time(s). Error:\na node"
    follow(monkeypatch, status(DEPLOYING, words), status(RUNNING, ""), is_patient=True)
    assert words in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"did not start:\nA replica failed"):
        follow(monkeypatch, status(ApplicationStatus.DEPLOY_FAILED, words), is_patient=True)


def test_a_start_that_serve_gives_up_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did not start:\nits health check failed"):
        follow(monkeypatch, status(ApplicationStatus.UNHEALTHY, "its health check failed"))


def test_a_start_that_is_stopped_asks_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    stop.set()
    monkeypatch.setattr(serve, "status", lambda: pytest.fail("asked"))
    wait_until_running("antiphon", stop, is_patient=False)
