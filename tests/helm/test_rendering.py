"""What the chart derives from the configuration, and keeps to itself."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import ray_nodes
from helm_chart import Helm, objects, only, serve_config

from antiphon.config import AntiphonConfig
from antiphon.config_loading import parse_config
from antiphon.deployment import pod_readiness
from antiphon.deployment.config_document import documents_in, parse
from antiphon.deployment.pod_readiness import FOLDER_VARIABLE
from antiphon.deployment.serve_document import serve_document

with warnings.catch_warnings():
    # Importing ray.serve uses pydantic in a way that pydantic deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray.serve.schema import ServeDeploySchema

CONFIGS: list[dict[str, Any]] = [
    {},
    {"prefill": {"replicas": 3}, "decode": {"num_cpus": 2.5}},
    {"prefill": {"replicas": 0}, "decode": {"replicas": 0}, "colocated": {}},
    {"colocated": {"replicas": 5, "num_gpus": 1, "resources": {"fast_disk": 0.5}}},
    {"decode": {"engine": {"kv_cache_bytes": 68719476736}}, "http": {"port": 9000}},
]


def groups(rendered: str) -> dict[str, dict[str, Any]]:
    cluster = only(rendered, "RayService")["spec"]["rayClusterConfig"]
    return {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def budgets(rendered: str) -> dict[str, int]:
    """How many pods stay, by the budget's name."""
    found = [item for item in objects(rendered) if item["kind"] == "PodDisruptionBudget"]
    return {item["metadata"]["name"]: item["spec"]["minAvailable"] for item in found}


def arguments(rendered: str) -> AntiphonConfig:
    """The configuration that the application gets, with the sizes that Serve gives it."""
    document = serve_config(rendered)
    ServeDeploySchema.model_validate(document)
    (found,) = documents_in(document, Path("serve.yaml"))
    return parse(found)


def test_examples_are_configurations_of_serve_and_of_antiphon(rendered: str) -> None:
    assert groups(rendered).keys() == arguments(rendered).pools.keys()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_configuration_is_passed_through(helm: Helm, config: dict[str, Any]) -> None:
    expected = parse_config(config).model_dump()
    for role, section in parse_config(config).pools.items():
        expected[role]["resources"] = {**section.resources, f"antiphon_{role}": 1}
    expected["http"]["resources"] = {"antiphon_ingress": 0.001}
    expected["metrics"]["first_port"] = 20100
    assert arguments(helm.render(overrides={"config": config})).model_dump() == expected


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_serve_gets_what_config_serve_makes_of_the_completed_configuration(
    helm: Helm, config: dict[str, Any]
) -> None:
    (application,) = serve_config(helm.render(overrides={"config": config}))["applications"]
    completed = {**config, "http": {**config.get("http", {}), "resources": {}}}
    completed["http"]["resources"] = {"antiphon_ingress": 0.001}
    completed["metrics"] = {"first_port": 20100}
    for role, pool in parse_config(config).pools.items():
        places = {f"antiphon_{role}": 1, **pool.resources}
        completed[role] = {**config.get(role, {}), "replicas": pool.replicas, "resources": places}
    assert [application] == serve_document(completed)["applications"]


def test_other_sizes_leave_the_arguments_as_they_are(helm: Helm) -> None:
    """Serve replaces every worker when they change."""

    def application(**replicas: int) -> dict[str, Any]:
        config: dict[str, Any] = {role: {"replicas": n} for role, n in replicas.items()}
        config["http"] = {"ingress_replicas": replicas["prefill"]}
        (found,) = serve_config(helm.render(overrides={"config": config}))["applications"]
        return dict(found)

    small = application(prefill=1, decode=1, colocated=0)
    (default,) = serve_config(helm.render())["applications"]
    large = application(prefill=3, decode=2, colocated=0)
    assert small == default
    assert large["args"] == default["args"]
    numbers = {"prefill": 3, "decode": 2, "ingress": 3}
    assert large["deployments"] == [{"name": n, "num_replicas": k} for n, k in numbers.items()]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("per_pod", [1, 2, 4])
