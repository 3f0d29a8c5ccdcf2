"""Files that are read, and errors that name every offending key and what is meant."""

from pathlib import Path

import pytest

from antiphon.config import AntiphonConfig, RouterConfig
from antiphon.config_loading import parse_config, read_yaml
from antiphon.errors import ConfigError


def problems(data) -> list[str]:
    """The lines of the error that a document causes, the first one naming its origin."""
    with pytest.raises(ConfigError) as caught:
        parse_config(data, "pools.yaml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("data", "key", "meant"),
    [
        ({"prefil": {}}, "prefil", "prefill"),
        ({"model": {"sorce": "x"}}, "model.sorce", "source"),
        (
            {"decode": {"engine": {"blocksize": 8}}},
            "decode.engine.blocksize",
            "block_size",
        ),
    ],
)
def test_an_unknown_key_is_an_error_with_a_suggestion(data, key, meant):
    origin, line = problems(data)
    assert origin == "pools.yaml:"
    assert line.startswith(f"  {key}: unknown key; did you mean {meant!r}? allowed: ")
    assert meant in line.partition("allowed: ")[2].split(", ")


def test_a_key_like_no_other_lists_what_is_allowed():
    _, line = problems({"router": {"zzz": 1}})
    allowed = ", ".join(sorted(RouterConfig.model_fields))
    assert line == f"  router.zzz: unknown key; allowed: {allowed}"


def test_all_problems_are_named_at_once():
    lines = problems({"http": {"port": "x", "hots": 1}, "model": {"dtype": 4}})
    assert [line.split(":")[0].strip() for line in lines] == [
        "pools.yaml",
        "model.dtype",
        "http.port",
        "http.hots",
    ]


def test_files_are_read_and_named_in_errors(tmp_path: Path):
    path = tmp_path / "pools.yaml"
    path.write_text("prefill: {replicas: 3}\n")
    assert parse_config(read_yaml(path)).prefill.replicas == 3
    path.write_text("prefill: {replicas: many}\n")
    with pytest.raises(ConfigError, match=r"pools\.yaml:\n  prefill\.replicas: got 'many'"):
        parse_config(read_yaml(path), str(path))


def test_an_empty_file_is_the_default(tmp_path: Path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing here\n")
    assert parse_config(read_yaml(path)) == AntiphonConfig()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read: No such file"),
        (b"prefill: [", "is not valid YAML"),
        (b"\xff\xfe\xfa", "is not valid YAML"),
        (b"- prefill\n", "expected a mapping at the top, got list"),
        (b"prefill\n", "expected a mapping at the top, got str"),
    ],
)
def test_what_is_not_a_yaml_mapping_is_refused(tmp_path: Path, content, problem):
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(str(path))
