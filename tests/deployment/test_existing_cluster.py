"""What is found on a cluster before an application is put there; joining: ``test_ray_address``."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from antiphon.config_loading import parse_config
from antiphon.deployment.existing_cluster import check_serve
from antiphon.deployment.serve_document import APP_NAME
from antiphon.errors import ConfigError

with warnings.catch_warnings():
    # Importing ray.serve uses pydantic in a way that pydantic deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray.serve import context
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import ApplicationStatus

RUNNING, DELETING = ApplicationStatus.RUNNING, ApplicationStatus.DELETING


def serves(monkeypatch: pytest.MonkeyPatch, applications: dict[str, Any], **http: Any) -> None:
    """Let the cluster have a Serve with these applications, each a path and a status."""
    details = {
        name: {"route_prefix": path, "status": status}
        for name, (path, status) in applications.items()
    }
    client = SimpleNamespace(
        get_serve_details=lambda: {"applications": details}, http_config=HTTPOptions(**http)
    )
    monkeypatch.setattr(context, "_get_global_client", lambda **_: client)


def start(**http: Any) -> None:
    check_serve("auto", parse_config({"http": http}).http)


def test_where_serve_does_not_run_anything_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(*, raise_if_no_controller_running: bool = True) -> None:
        assert not raise_if_no_controller_running

    monkeypatch.setattr(context, "_get_global_client", find)
    start(host="0.0.0.0", port=9000)


def test_a_cluster_serves_one_application_of_the_name_and_one_of_the_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = {"other": ("/other", RUNNING), "old": ("/", DELETING), "without": (None, RUNNING)}
    serves(monkeypatch, others)
    start()
    serves(monkeypatch, {APP_NAME: ("/", DELETING)})
    with pytest.raises(ConfigError, match=r"at auto serves .* 'antiphon' already \(deleting\)"):
        start()
    serves(monkeypatch, {"default": ("/", RUNNING)})
    with pytest.raises(ConfigError, match=r"at auto serves .* 'default' at / \(running\)"):
        start()


def test_where_serve_listens_already_is_not_said_to_be_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serves(monkeypatch, {}, host="0.0.0.0")
    start(host="0.0.0.0")
    for http in ({"host": "0.0.0.0", "port": 9000}, {}):
        with pytest.raises(ConfigError, match=r"listens on 0\.0\.0\.0:8000, .* --port 8000, or"):
            start(**http)