def test_each_pool_has_pods_that_hold_its_workers(
    helm: Helm, config: dict[str, Any], per_pod: int
) -> None:
    pools = {pool: {"workersPerPod": per_pod} for pool in ("prefill", "decode", "colocated")}
    rendered = groups(helm.render(overrides={"config": config, "pools": pools}))
    expected = parse_config(config).pools
    assert rendered.keys() == expected.keys()
    for role, group in rendered.items():
        pool, node = expected[role], ray_nodes.node_options(group["rayStartParams"])
        assert group["replicas"] == group["maxReplicas"] == -(-pool.replicas // per_pod)
        offered = {name: math.ceil(per_pod * amount) for name, amount in pool.resources.items()}
        places = {f"antiphon_{role}": per_pod, "antiphon_ingress": 1}
        assert node["resources"] == {**places, **offered}
        assert all(isinstance(n, int) for n in node["resources"].values()), "for the autoscaler"
        assert node["num_cpus"] >= per_pod * pool.num_cpus
        assert node["num_gpus"] == per_pod * pool.num_gpus
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["limits"].get("nvidia.com/gpu", 0) == node["num_gpus"]
        milli = int(resources["requests"]["cpu"].removesuffix("m"))
        assert milli == 1000 * per_pod * pool.num_cpus + 500


def test_the_head_finds_a_place_where_the_pools_do(rendered: str, example: Path) -> None:
    """A claim of a single node would tie it to theirs, which it may not tolerate."""
    cluster = only(rendered, "RayService")["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    assert not [volume for volume in head["volumes"] if "persistentVolumeClaim" in volume]
    if example.stem.startswith("one-node"):
        pools = [group["template"]["spec"] for group in cluster["workerGroupSpecs"]]
        assert all(pool.get("tolerations") == head.get("tolerations") for pool in pools)


def test_the_head_runs_no_worker(rendered: str) -> None:
    head = only(rendered, "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]
    node = ray_nodes.node_options(head["rayStartParams"])
    assert (node["num_cpus"], node["num_gpus"], node["resources"]) == (0, 0, {})


def test_a_failed_update_is_not_the_end_of_a_pool(rendered: str) -> None:
    """Serve's controller, on the head, would stop it for good after a few dead workers."""
    head = only(rendered, "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]
    (container,) = head["template"]["spec"]["containers"]
    stops = {"name": "RAY_SERVE_STOP_FAILED_ROLLING_UPDATES", "value": "0"}
    assert stops in container["env"]


def test_a_changed_number_of_pods_changes_the_template_unless_pods_follow(helm: Helm) -> None:
    """KubeRay compares clusters without their numbers of pods."""

    def template(workers: int, max_pods: int = 0) -> Any:
        values = {
            "config": {"decode": {"replicas": workers}},
            "pools": {"prefill": {"maxPods": max_pods}, "decode": {"maxPods": max_pods}},
            "autoscaling": {"enabled": max_pods > 0},
        }
        return groups(helm.render(overrides=values))["decode"]["template"]

    assert template(2) != template(3)
    assert template(2, max_pods=4) == template(3, max_pods=4)
    assert template(2, max_pods=4) != template(2, max_pods=8), "nor does it compare the limit"


def test_what_an_ingress_asks_for_is_offered(helm: Helm) -> None:
    """By all pods, unless it is what the pods of some pool have."""
    config = {
        "prefill": {"resources": {"rack": 0.5}},
        "http": {"resources": {"edge": 0.01, "rack": 0.1, "antiphon_decode": 0.1, "door": 2}},
    }
    rendered = helm.render(overrides={"config": config})
    asked = arguments(rendered).http.resources
    offers = {
        role: ray_nodes.node_options(group["rayStartParams"])["resources"]
        for role, group in groups(rendered).items()
    }
    everywhere = {"antiphon_ingress": 1, "edge": 1, "door": 2}
    assert offers == {
        "prefill": {"antiphon_prefill": 1, "rack": 1, **everywhere},
        "decode": {"antiphon_decode": 1, **everywhere},
    }
    for name, amount in asked.items():
        assert max(offer.get(name, 0) for offer in offers.values()) >= amount


def test_spare_pods_are_only_for_pools_with_workers(helm: Helm) -> None:
    spare = {pool: {"sparePods": 2} for pool in ("prefill", "decode", "colocated")}
    rendered = groups(helm.render(overrides={"pools": spare}))
    assert {role: group["replicas"] for role, group in rendered.items()} == {
        "prefill": 3,
        "decode": 3,
    }


def test_pods_may_follow_up_to_a_limit(helm: Helm) -> None:
    values = {
        "config": {"decode": {"replicas": 3}},
        "pools": {"prefill": {"maxPods": 1}, "decode": {"maxPods": 8}},
        "autoscaling": {"enabled": True},
    }
    group = groups(helm.render(overrides=values))["decode"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (1, 3, 8)
    assert group["template"]["spec"]["restartPolicy"] == "Never"


def test_from_outside_only_the_http_port_is_reachable(helm: Helm) -> None:
    rendered = helm.render(overrides={"podMonitor": {"enabled": True}})
    rules = only(rendered, "NetworkPolicy")["spec"]["ingress"]
    open_to_all = [rule for rule in rules if "from" not in rule]
    assert open_to_all == [{"ports": [{"port": "serve"}]}]
    (inside,) = [rule for rule in rules if "ports" not in rule]
    (peer,) = inside["from"]
    labels = peer["podSelector"]["matchLabels"]
    for group in groups(rendered).values():
        assert labels.items() <= group["template"]["metadata"]["labels"].items()


def test_routes_lead_to_the_api_and_to_nothing_else(helm: Helm) -> None:
    values = {
        "ingress": {"enabled": True, "host": "llm.example.com"},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]},
    }
    rendered = helm.render(overrides=values)
    (rule,) = only(rendered, "Ingress")["spec"]["rules"]
    assert {path["path"] for path in rule["http"]["paths"]} == {"/v1", "/health", "/ready"}
    (rule,) = only(rendered, "HTTPRoute")["spec"]["rules"]
    assert {m["path"]["value"] for m in rule["matches"]} == {"/v1", "/health", "/ready"}


def test_a_pool_of_one_pod_can_be_moved_and_larger_ones_keep_all_but_one(helm: Helm) -> None:
    rendered = helm.render(overrides={"config": {"decode": {"replicas": 4}}})
    assert budgets(rendered) == {"demo-antiphon-decode": 3}


@pytest.mark.parametrize(
    ("replicas", "per_pod", "needed"), [(4, 1, {"demo-antiphon-decode": 3}), (1, 1, {}),
                                        (4, 2, {"demo-antiphon-decode": 1}), (2, 2, {})],
)  # fmt: skip
def test_spare_pods_do_not_count_as_pods_that_stay(
    helm: Helm, replicas: int, per_pod: int, needed: dict[str, int]
) -> None:
    pools = {"decode": {"sparePods": 2, "workersPerPod": per_pod}}
    values = {"config": {"decode": {"replicas": replicas}}, "pools": pools}
    rendered = helm.render(overrides=values)
    assert budgets(rendered) == needed
    assert groups(rendered)["decode"]["replicas"] == replicas // per_pod + 2


def test_a_pod_is_ready_by_what_its_workers_and_its_proxy_say(helm: Helm) -> None:
    rendered = helm.render(overrides={"config": {"http": {"port": 9000}}})
    for group in groups(rendered).values():
        (container,) = group["template"]["spec"]["containers"]
        folder = {e["name"]: e.get("value") for e in container["env"]}[FOLDER_VARIABLE]
        assert folder.startswith("/tmp/"), "where the file system can be written"
        program, *rest, given, port = container["readinessProbe"]["exec"]["command"]
        assert (program, given, port) == ("python", folder, "9000")
        assert rest == ["-m", pod_readiness.__name__]
    head = only(rendered, "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]
    (container,) = head["template"]["spec"]["containers"]
    assert "exec" not in container["readinessProbe"], "it runs no worker"


@pytest.mark.parametrize(
    "config", [{}, {"decode": {"drain_seconds": 90.5}}, {"http": {"drain_seconds": 300}}], ids=str
)
def test_a_grace_that_is_shorter_than_draining_is_refused(
    helm: Helm, config: dict[str, Any]
) -> None:
    parsed = parse_config(config)
    drains = [parsed.http.drain_seconds, *(pool.drain_seconds for pool in parsed.pools.values())]
    least = math.ceil(max(drains)) + 40
    helm.render(overrides={"config": config, "terminationGracePeriodSeconds": least})
    values = {"config": config, "terminationGracePeriodSeconds": least - 1}
    answer = helm.template(overrides=values)
    assert f"at least {least}" in answer.stderr


def test_without_time_to_drain_the_least_grace_is_enough(helm: Helm) -> None:
    config = {name: {"drain_seconds": 0} for name in ("prefill", "decode", "http")}
    helm.render(overrides={"config": config, "terminationGracePeriodSeconds": 60})


def test_a_pod_leaves_within_its_grace(rendered: str) -> None:
    for group in groups(rendered).values():
        spec = group["template"]["spec"]
        command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:-1] == ["antiphon", "drain", "--within"]
        assert spec["terminationGracePeriodSeconds"] - int(command[-1]) == 10
