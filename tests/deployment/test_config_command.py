"""``antiphon config``: three kinds of files, summaries, all problems at once, exit codes."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from antiphon.config import AntiphonConfig
from antiphon.config_loading import parse_config
from antiphon.deployment.cli import app
from antiphon.deployment.config_document import documents_in
from antiphon.deployment.serve_document import IMPORT_PATH, serve_document

with warnings.catch_warnings():
    # Importing ray.serve uses pydantic in a way that pydantic deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray.serve.schema import ServeDeploySchema

ROOT = Path(__file__).parents[2]
DOCUMENT = {
    "model": {"source": "/models/mine", "served_name": "m"},
    "prefill": {"replicas": 2, "num_gpus": 1, "resources": {"rack": 0.5}},
    "decode": {"num_cpus": 2, "resources": {"rack": 1}, "engine": {"kv_cache_bytes": "2GiB"}},
    "http": {"port": 9000, "resources": {"door": 0.5}},
}
WRONG = {"model": {"sorce": "x"}, "http": {"port": 0}}


def serve_config(*arguments: Any) -> dict[str, Any]:
    ours = [{"import_path": IMPORT_PATH, "args": args} for args in arguments]
    return {"applications": [{"import_path": "somebody:else", "args": {"a": 1}}, *ours]}


def run(folder: Path, command: str, content: Any) -> Result:
    path = folder / "file.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return CliRunner().invoke(app, ["config", command, str(path)])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (DOCUMENT, ""),
        (serve_config(DOCUMENT), ": applications.1.args"),
        ({"config": DOCUMENT, "image": {"tag": "x"}}, ": config"),
    ],
    ids=["document", "serve", "chart"],
)
def test_a_good_file_is_summed_up(tmp_path: Path, content: Any, part: str) -> None:
    result = run(tmp_path, "check", content)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"{tmp_path}/file.yaml{part}: ok",
        "  model     /models/mine, served as m",
        "  prefill   2 workers, each with 1 CPU and 1 GPU",
        "  decode    1 worker, each with 2 CPUs and 0 GPUs",
        "  needs     4 CPUs, 2 GPUs, 0.5 of door, 2 of rack",
        "  endpoint  127.0.0.1:9000, 1 of the ingress",
    ]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (WRONG, ""),
        (serve_config(WRONG), ": applications.1.args"),
        ({"config": WRONG}, ": config"),
    ],
    ids=["document", "serve", "chart"],
)
def test_every_problem_is_named(tmp_path: Path, content: Any, part: str) -> None:
    result = run(tmp_path, "check", content)
    assert (result.exit_code, result.stdout) == (1, "")
    first, key, value = result.stderr.splitlines()
    assert first == f"error: {tmp_path}/file.yaml{part}:"
    assert key.startswith("  model.sorce: unknown key; did you mean 'source'? allowed: ")
    assert value.startswith("  http.port: got 0; input should be greater than or equal to 1")


def test_every_application_is_checked(tmp_path: Path) -> None:
    result = run(tmp_path, "check", serve_config({"http": {"port": 0}}, {}, {"decode": 3}))
    assert result.exit_code == 1
    assert "applications.1.args:\n  http.port: got 0" in result.stderr
    assert "applications.3.args:\n  decode: got 3" in result.stderr
    assert "applications.2" not in result.stderr


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("prefill: [", "is not valid YAML"),
        ("config: [1]", "config: expected a mapping, got list"),
        ({"applications": [{"import_path": "a:b"}]}, f"none has import_path {IMPORT_PATH}"),
        ({"applications": 3}, f"none has import_path {IMPORT_PATH}"),
        ({"config": {}, "model": {}}, "config: unknown key"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, problem: str) -> None:
    result = run(tmp_path, "check", content)
    assert result.exit_code == 1
    assert problem in result.stderr


def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["config", "check", str(tmp_path / "none.yaml")])
    assert result.exit_code == 1
    assert "none.yaml: cannot be read" in result.stderr


@pytest.mark.parametrize(("keys", "exit_code"), [({"keys": ["a"]}, 0), ({"keys": []}, 1)])
def test_the_chart_s_file_of_keys_counts(tmp_path: Path, keys: Any, exit_code: int) -> None:
    values = {"config": {"http": {"metrics_need_key": True}}, "apiKeys": keys}
    assert run(tmp_path, "check", values).exit_code == exit_code


def test_values_of_the_chart_may_leave_the_document_out(tmp_path: Path) -> None:
    result = run(tmp_path, "check", {"image": {"repository": "r/antiphon"}, "models": {}})
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{tmp_path}/file.yaml: config: ok")
    values = yaml.safe_load((ROOT / "helm/antiphon/values.yaml").read_text())
    for name in values.keys() - {"config", "models"}:
        assert documents_in({name: values[name]}, Path("f"))[0].origin == "f: config", name


@pytest.mark.parametrize("key", ["modle", "models", "apiKey"])
def test_a_mistyped_key_is_not_taken_for_a_value_of_the_chart(tmp_path: Path, key: str) -> None:
    result = run(tmp_path, "check", {key: {}})
    assert result.exit_code == 1
    assert f"{key}: unknown key" in result.stderr


@pytest.mark.parametrize("content", ["", "config:\n", "config: {}\n"])
def test_an_empty_document_is_the_default(tmp_path: Path, content: str) -> None:
    result = run(tmp_path, "show", content)
    assert result.exit_code == 0
    assert parse_config(yaml.safe_load(result.stdout)) == AntiphonConfig()


@pytest.mark.parametrize("content", [DOCUMENT, {"config": DOCUMENT}], ids=["document", "chart"])
def test_show_prints_every_key_and_means_the_same(tmp_path: Path, content: Any) -> None:
    shown = yaml.safe_load(run(tmp_path, "show", content).stdout)
    assert parse_config(shown) == parse_config(DOCUMENT)
    assert shown == parse_config(DOCUMENT).model_dump(mode="json")


def test_show_without_a_file_prints_the_defaults() -> None:
    result = CliRunner().invoke(app, ["config", "show"])
    assert yaml.safe_load(result.stdout) == AntiphonConfig().model_dump(mode="json")


def test_show_wants_one_configuration(tmp_path: Path) -> None:
    result = run(tmp_path, "show", serve_config({}, {}))
    assert result.exit_code == 1
    assert "holds 2 configurations" in result.stderr


def test_sizes_stand_where_serve_changes_them_lightly(tmp_path: Path) -> None:
    sized = {
        **DOCUMENT,
        "colocated": {"replicas": 0},
        "http": {"port": 9000, "ingress_replicas": 2},
    }
    result = run(tmp_path, "serve", sized)
    assert result.exit_code == 0, result.stderr
    document = yaml.safe_load(result.stdout)
    (application,) = ServeDeploySchema.model_validate(document).applications
    assert document["http_options"] == {"host": "127.0.0.1", "port": 9000}
    assert "replicas" not in str(application.args)
    numbers = {d.name: d.num_replicas for d in application.deployments}
    assert numbers == {"prefill": 2, "decode": 1, "ingress": 2}
    shown = run(tmp_path, "show", document)
    assert parse_config(yaml.safe_load(shown.stdout)) == parse_config(sized)


def test_arguments_are_the_same_for_every_size_however_it_is_said() -> None:
    def arguments(**sections: Any) -> Any:
        return serve_document(sections)["applications"][0]["args"]

    default = arguments()
    assert default == arguments(prefill={"replicas": 4}, decode={}, colocated={"replicas": 0})
    assert default == arguments(http={"ingress_replicas": 2})
    assert default != arguments(colocated={"replicas": 1})
    only = arguments(prefill={"replicas": 0}, decode={"replicas": 0}, colocated={"replicas": 2})
    assert parse_config(only).pools.keys() == {"colocated"}


@pytest.mark.parametrize(
    ("deployments", "problem"),
    [
        ([{"name": "decod", "num_replicas": 2}], "0: no deployment 'decod'; with these args: "),
        ([{"name": "colocated", "num_replicas": 2}], "with these args: prefill, decode, ingress"),
        (["decode"], "0: expected a mapping, got str"),
        ([{"name": "decode", "num_replicas": 0}], "0.num_replicas: got 0; a number from 1"),
        ([{"name": "decode", "num_replicas": "auto"}], "0: Serve scales by its own queues"),
        ([{"name": "ingress", "autoscaling_config": {"max_replicas": 2}}], "Serve scales by"),
        (
            [{"name": "prefill", "num_replicas": 3}],
            "0.num_replicas is 3, but args.prefill.replicas is 2: leave it out of args",
        ),
    ],
)
def test_numbers_that_serve_could_not_use_are_refused(
    tmp_path: Path, deployments: Any, problem: str
) -> None:
    application = {"import_path": IMPORT_PATH, "args": DOCUMENT, "deployments": deployments}
    result = run(tmp_path, "check", {"applications": [application]})
    assert result.exit_code == 1
    assert "file.yaml: applications.0.deployments" in result.stderr
    assert problem in result.stderr


@pytest.mark.parametrize(
    "path", sorted((ROOT / "helm/antiphon/examples").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_examples_of_the_chart_are_good(path: Path) -> None:
    result = CliRunner().invoke(app, ["config", "check", str(path)])
    assert result.exit_code == 0, result.stderr
