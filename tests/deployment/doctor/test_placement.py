"""Which nodes hold which workers."""

from antiphon.config_loading import parse_config
from antiphon.deployment.doctor.facts import Node
from antiphon.deployment.doctor.placement import nodes_for, place


def node(name: str, **resources: float) -> Node:
    return Node(name, name, resources, 0)


def test_workers_without_gpus_leave_gpus_to_others() -> None:
    pools = {"prefill": {"resources": {"x": 1}}, "decode": {"replicas": 2, "num_gpus": 1}}
    members = [node("a", CPU=1, GPU=1, x=1), node("b", CPU=1, GPU=1), node("c", CPU=1, x=1)]
    placed = {"a": {"decode": 1}, "b": {"decode": 1}, "c": {"prefill": 1}}
    assert place(parse_config(pools), members).placed == placed


def test_what_finds_no_place_is_counted_and_the_rest_is_placed() -> None:
    config = parse_config({"prefill": {"replicas": 2}, "decode": {"replicas": 3}})
    found = place(config, [node("a", CPU=2), node("b", CPU=1.5)])
    assert sum(found.missing.values()) == 2
    assert sum(n for workers in found.placed.values() for n in workers.values()) == 3


def test_parts_of_a_cpu_add_up() -> None:
    config = parse_config(
        {"prefill": {"replicas": 3, "num_cpus": 0.1}, "decode": {"num_cpus": 0.7}}
    )
    assert place(config, [node("a", CPU=1)]).missing == {}


def test_ingresses_get_what_workers_leave_and_the_rest_is_counted() -> None:
    http = {"ingress_replicas": 3, "resources": {"edge": 0.5, "x": 0.1, "unused": 0}}
    config = parse_config({"prefill": {"resources": {"x": 1}}, "decode": {}, "http": http})
    members = [node("a", CPU=2, x=1, edge=4), node("b", x=1, edge=1)]
    assert place(config, members).missing_ingresses == 1, "x of a is the worker's"
    assert place(config, [*members, node("c", x=0.1, edge=0.5)]).missing_ingresses == 0


def test_an_ingress_that_asks_for_nothing_fits_anywhere() -> None:
    assert place(parse_config({}), [node("a", CPU=2)]).missing_ingresses == 0


def test_only_pools_with_workers_have_nodes() -> None:
    config = parse_config({"prefill": {"replicas": 0}, "decode": {"resources": {"d": 1}}})
    members = [node("a", CPU=1), node("b", CPU=1, d=1)]
    assert nodes_for(config, "prefill", members) == ()
    assert nodes_for(config, "decode", members) == (members[1],)
