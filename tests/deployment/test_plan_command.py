"""``antiphon plan``: from a config.json to numbers, words, and a configuration that is valid."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from antiphon.config import DEFAULT_MODEL
from antiphon.config_loading import parse_config
from antiphon.deployment.cli import app
from antiphon.deployment.plan_command import Dtypes, resolve, seconds
from antiphon.errors import ConfigError
from antiphon.workers.model_shape import ModelShape

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
ASKED = {"gpu": "H100", "ttft": "500ms", "tpot": "50ms", "rate": "10"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


def plan(model: object, *flags: str, **options: str) -> Result:
    words = [f"--{key.replace('_', '-')}={value}" for key, value in {**ASKED, **options}.items()]
    return CliRunner().invoke(app, ["plan", str(model), *words, *flags])


def numbers(model: Path, **options: str) -> dict[str, Any]:
    result = plan(model, "--json", **options)
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_the_page_shows_the_arithmetic(model: Path) -> None:
    result = plan(model)
    assert result.exit_code == 0, result.output
    for words in (
        "4 x H100: 2 prefill, 2 decode",
        "nothing here was measured",
        "weights: 8,030,261,248 parameters x 2 bytes",
        "131,072 bytes per token 404,919 tokens, 316 requests of 1,280",
        "316, limited by memory",
        "of that: 2 (what the links want)",
        "0.34 per pair",
    ):
        assert words in result.stdout
    assumed = result.stdout.partition("\nAssumed\n")[2].partition("\n\n")[0]
    for words in (
        "50% of peak FLOPs", "70% of peak bandwidth", "2.0 ms more for every step",
        "10.0 ms for every request", "at most 70% of each pool and link", "every 2048 tokens",
        "KV cache 85% of what is free", "1.5 GB for the driver", "no prefix in a cache",
    ):  # fmt: skip
        assert words in assumed
    document = yaml.safe_load(result.stdout.partition("\nConfiguration\n")[2])
    config = parse_config(document)
    assert (config.prefill.replicas, config.decode.replicas) == (2, 2)
    assert config.decode.engine.max_num_requests == 316


def test_what_is_named_becomes_a_source_that_can_be_served(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    for named in (model / "config.json", "config.json", "."):
        document = json.loads(plan(named, "--json").stdout)["config"]
        assert parse_config(document).model.source == str(model)


def test_programs_get_numbers(model: Path) -> None:
    answer = numbers(model, rate="200", link_bytes_per_second="2.5e10", prompt_tokens="2000")
    assert answer["num_gpus"] == answer["prefill"]["num_workers"] + answer["decode"]["num_workers"]
    assert answer["demand"]["ttft_seconds"] == 0.5
    assert answer["memory"]["kv_per_token"] == 131_072
    config = parse_config(answer["config"])
    assert config.router.link_bytes_per_second == 2.5e10
    in_flight = 200 * (answer["ttft_seconds"] + 256 * answer["tpot_seconds"])
    assert config.http.max_concurrent_requests >= max(512, in_flight)
    assert config.handoff.max_pending >= 200 * answer["ttft_seconds"] / config.decode.replicas


def test_dtypes_change_memory_links_and_the_configuration(model: Path) -> None:
    answer = numbers(model, kv_cache_dtype="fp8", wire_dtype="int8", dtype="float16")
    assert answer["memory"]["kv_per_token"] == 67_584
    assert answer["links"]["bytes_per_request"] == 1023 * 67_584
    config = parse_config(answer["config"])
    assert config.model.dtype == "float16"
    assert config.prefill.engine.kv_cache_dtype == config.decode.engine.kv_cache_dtype == "fp8"
    assert config.handoff.wire_dtype == "int8"


def test_every_assumption_can_be_replaced(model: Path) -> None:
    options = {
        "compute_share": "0.6", "memory_share": "0.8", "utilisation": "0.5",
        "step_overhead": "1ms", "link_bytes_per_second": "3e9",
    }  # fmt: skip
    assumed = numbers(model, **options)["assumptions"]
    assert assumed["step_overhead_seconds"] == 0.001
    names = ("compute_share", "memory_share", "utilisation", "link_bytes_per_second")
    assert [assumed[name] for name in names] == [0.6, 0.8, 0.5, 3e9]


def test_the_built_in_model_is_float32_and_a_gpu_that_is_not_served_is_said_so(
    smollm2_path: Path,
) -> None:
    result = plan(DEFAULT_MODEL, gpu="L40S", prompt_tokens="512")
    assert result.exit_code == 0, result.output
    assert "0.13 billion parameters in float32" in result.stdout
    assert "workers of this version refuse L40S" in result.stdout


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"gpu": "H800"}, "--gpu: got 'H800'; known are A100-80, H100"),
        ({"ttft": "500"}, "--ttft: got '500'; a time above 0, such as 500ms or 0.5s"),
        ({"tpot": "0ms"}, "--tpot: got '0ms'"),
        ({"rate": "0"}, "--rate: got 0; a finite number above 0"),
        ({"rate": "inf"}, "--rate: got inf"),
        ({"rate": "nan"}, "--rate: got nan"),
        ({"step_overhead": "soon"}, "--step-overhead: got 'soon'"),
        ({"tpot": "5ms"}, "--tpot: 5.0 ms is below what H100 can do"),
    ],
)
def test_what_is_wrong_is_said(model: Path, options: dict[str, str], problem: str) -> None:
    result = plan(model, **options)
    assert result.exit_code == 2
    assert problem in result.stderr


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    result = plan(tmp_path / "nothing")
    assert result.exit_code == 2
    assert "there is no model" in result.stderr


@pytest.mark.parametrize(
    ("text", "expected"), [("500ms", 0.5), ("0.5s", 0.5), ("2s", 2.0), (" 1.5ms ", 0.0015)]
)
def test_times(text: str, expected: float) -> None:
    assert seconds("--ttft", text) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [None, "float8_e4m3fn"])
def test_a_checkpoint_of_unknown_dtype_wants_an_option(dtype: str | None) -> None:
    shape = ModelShape("x", dtype, 1, 1, 0, 0, 0, 1.0, ())
    with pytest.raises(ConfigError, match="give --dtype"):
        resolve(shape, Dtypes("auto", "auto", "auto"))
    formats = resolve(shape, Dtypes("bfloat16", "auto", "int8"))
    assert (formats.weights, formats.kv_cache, formats.wire) == ("bfloat16", "bfloat16", "int8")
