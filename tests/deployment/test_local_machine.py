"""Who gets a GPU of this machine, and what it cannot hold."""

from typing import Any

import pytest
import torch

from antiphon.config_loading import parse_config
from antiphon.deployment.local_machine import check_room, usable_gpus, with_gpus
from antiphon.errors import ConfigError

CPU_ONLY = {"engine": {"device": "cpu"}}


def gpus(document: dict[str, Any], num_gpus: int) -> tuple[dict[str, float], list[str]]:
    """GPUs of each worker by pool, and what was said."""
    said: list[str] = []
    config = with_gpus(parse_config(document), num_gpus, said.append)
    return {role: pool.num_gpus for role, pool in config.pools.items()}, said


def test_each_worker_gets_a_gpu_where_they_suffice() -> None:
    given, said = gpus({"prefill": {"replicas": 2}}, 8)
    assert given == {"prefill": 1, "decode": 1}
    assert said == ["one GPU for each of 3 workers, of 8 here"]


def test_workers_that_would_share_gpus_get_none_and_it_is_said() -> None:
    given, (line,) = gpus({"prefill": {"replicas": 2}}, 2)
    assert given == {"prefill": 0, "decode": 0}
    assert line.startswith("no GPU is used: this machine has 2 for 3 workers")


def test_gpus_that_torch_cannot_use_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usable_gpus({"CPU": 4.0}, said.append) == 0
    assert not said
    assert usable_gpus({"CPU": 4.0, "GPU": 2.0}, said.append) == 0
    assert said == ["torch can use 0 of 2 GPUs: antiphon doctor says why"]


@pytest.mark.parametrize(
    ("document", "num_gpus", "given", "on_cpus"),
    [
        ({}, 0, {"prefill": 0, "decode": 0}, ""),
        ({"decode": {"num_gpus": 0.5}}, 8, {"prefill": 0, "decode": 0.5}, "prefill"),
        (
            {"prefill": {"num_gpus": 0}, "decode": {"num_gpus": 0}}, 8,
            {"prefill": 0, "decode": 0}, "prefill, decode",
        ),
        ({"prefill": CPU_ONLY, "decode": CPU_ONLY}, 8, {"prefill": 0, "decode": 0}, ""),
    ],
)  # fmt: skip
def test_what_was_decided_stays_and_gpus_without_work_are_named(
    document: dict[str, Any], num_gpus: int, given: dict[str, float], on_cpus: str
) -> None:
    words = "on CPUs, though there are GPUs, because num_gpus reserves none: "
    assert gpus(document, num_gpus) == (given, [words + on_cpus] if on_cpus else [])


def test_a_pool_that_is_to_have_none_leaves_them_to_others() -> None:
    given, _ = gpus({"prefill": CPU_ONLY, "decode": {"replicas": 2}}, 2)
    assert given == {"prefill": 0, "decode": 1}


OFFERED = {"CPU": 4.0, "GPU": 1.0, "memory": 1e10, "node:10.0.0.1": 1.0}


def test_room_is_enough_for_what_ray_offers() -> None:
    check_room(parse_config({"decode": {"num_gpus": 1}}), OFFERED)


def test_what_this_machine_lacks_is_named_before_anything_waits_for_it() -> None:
    document = {
        "prefill": {"resources": {"prefill_node": 1}},
        "decode": {"replicas": 3, "num_gpus": 1},
        "http": {"resources": {"edge": 0.1}},
    }
    with pytest.raises(ConfigError) as caught:
        check_room(parse_config(document), OFFERED)
    text = str(caught.value)
    for line in (
        "  prefill: no place for 1 of 1; each asks for CPU 1, prefill_node 1; here are CPU 4, "
        "prefill_node 0\n",
        "  decode: no place for 2 of 3; each asks for CPU 1, GPU 1; here are CPU 4, GPU 1\n",
        "  ingress: no place for 1 of 1; each asks for edge 0.1; here are edge 0\n",
        "name a Ray cluster with --address",
    ):
        assert line in text
