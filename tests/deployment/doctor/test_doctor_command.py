"""``antiphon doctor``: what it reads, says and exits with."""

import json
from pathlib import Path

import pytest
from imagined_cluster import cluster, link, with_node
from typer.testing import CliRunner, Result

from antiphon.deployment.cli import app
from antiphon.deployment.doctor import command
from antiphon.deployment.doctor.facts import ClusterFacts
from antiphon.errors import ConfigError

SERVE_FILE = """
http_options: {port: 9100}
applications:
  - import_path: antiphon.deployment.application:app
    args: {decode: {replicas: 3}}
"""


def doctor(
    monkeypatch: pytest.MonkeyPatch, facts: ClusterFacts | ConfigError, *words: str
) -> Result:
    def survey(*_: object) -> ClusterFacts:
        if isinstance(facts, ConfigError):
            raise facts
        return facts

    monkeypatch.setattr(command, "_survey", survey)
    return CliRunner().invoke(app, ["doctor", *words])


def test_a_good_cluster_exits_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    result = doctor(monkeypatch, cluster())
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-1] == "ok: 13 checks"
    assert any(line.split()[:2] == ["p", "prefill"] for line in lines)
    assert "2 x H100" in result.stdout
    assert "p -> d1 (gloo)  4.0 ms  0.20 ms     3.00 GB/s" in result.stdout


def test_problems_exit_with_1_and_say_what_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    result = doctor(monkeypatch, with_node("d1", max_open_files=256))
    assert result.exit_code == 1
    for words in (
        "problem: open files, d1",
        "found   a limit of 256",
        "wanted  2496 or more",
        "mend    ulimit -n 65536 before ray start",
        "1 problem, 0 warnings",
    ):
        assert words in result.stdout


def test_warnings_alone_exit_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    result = doctor(monkeypatch, with_node("d1", cores=1.0))
    assert result.exit_code == 0
    assert result.stdout.endswith("0 problems, 1 warning\n")


def test_what_cannot_be_checked_exits_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor(monkeypatch, ConfigError("no cluster")).exit_code == 2
    assert doctor(monkeypatch, cluster(), "--config=/nowhere.yaml").exit_code == 2


def test_the_slowest_of_many_links_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    many = tuple(link("p", f"d{n}", bytes_per_second=(20 - n) * 1e9) for n in range(20))
    result = doctor(monkeypatch, cluster(links=many))
    assert result.stdout.index("1.00 GB/s") < result.stdout.index("2.00 GB/s")
    assert "and 4 faster ones" in result.stdout


def test_programs_get_all_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    result = doctor(monkeypatch, with_node("d1", max_open_files=256), "--json")
    document = json.loads(result.stdout)
    assert [one["check"] for one in document["findings"]] == ["open files"]
    assert document["findings"][0]["severity"] == "problem"
    assert document["nodes"]["d1"]["max_open_files"] == 256
    assert document["links"][0]["bytes_per_second"] == 3e9


def test_serves_file_says_where_serve_listens(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(SERVE_FILE)
    config = command.read_config(file)
    assert (config.http.host, config.http.port) == ("0.0.0.0", 9100)
    assert config.decode.replicas == 3


def test_one_configuration_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(SERVE_FILE + SERVE_FILE.split("applications:\n")[1])
    with pytest.raises(ConfigError, match="holds 2 configurations"):
        command.read_config(file)
