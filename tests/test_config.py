"""The configuration: defaults, bounds, pools, and options that go over a file."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from antiphon.config import DEFAULT_MODEL, AntiphonConfig
from antiphon.config_loading import parse_config
from antiphon.deployment.cli import merge_options
from antiphon.errors import ConfigError

NO_POOLS = {"prefill": None, "decode": None, "colocated": None}


def problems(data) -> list[str]:
    """The lines of the error that a document causes, the first one naming its origin."""
    with pytest.raises(ConfigError) as caught:
        parse_config(data, "pools.yaml")
    return str(caught.value).splitlines()


def replicas(config: AntiphonConfig) -> dict[str, int]:
    return {role: pool.replicas for role, pool in config.pools.items()}


def test_an_empty_document_is_one_prefill_and_one_decode_worker():
    assert parse_config(None) == parse_config({}) == AntiphonConfig()
    config = AntiphonConfig()
    assert replicas(config) == {"prefill": 1, "decode": 1}
    assert config.model.source == config.model.name == DEFAULT_MODEL


def test_a_parsed_document_survives_json():
    config = parse_config(
        {"model": {"source": "org/m"}, "decode": {"engine": {"kv_cache_bytes": "2GiB"}}}
    )
    assert config.decode.engine.kv_cache_bytes == 2 * 2**30
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("2Gi", 2 * 2**30), (" 0.5 ki ", 512), ("2GiB", 2 * 2**30), ("3g", 3 * 10**9),
        ("1.5 MB", 1_500_000), ("7", 7), (7, 7),
    ],
)  # fmt: skip
def test_sizes_have_the_units_of_people_and_of_kubernetes(text, num_bytes):
    config = parse_config({"decode": {"engine": {"kv_cache_bytes": text}}})
    assert config.decode.engine.kv_cache_bytes == num_bytes


def test_configurations_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        AntiphonConfig().http.port = 1


@pytest.mark.parametrize(
    ("source", "name"),
    [("org/model", "model"), ("/models/mine/", "mine"), ("built-in", "built-in")],
)
def test_the_model_is_named_after_its_source(source, name):
    assert parse_config({"model": {"source": source}}).model.name == name
    named = {"model": {"source": source, "served_name": "other"}}
    assert parse_config(named).model.name == "other"


@pytest.mark.parametrize(
    ("data", "key", "value", "allowed"),
    [
        ({"model": {"dtype": "int8"}}, "model.dtype", "'int8'", "'bfloat16'"),
        ({"model": {"max_context_tokens": 1}}, "model.max_context_tokens", "1", "equal to 2"),
        ({"http": {"port": 0}}, "http.port", "0", "greater than or equal to 1"),
        ({"http": {"port": 65536}}, "http.port", "65536", "less than or equal to 65535"),
        ({"prefill": {"replicas": -1}}, "prefill.replicas", "-1", "equal to 0"),
        ({"prefill": {"num_gpus": "all"}}, "prefill.num_gpus", "'all'", "valid number"),
        (
            {"decode": {"engine": {"kv_cache_bytes": "lots"}}},
            "decode.engine.kv_cache_bytes",
            "'lots'",
            "unit",
        ),
        (
            {"handoff": {"piece_bytes": "2GiB or so"}},
            "handoff.piece_bytes",
            "'2GiB or so'",
            "2Gi",
        ),
        ({"model": {"source": "a/.."}}, "model.source", "'a/..'", "match pattern"),
        ({"model": {"source": ""}}, "model.source", "''", "match pattern"),
        (
            {"decode": {"engine": {"kv_cache_bytes": 0}}},
            "decode.engine.kv_cache_bytes",
            "0",
            "greater than 0",
        ),
        ({"handoff": {"transport": "pigeon"}}, "handoff.transport", "'pigeon'", "'gloo'"),
        ({"handoff": {"stall_seconds": 0}}, "handoff.stall_seconds", "0", "greater than 0"),
        (
            {"handoff": {"max_prefill_attempts": 4}},
            "handoff.max_prefill_attempts",
            "4",
            "less than or equal to 3",
        ),
        ({"router": {"silence_seconds": 0.5}}, "router.silence_seconds", "0.5", "equal to 1"),
        ({"router": {"max_replays": -1}}, "router.max_replays", "-1", "equal to 0"),
        ({"decode": {"drain_seconds": -1}}, "decode.drain_seconds", "-1", "equal to 0"),
        (
            {"prefill": {"max_surge_percent": 101}},
            "prefill.max_surge_percent",
            "101",
            "equal to 100",
        ),
        ({"http": {"api_key_file": "keys"}}, "http.api_key_file", "'keys'", "match pattern '^/'"),
        ({"http": {"drain_seconds": "soon"}}, "http.drain_seconds", "'soon'", "valid number"),
        ({"tracing": {"endpoint": "c:4318"}}, "tracing.endpoint", "'c:4318'", "match pattern"),
        ({"tracing": {"sample_ratio": 5}}, "tracing.sample_ratio", "5", "less than or equal to 1"),
        ({"model": "mine"}, "model", "'mine'", "valid dictionary"),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_allowed(data, key, value, allowed):
    _, line = problems(data)
    assert line.startswith(f"  {key}: got {value}; ")
    assert allowed in line


def test_metrics_ask_for_no_key_where_there_is_none():
    _, line = problems({"http": {"metrics_need_key": True}})
    assert "http.metrics_need_key is true, but http.api_key_file is not set" in line


def test_ports_of_metrics_are_any_or_a_range_that_exists():
    assert list(parse_config({}).metrics.ports) == [0]
    metrics = {"first_port": 55000, "num_ports": 10000}
    ports = parse_config({"metrics": metrics}).metrics.ports
    assert (ports[0], ports[-1], len(ports)) == (55000, 64999, 10000)
    _, line = problems({"metrics": {"first_port": 55001}})
    assert line.startswith("  metrics.first_port: got 55001; ")


def test_a_pool_that_is_named_has_a_worker():
    assert replicas(parse_config({"colocated": {"num_gpus": 1}})) == {
        "prefill": 1,
        "decode": 1,
        "colocated": 1,
    }
    assert replicas(parse_config({"prefill": {"replicas": 0}})) == {"decode": 1}


def test_naming_a_pool_leaves_the_callers_document_alone():
    data = {"colocated": {"num_gpus": 1}}
    parse_config(data)
    assert data == {"colocated": {"num_gpus": 1}}


def test_somebody_must_decode():
    _, line = problems({"decode": {"replicas": 0}})
    assert "decode.replicas and colocated.replicas are both 0" in line
    _, line = problems({"decode": {"replicas": 0}, "prefill": {"replicas": 3}, "colocated": {}})
    assert "prefill.replicas is 3 but decode.replicas is 0" in line


ON_GPUS = {"handoff": {"transport": "nccl"}, "prefill": {"num_gpus": 1}, "decode": {"num_gpus": 2}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decode": {"num_gpus": 0.5}}, "decode.num_gpus is 0.5: NCCL connects whole GPUs"),
        ({"prefill": {"num_gpus": 1.5}}, "prefill.num_gpus is 1.5: NCCL connects whole GPUs"),
        ({"handoff": {"transport": "nccl", "max_links": 33}}, "handoff.max_links is 33: torch has"),
    ],
)
def test_what_nccl_cannot_do_is_refused(changes, words):
    _, line = problems({**ON_GPUS, **changes})
    assert f"handoff.transport is nccl, but {words}" in line
    gloo = {**ON_GPUS, **changes, "handoff": {"max_links": 33}}
    assert parse_config(gloo).handoff.max_links == 33


def test_links_over_nccl_are_as_many_as_torch_has_streams_for():
    assert parse_config({}).handoff.max_links == 64
    assert parse_config(ON_GPUS).handoff.max_links == 32
    few = parse_config({**ON_GPUS, "handoff": {"transport": "nccl", "max_links": 4}})
    assert few.handoff.max_links == 4
    assert parse_config(few.model_dump(mode="json")) == few


def test_options_go_over_the_file(tmp_path: Path):
    path = tmp_path / "pools.yaml"
    path.write_text(
        "model: {source: org/a, served_name: a}\n"
        "decode: {replicas: 2, num_gpus: 1}\n"
        "http: {port: 9000, host: 0.0.0.0}\n"
    )
    pools = {**NO_POOLS, "decode": 3}
    config = merge_options(path, "org/b", pools, {"host": None, "port": 9001})
    assert (config.model.source, config.model.name) == ("org/b", "a")
    assert (config.decode.replicas, config.decode.num_gpus) == (3, 1)
    assert (config.http.host, config.http.port) == ("0.0.0.0", 9001)


def test_a_folder_that_is_typed_without_its_name_has_one(tmp_path, monkeypatch):
    (tmp_path / "mine/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    for typed, name in ((".", "mine"), ("./", "mine"), ("here/..", "mine"), ("here", "here")):
        assert merge_options(None, typed, NO_POOLS, {}).model.name == name
    with pytest.raises(ConfigError, match=r"model\.source: got ''"):
        merge_options(None, "", NO_POOLS, {})


def test_no_options_are_the_default():
    assert merge_options(None, None, NO_POOLS, {"host": None, "port": None}) == AntiphonConfig()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prefill": 2}, {"prefill": 2, "decode": 1}),
        ({"prefill": 0}, {"decode": 1}),
        ({"colocated": 2}, {"colocated": 2}),
        ({"colocated": 1, "decode": 1}, {"decode": 1, "colocated": 1}),
        ({"colocated": 1, "prefill": 1, "decode": 2}, {"prefill": 1, "decode": 2, "colocated": 1}),
        ({"colocated": 0}, {"prefill": 1, "decode": 1}),
    ],
)
def test_colocated_workers_replace_the_default_pools_only(options, expected):
    assert replicas(merge_options(None, None, {**NO_POOLS, **options}, {})) == expected


def test_colocated_workers_join_the_pools_of_a_file(tmp_path: Path):
    path = tmp_path / "pools.yaml"
    path.write_text("prefill: {replicas: 2}\n")
    config = merge_options(path, None, {**NO_POOLS, "colocated": 1}, {})
    assert replicas(config) == {"prefill": 2, "decode": 1, "colocated": 1}


def test_a_wrong_option_is_explained_like_a_key(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"command line:\n  http\.port: got 70000; "):
        merge_options(None, None, NO_POOLS, {"port": 70000})
    path = tmp_path / "pools.yaml"
    path.write_text("http: 8000\n")
    with pytest.raises(ConfigError, match=r"pools\.yaml:\n  http: got 8000; "):
        merge_options(path, None, NO_POOLS, {"port": 9000})
