"""API keys, scraping, dashboards and rules, and an upgrade from the values of the last version."""

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from chart_schemas import VERSIONS, check
from helm_chart import CHART, ROOT, Helm, objects, only, serve_config

from antiphon.config_loading import parse_config
from antiphon.deployment.api_keys import read_key_file

LAST = Path(__file__).parent / "last"  # values, an example, and what it rendered to
PARTS = ("scrapeConfig", "podMonitor", "dashboards", "prometheusRule")
ALL_ON = {name: {"enabled": True} for name in PARTS}


def pods(rendered: str) -> list[dict[str, Any]]:
    cluster = only(rendered, "RayService")["spec"]["rayClusterConfig"]
    return [g["template"] for g in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def named(rendered: str, kind: str) -> dict[str, dict[str, Any]]:
    found = [item for item in objects(rendered) if item["kind"] == kind]
    return {item["metadata"]["name"]: item for item in found}


# API keys.


def test_without_keys_nothing_is_mounted_and_none_is_asked_for(helm: Helm) -> None:
    rendered = helm.render()
    assert not named(rendered, "Secret")
    assert "api-keys" not in rendered
    (application,) = serve_config(rendered)["applications"]
    assert parse_config(application["args"]).http.api_key_file is None


def test_keys_of_the_values_are_a_file_that_the_endpoint_reads(helm: Helm, tmp_path: Path) -> None:
    values = {"apiKeys": {"keys": ["sk-1", 'sk-"2"'], "secretKey": "list"}}
    rendered = helm.render(overrides={**values, "config": {"http": {"port": 9000}}})
    (application,) = serve_config(rendered)["applications"]
    http = parse_config(application["args"]).http
    assert http.port == 9000
    assert http.api_key_file is not None
    folder, name = str(Path(http.api_key_file).parent), Path(http.api_key_file).name
    secret = only(rendered, "Secret")
    (tmp_path / "keys").write_bytes(base64.b64decode(secret["data"][name]))
    assert len(read_key_file(tmp_path / "keys")) == 2
    assert "api-keys" not in str(pods(rendered)[0]), "no ingress runs on the head"
    for template in pods(rendered)[1:]:
        (container,) = template["spec"]["containers"]
        (mount,) = [m for m in container["volumeMounts"] if m["mountPath"] == folder]
        assert mount["readOnly"]
        assert "subPath" not in mount, "such a mount does not follow changes"
        (volume,) = [v for v in template["spec"]["volumes"] if v["name"] == mount["name"]]
        assert volume["secret"]["secretName"] == secret["metadata"]["name"]
        assert not volume["secret"]["defaultMode"] & 0o007, "nothing for other users"


def test_other_keys_change_the_secret_and_no_pod(helm: Helm) -> None:
    """A changed template would make KubeRay start a second cluster."""
    first, second = (helm.render(overrides={"apiKeys": {"keys": [k]}}) for k in ("one", "two"))
    assert only(first, "Secret")["data"] != only(second, "Secret")["data"]
    assert only(first, "RayService") == only(second, "RayService")


def test_a_secret_that_exists_is_used_and_none_made(helm: Helm) -> None:
    rendered = helm.render(overrides={"apiKeys": {"existingSecret": "mine"}})
    assert not named(rendered, "Secret")
    for template in pods(rendered)[1:]:
        secrets = [v["secret"] for v in template["spec"]["volumes"] if "secret" in v]
        assert [secret["secretName"] for secret in secrets] == ["mine"]


@pytest.mark.parametrize("strategy", ["None", "NewCluster"])
def test_notes_say_that_first_keys_wait_for_other_pods(helm: Helm, strategy: str) -> None:
    """With None KubeRay leaves the pods, and Serve's old ingress goes on without asking."""
    values = ["--set", f"upgrade.strategy={strategy}", "--set", "apiKeys.existingSecret=mine"]
    answer = helm.run("install", "demo", str(CHART), "--dry-run=client", *values)
    assert answer.returncode == 0, answer.stderr
    notes = answer.stdout.partition("NOTES:")[2]
    assert ("had no apiKeys before" in notes) == (strategy == "None")
    command = "delete raycluster --selector app.kubernetes.io/instance=demo"
    assert (command in notes) == (strategy == "None")


# Scraping.


def test_prometheus_asks_an_ingress_for_all_targets(helm: Helm) -> None:
    values = {"scrapeConfig": {"enabled": True, "labels": {"release": "prometheus"}}}
    rendered = helm.render(overrides={**values, "config": {"http": {"port": 9000}}})
    scrape = only(rendered, "ScrapeConfig")
    assert scrape["apiVersion"] == "monitoring.coreos.com/v1alpha1"
    assert scrape["metadata"]["labels"]["release"] == "prometheus"
    spec = scrape["spec"]
    (discovery,) = spec["httpSDConfigs"]
    url = urlsplit(discovery["url"])
    service = only(rendered, "RayService")["spec"]["serveService"]
    assert url.hostname == f"{service['metadata']['name']}.serving.svc"
    assert url.port == service["spec"]["ports"][0]["port"] == 9000
    assert (url.scheme, url.path) == ("http", "/metrics/targets")
    assert spec["honorLabels"] is True
    assert spec["relabelings"] == [{"targetLabel": "job", "replacement": "serving/demo-antiphon"}]
    for duration in (spec["scrapeInterval"], discovery["refreshInterval"]):
        assert re.fullmatch("[0-9]+[sm]", duration)
    assert "authorization" not in discovery


def test_prometheus_sends_a_key_where_the_list_asks_for_one(helm: Helm) -> None:
    values: dict[str, Any] = {
        "config": {"http": {"metrics_need_key": True}},
        "apiKeys": {"existingSecret": "keys"},
        "scrapeConfig": {"enabled": True, "keySecret": {"name": "one-key"}},
    }
    (discovery,) = only(helm.render(overrides=values), "ScrapeConfig")["spec"]["httpSDConfigs"]
    credentials = {"name": "one-key", "key": "key"}
    assert discovery["authorization"] == {"type": "Bearer", "credentials": credentials}


def test_nothing_is_scraped_twice(helm: Helm) -> None:
    """Ray's port is the one that no ingress and no worker lists: theirs are not declared at all."""
    rendered = helm.render(overrides=ALL_ON)
    (monitor,) = named(rendered, "PodMonitor").values()
    assert [end["port"] for end in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]
    for template in pods(rendered):
        (container,) = template["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["metrics"] == 8080


def test_the_policy_lets_prometheus_in_and_only_where_it_scrapes(helm: Helm) -> None:
    def rules(*enabled: str, **config: Any) -> list[dict[str, Any]]:
        values = {**{name: {"enabled": True} for name in enabled}, "config": config}
        policy = only(helm.render(overrides=values), "NetworkPolicy")
        found: list[dict[str, Any]] = policy["spec"]["ingress"]
        return [rule for rule in found if "prometheus" in json.dumps(rule.get("from", ""))]

    assert rules() == []
    (rule,) = rules("podMonitor")
    assert rule["ports"] == [{"port": "metrics"}]
    (rule,) = rules("scrapeConfig")
    assert rule["ports"] == [{"port": "serve"}, {"port": 20100, "endPort": 20199}]
    (peer,) = rule["from"]
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
    (rule,) = rules("scrapeConfig", metrics={"first_port": 9100, "num_ports": 20})
    assert rule["ports"] == [{"port": "serve"}, {"port": 9100, "endPort": 9119}]


def test_processes_are_scraped_where_the_policy_lets_prometheus_in(helm: Helm) -> None:
    """Whether they are or not: Serve restarts everything when arguments change."""
    for enabled in (True, False):
        rendered = helm.render(overrides={"scrapeConfig": {"enabled": enabled}})
        (application,) = serve_config(rendered)["applications"]
        ports = parse_config(application["args"]).metrics.ports
        assert (ports[0], ports[-1]) == (20100, 20199)


# Dashboards and rules: whatever lies in the two folders.


@pytest.fixture
def with_files(tmp_path: Path) -> Helm:
    """The chart with a dashboard and a rule file that a template would break."""
    chart = tmp_path / "antiphon"
    shutil.copytree(CHART, chart)
    for folder in ("dashboards", "rules"):
        shutil.rmtree(chart / folder, ignore_errors=True)
        (chart / folder).mkdir()
    (chart / "dashboards/one.json").write_text('{\n  "legend": "{{worker}}",\n  "unit": "s"\n}\n')
    rule = {
        "alert": "Slow",
        "expr": "x > 14.4",
        "annotations": {"summary": "{{ $value }}", "runbook_url": "docs/runbooks.md#Slow"},
    }
    groups = {"groups": [{"name": "some", "rules": [rule]}]}
    (chart / "rules/some.yaml").write_text("# A comment.\n" + yaml.safe_dump(groups))
    (tmp_path / "home").mkdir()
    helm = Helm(tmp_path / "home")
    helm.chart = chart
    return helm


def test_files_reach_grafana_and_prometheus_as_they_are(with_files: Helm) -> None:
    rendered = with_files.render(overrides=ALL_ON)
    check(rendered, VERSIONS[-1])
    board = only(rendered, "ConfigMap")
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(board["data"]["one.json"]) == {"legend": "{{worker}}", "unit": "s"}
    rules = only(rendered, "PrometheusRule")
    assert rules["spec"] == yaml.safe_load((with_files.chart / "rules/some.yaml").read_text())


def test_alerts_link_to_where_runbooks_are_published(with_files: Helm) -> None:
    values = {"prometheusRule": {"enabled": True, "runbooks": "https://wiki.example.com/r"}}
    (group,) = only(with_files.render(overrides=values), "PrometheusRule")["spec"]["groups"]
    assert group["rules"][0]["annotations"]["runbook_url"] == "https://wiki.example.com/r#Slow"


def test_dashboards_link_to_where_runbooks_are_published(helm: Helm) -> None:
    where = "https://wiki.example.com/r"
    values = {"dashboards": {"enabled": True}, "prometheusRule": {"runbooks": where}}
    for item in named(helm.render(overrides=values), "ConfigMap").values():
        (text,) = item["data"].values()
        assert where in text
        assert "docs/runbooks.md" not in text


def test_every_dashboard_and_rule_file_of_the_chart_is_rendered(helm: Helm) -> None:
    rendered = helm.render(overrides=ALL_ON)
    boards = {path.name: path.read_text() for path in CHART.glob("dashboards/*.json")}
    shown = [name for item in named(rendered, "ConfigMap").values() for name in item["data"]]
    assert sorted(shown) == sorted(boards)
    for item in named(rendered, "ConfigMap").values():
        ((name, text),) = item["data"].items()
        assert json.loads(text) == json.loads(boards[name])
    rules = [yaml.safe_load(path.read_text()) for path in sorted(CHART.glob("rules/*.yaml"))]
    made = named(rendered, "PrometheusRule").values()
    assert [item["spec"] for item in made] == rules
    for group in (group for item in made for group in item["spec"]["groups"]):
        assert all(("alert" in r) != ("record" in r) for r in group["rules"])


def test_objectives_reach_the_rules_that_dashboards_and_alerts_ask(helm: Helm) -> None:
    wanted = {"availability": 0.9995, "itl": 0.95}
    values = {"prometheusRule": {"enabled": True, "objectives": wanted}}
    found = {
        rule["labels"]["slo"]: rule["expr"]
        for item in named(helm.render(overrides=values), "PrometheusRule").values()
        for group in item["spec"]["groups"]
        for rule in group["rules"]
        if rule.get("record") == "antiphon:slo_objective:ratio"
    }
    assert found == {
        "availability": "vector(0.9995)",
        "ttft": "vector(0.99)",
        "itl": "vector(0.95)",
    }


# Upgrades.


def test_pages_select_the_head_and_the_cluster_by_labels_that_they_have(helm: Helm) -> None:
    """KubeRay keeps those of the pod's template, and gives the cluster those of the RayService."""
    pages = "".join((ROOT / f"docs/{name}.md").read_text() for name in ("deploy", "runbooks"))
    service = helm.run("template", "antiphon", str(CHART)).stdout
    head, *workers = (pod["metadata"]["labels"].items() for pod in pods(service))
    selectors = set(re.findall(r"get pods --selector (\S+)", pages))
    for labels in [dict(pair.split("=") for pair in text.split(",")) for text in selectors]:
        assert labels.items() <= head
        assert not any(labels.items() <= worker for worker in workers)
    cluster = only(service, "RayService")["metadata"]["labels"]
    clusters = set(re.findall(r"delete raycluster --selector (\S+)=([^\s`]+)", pages))
    assert selectors
    assert clusters
    assert clusters <= set(cluster.items())


def test_an_upgrade_from_the_last_values_changes_no_name(helm: Helm) -> None:
    """The old values over the new defaults, as ``--reset-then-reuse-values`` lays them."""
    files = ["--values", str(LAST / "values.yaml"), "--values", str(LAST / "multi-node.yaml")]
    answer = helm.run("template", "demo", str(CHART), "--namespace", "serving", *files)
    assert answer.returncode == 0, answer.stderr
    check(answer.stdout, VERSIONS[-1])
    before, after = (LAST / "rendered.yaml").read_text(), answer.stdout
    kinds = {item["kind"] for item in objects(before)}
    gone = {(k, n) for k in kinds for n in named(before, k).keys() - named(after, k).keys()}
    assert gone == {("PodMonitor", "demo-antiphon-ingress")}, "scrapeConfig takes its place"
    for kind in ("PersistentVolumeClaim", "PodDisruptionBudget"):  # what may not change
        for name, item in named(before, kind).items():
            assert named(after, kind)[name]["spec"] == item["spec"]
    labels = [[pod["metadata"]["labels"] for pod in pods(text)] for text in (before, after)]
    assert labels[0] == labels[1]
